"""What the README says is there, and its example runs."""

import contextlib
import re
import shlex
from pathlib import Path

import pytest
import tyro

import softqmix_smacv2

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    python (\w+)\.py (.*?) *(?:#.*)?$", README, re.MULTILINE)


def test_the_policy_example_plays_a_battle(tmp_path, monkeypatch, capsys):
    args = softqmix_smacv2.Args(map="zerg_2_vs_2", total_timesteps=8, eval_episodes=2, run_dir=str(tmp_path))
    softqmix_smacv2.train(args)
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    exec(example, {})
    assert capsys.readouterr().out.strip().splitlines()[-1] in ("won", "not won")


@pytest.mark.parametrize(("script", "options"), COMMANDS, ids=lambda text: text[:40])
def test_commands_have_existing_scripts_and_options(script, options):
    module = __import__(script)
    with contextlib.suppress(SystemExit) if "--help" in options else contextlib.nullcontext():
        tyro.cli(module.Args, args=shlex.split(options))


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README


def test_files_exist():
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "results").glob("*.md")):
        text = document.read_text()
        for link in re.findall(r"\]\((?!http|#)([^)#]+)\)", text):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
        names = set(re.findall(r"`((?:tests/|docs/|benchmarks/|results/)?\w+\.(?:py|md|txt))`", text))
        for name in names - {"my_game.csv"}:
            assert any((folder / name).exists() for folder in (ROOT, document.parent, ROOT / "tests")), name
