"""What the documents say is there: the README's example runs, commands and options exist, and so do links and files."""

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import json
import re
import shlex
from pathlib import Path

import grid
import pytest
import tyro

import experiments
import softqmix_smacv2
from envs.pettingzoo_batch import PettingZooBatch
from envs.smacv2_sim import SMACv2Sim
from envs.starcraft2 import StarCraft2

ROOT = Path(__file__).parent.parent
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("results/**/*.md")))
}
PROGRAMS = {str(path.relative_to(ROOT).with_suffix("")) for path in (*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"))}
PYTHON = r"(?:\w+=\S+ )*(?:(?:\S+/)?python|uv run) "  # with variables, or of a virtual environment


def commands(text: str) -> list[tuple[str, str]]:
    """Program and options of each call, on an indented line or, with options, inline."""
    text = re.sub(r"\\\n *", "", text).replace(" && ", "\n    ")
    lines = re.findall(rf"^ {{4,}}{PYTHON}([\w/]+)\.py\b(.*?)(?:  +#.*)?$", text, re.MULTILINE)
    return lines + re.findall(rf"`(?:{PYTHON})?([\w/]+)\.py (-[^`]*)`", text)


COMMANDS = [(name, *command) for name, text in DOCUMENTS.items() for command in commands(text)]


def python_example(document: str) -> str:
    return re.search(r"```python\n(.*?)```", DOCUMENTS[document], re.DOTALL).group(1)


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("*_smacv2.py")))
def test_the_policy_example_plays_a_battle(name, tmp_path, monkeypatch, capsys):
    script = importlib.import_module(name)
    options = dict(map="zerg_2_vs_2", backend="sim", total_timesteps=8, eval_episodes=2)
    script.train(script.Args(**options, run_dir=str(tmp_path / "runs/NAME")))
    monkeypatch.chdir(tmp_path)
    exec(python_example("README.md").replace("softqmix_smacv2", name), {})
    assert capsys.readouterr().out.strip().splitlines()[-1] in ("won", "not won")


def test_the_environment_example_learns_as_fast_as_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(softqmix_smacv2, "make_env", softqmix_smacv2.make_env)  # the example replaces it
    example = python_example("docs/your_environment.md")
    assert "total_timesteps=10_000" in example
    exec(example.replace("total_timesteps=10_000", "total_timesteps=4_000"), {})
    summary = json.loads(next(tmp_path.glob("runs/*/summary.json")).read_text())
    assert summary["env_steps"] == 4000
    assert summary["eval"]["win_rate"] == 1


class Parsed(Exception):
    """Raised in place of the work."""


@pytest.mark.parametrize(("document", "program", "options"), COMMANDS, ids=lambda text: text[:40])
def test_commands_have_existing_programs_and_options(document, program, options, monkeypatch):
    module = importlib.import_module(program.replace("/", "."))
    words, parse_args = shlex.split(options), argparse.ArgumentParser.parse_args

    def only_parse(parser):
        raise Parsed(parse_args(parser, words))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    with contextlib.suppress(SystemExit) if "--help" in words else contextlib.nullcontext():
        if hasattr(module, "Args"):
            tyro.cli(module.Args, args=words)
        else:
            with pytest.raises(Parsed):
                module.main()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_options_named_in_the_text_exist(document):
    modules = [importlib.import_module(program.replace("/", ".")) for program in PROGRAMS]
    fields = [field for module in modules if hasattr(module, "Args") for field in dataclasses.fields(module.Args)]
    known = {field.name for field in fields} | {f"no_{field.name}" for field in fields if field.type is bool}
    known |= {"help", "logdir", "maps", "battles", "seconds", "watch"}  # TensorBoard's, and of programs without Args
    named = re.findall(r"(?<![\w-])--([a-z][a-z-]*)", DOCUMENTS[document])
    assert {name.replace("-", "_") for name in named} - known == set()


def test_options_of_the_games_named_in_the_text_exist():
    known = {"max_cycles"}  # mpe2's
    for game in (SMACv2Sim, StarCraft2, PettingZooBatch, grid.make):
        known |= inspect.signature(game).parameters.keys()
    for text in DOCUMENTS.values():
        for words in re.findall(r"--env-options((?: +\w+ [\w.]+)+)", text):
            assert set(words.split()[::2]) <= known


def test_lines_are_short_enough_for_a_terminal():
    """But for tables, and what stands alone in a line since it cannot be broken."""
    for name, text in DOCUMENTS.items():
        long = [line for line in text.splitlines() if len(line) > 120 and " " in line and line[0] not in "| "]
        assert not long, name


def test_nothing_is_left_to_fill_in():
    assert not [name for name, text in DOCUMENTS.items() if re.search(r"@@|\bRATIO\b", text)]


def test_the_first_screen_holds_two_lines_that_do_everything_and_ci_runs_the_second():
    lines = [line.strip() for line in DOCUMENTS["README.md"].splitlines()[:20] if line.startswith("    ")]
    work, tests = (line.rsplit(" && ", 1) for line in lines)
    assert work[0] == tests[0] == "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt"
    assert commands(f"    {work[1]}") == [("softqmix_smacv2", " --map protoss_5_vs_5 --alpha 0.03")]
    assert tests[1] == ".venv/bin/python -m pytest"
    assert (ROOT / ".ci" / "run").read_text().splitlines().count(lines[1]) == 1


@pytest.mark.parametrize(
    ("algorithms", "words"),
    [((), r"(\d+) runs and ([\d,]+) hours of one core"), (("softqmix", "qmix"), r"(\d+) runs, ([\d,]+) hours")],
)
def test_the_hours_of_figure_3_are_what_the_runner_says(algorithms, words, tmp_path):
    number, hours = re.search(words, DOCUMENTS["README.md"]).groups()
    runs, _ = experiments.plan(experiments.Args("figure3", algorithms=algorithms, folder=str(tmp_path)))
    assert int(number) == len(runs)
    assert int(hours.replace(",", "")) == pytest.approx(sum(run.hours() for run in runs), rel=0.005)


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_files_exist(document):
    text, folder = DOCUMENTS[document], (ROOT / document).parent
    for file, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        assert (folder / file).exists(), file
        if anchor and not file.endswith(".py"):  # lines of code are test_docs.py's
            assert anchor in anchors((folder / file).read_text() if file else text), f"{file}#{anchor}"
    names = set(re.findall(r"`((?:tests/|docs/|benchmarks/|results/|envs/)?\w+\.(?:py|md|txt))`", text))
    for name in names - {"agree.py"}:  # the reader's own
        assert any((place / name).exists() for place in (ROOT, folder, ROOT / "tests", ROOT / "envs")), name
