"""The measurements in benchmarks/: they measure, and bad options are refused before the work."""

import json
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import learner, simulator, training

ROOT = Path(__file__).parent.parent


def run_main(module, monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, options)])
    try:
        code = module.main()
    except SystemExit as stopped:  # tyro's and argparse's own errors
        code = stopped.code
    return code, capsys.readouterr()


@pytest.mark.parametrize(
    ("module", "line"),
    [
        *[(simulator, line) for line in ("--maps foo", "--seconds nan", "--seconds -1", "--battles 4 0")],
        *[(training, line) for line in ("--maps foo", "--levels foo", "--num-envs 4 0", "--threads -1")],
        *[(training, line) for line in ("--seconds nan", "--seconds 0", "--warm-up inf")],
        *[(learner, line) for line in ("--batch-size 0", "--threads -1", "--repeats 0", "--sizes foo")],
        *[(module, "--json /dev/null/x") for module in (simulator, training, learner)],
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_impossible_options_are_refused_before_the_work(monkeypatch, capsys, module, line):
    code, printed = run_main(module, monkeypatch, capsys, *line.split())
    assert (code, printed.out) == (2, "")
    assert line.split()[-1] in printed.err
    if line not in ("--levels foo", "--sizes foo"):  # around these tyro draws a box
        assert printed.err.startswith("error: ")
        assert len(printed.err.splitlines()) == 1


def test_simulator_names_an_unknown_map():
    run = subprocess.run(
        [sys.executable, "-m", "envs.smacv2_sim", "foo"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: unknown map 'foo'")
    assert len(run.stderr.splitlines()) == 1


def test_training_is_measured_when_many_updates_follow_one_step(tmp_path):
    """All 64 episodes of Spread end at once, and 16 updates follow."""
    options = "--scripts qmix_mpe --num-envs 64 --seconds 1 --warm-up 0 --threads 1 --no-cuda --json"
    command = [sys.executable, ROOT / "benchmarks" / "training.py", *options.split(), tmp_path / "training.json"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (row,) = json.loads((tmp_path / "training.json").read_text())["results"]
    assert row["seconds"] >= 1
    assert row["steps/s"] == pytest.approx(row["steps"] / row["seconds"])
    assert row["updates"] >= 1
    assert sum(row["percent"].values()) == pytest.approx(100)
    assert row["percent"]["learning"] > 0


def test_an_update_takes_longer_than_its_parts(tmp_path, monkeypatch, capsys):
    """In this process, and without the large product and copy."""
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):  # which it changes
        monkeypatch.setenv(name, "1")
    context = SimpleNamespace(Pool=lambda processes, **_: ThreadPool(processes))
    monkeypatch.setattr(learner.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(learner, "machine_limits", lambda _: (50.0, 10.0))
    options = "--sizes mpe --batch-size 16 --repeats 3 --threads 1 --no-cuda --json"
    code, printed = run_main(learner, monkeypatch, capsys, *options.split(), tmp_path / "learner.json")
    assert (code, printed.err) == (0, "")
    (row,) = json.loads((tmp_path / "learner.json").read_text())["results"]
    assert (row["steps"], row["longest"]) == (16 * 25, 25)
    assert 0 < row["  policy, all actions, forward"] < row["update"]
    assert row["operations"] > 100
