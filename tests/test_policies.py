"""The trained policies that a newcomer evaluates and watches: each is what results/policies/README.md says it is."""

import importlib
import math
import re
from pathlib import Path

import pytest
import torch
from common import run_main

FOLDER = Path(__file__).parent.parent / "results" / "policies"
ROW = re.compile(
    r"\| `(?P<file>\w+\.pt)` \| (?P<game>\w+) \| `(?P<script>\w+)\.py` \| (?P<seed>\d+) \| (?P<steps>[\d,]+) "
    r"\| (?P<rate>\.\d+) \((?P<low>\.\d+) to (?P<high>\.\d+)\) \| (?P<mean>-?[\d.]+) \|"
)
ROWS = [match.groupdict() for match in ROW.finditer((FOLDER / "README.md").read_text())]


def test_every_policy_stands_in_the_table_and_all_are_small():
    files = sorted(FOLDER.glob("*.pt"))
    assert sorted(row["file"] for row in ROWS) == [file.name for file in files] != []
    assert sum(file.stat().st_size for file in files) < 5e6


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["file"])
def test_a_policy_is_what_the_table_says(row):
    policy = torch.load(FOLDER / row["file"], weights_only=True)
    assert policy["kind"] == f"{row['script']} policy 2"
    assert (policy["map"], policy["args"]["seed"], policy["backend"]) == (row["game"], int(row["seed"]), "sim")
    assert policy["step"] == int(row["steps"].replace(",", ""))
    assert policy["args"]["run_dir"].startswith("runs/")  # no folder of the machine that trained it
    rate, low, high = (float(row[name]) for name in ("rate", "low", "high"))
    assert low < rate < high
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(rate * (1 - rate) / 1000), abs=0.003)  # of 1,000 battles


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["file"])
def test_a_policy_plays_as_the_table_says(row, capsys):
    """256 other battles: within four standard errors."""
    script = importlib.import_module(row["script"])
    code, output = run_main(script, capsys, "--evaluate", FOLDER / row["file"], "--eval-episodes", 256)
    assert code == 0
    rate = float(re.search(r"win rate ([\d.]+)", output).group(1))
    expected = float(row["rate"])
    assert abs(rate - expected) < 4 * math.sqrt(expected * (1 - expected) / 256)
