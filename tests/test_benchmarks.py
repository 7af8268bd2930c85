"""benchmarks/: which runs are left to do, that none is ever lost, and that bad options are refused before the work."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from benchmarks import learner, matrix, mpe, simulator, smacv2, training

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("steps", "checkpoint", "expected"), [(0, False, "--run-dir"), (500, True, "--resume")])
def test_runner_starts_resumes_and_skips(tmp_path, steps, checkpoint, expected):
    args = smacv2.Args(experiment="table4", total_timesteps=1000, folder=str(tmp_path))
    folder = tmp_path / "zerg_5_vs_5__entropy__3"
    if checkpoint:
        (folder / "checkpoints" / "500").mkdir(parents=True)
        (folder / "checkpoints" / "500" / "training.pt").touch()
        (folder / "summary.json").write_text(json.dumps({"env_steps": steps}))
    start = smacv2.jobs(args)[folder]
    words = smacv2.command(args, folder, start)
    assert words[words.index(expected) + 1] == str(folder)
    assert ("--no-use-g" in words) == (not checkpoint)  # a resumed run knows its options
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(json.dumps({"env_steps": 1000}))
    assert smacv2.command(args, folder, start) is None


@pytest.mark.parametrize(("runner", "runs"), [(smacv2, 6 * 2 * 5), (mpe, 3 * 4 * 5)], ids=["smacv2", "mpe"])
def test_runners_know_the_papers_experiments(runner, runs):
    jobs = runner.jobs(runner.Args())
    assert len(jobs) == runs
    for words in jobs.values():
        script = importlib.import_module(words[0].removesuffix(".py"))
        assert tyro.cli(script.Args, args=words[1:]).seed in range(1, 6)


def run_main(module, monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, options)])
    try:
        code = module.main()
    except SystemExit as stopped:  # tyro's and argparse's own errors
        code = stopped.code
    return code, capsys.readouterr()


ONE_RUN = ("--seeds", 1, "--algorithms", "qmix", "--maps", "zerg_2_vs_2", "--folder")
NAME = "zerg_2_vs_2__qmix__1"


def test_runner_runs_what_is_left_and_leaves_its_messages(tmp_path, monkeypatch, capsys):
    def run(words, stdout, **_):
        stdout.write("trained")
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(smacv2.subprocess, "run", run)
    code, printed = run_main(smacv2, monkeypatch, capsys, *ONE_RUN, tmp_path / "new")
    assert code == 0
    assert printed.out.startswith("0 of 1 runs are finished.\nfinished: ")
    assert (tmp_path / "new" / f"{NAME}.log").read_text() == "trained"


@pytest.mark.parametrize("file", ["metrics.csv", "summary.json", "config.json"])
def test_runner_never_touches_a_folder_that_it_cannot_resume(tmp_path, monkeypatch, capsys, file):
    monkeypatch.setattr(smacv2.subprocess, "run", lambda *_, **__: pytest.fail("it ran"))
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / file).write_text('{"env_steps": 5}')
    code, printed = run_main(smacv2, monkeypatch, capsys, *ONE_RUN, tmp_path)
    assert code == 2
    assert printed.err.startswith(f"error: There is no checkpoint to go on from in {tmp_path / NAME}: ")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [NAME, f"{NAME}/{file}"]
    assert (tmp_path / NAME / file).read_text() == '{"env_steps": 5}'


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"env_steps": "many"}'])
def test_runner_names_a_summary_that_it_cannot_read(tmp_path, monkeypatch, capsys, content):
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "summary.json").write_text(content)
    code, printed = run_main(smacv2, monkeypatch, capsys, *ONE_RUN, tmp_path, "--print")
    assert (code, printed.out) == (2, "")
    assert printed.err == f"error: {tmp_path / NAME / 'summary.json'} is damaged or not of such a run: move it away.\n"


@pytest.mark.parametrize(
    ("module", "line"),
    [
        *[(smacv2, line) for line in ("--maps nonsense --print", "--seeds -1 --print", "--total-timesteps 0")],
        *[(smacv2, line) for line in ("--checkpoint-interval 0", "--workers 0", "--seeds 1 --folder /dev/null/x")],
        *[(mpe, line) for line in ("--algorithms foo", "--levels foo", "--seeds -1 --print", "--total-timesteps -5")],
        *[(mpe, line) for line in ("--workers 0", "--seeds 1 --folder /dev/null/x")],
        *[(matrix, line) for line in ("--num-seeds 0", "--total-timesteps 5")],
        *[(simulator, line) for line in ("--maps foo", "--seconds nan", "--seconds -1", "--battles 4 0")],
        *[(training, line) for line in ("--maps foo", "--levels foo", "--num-envs 4 0", "--threads -1")],
        *[(training, line) for line in ("--seconds nan", "--seconds 0", "--warm-up inf")],
        *[(learner, line) for line in ("--batch-size 0", "--threads -1", "--repeats 0")],
        *[(module, "--no-cuda --cudagraphs") for module in (training, learner)],
        *[(module, "--json /dev/null/x") for module in (simulator, training, learner)],
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_impossible_options_are_refused_before_the_work(monkeypatch, capsys, module, line):
    code, printed = run_main(module, monkeypatch, capsys, *line.split())
    assert (code, printed.out) == (2, "")
    assert line.removesuffix(" --print").split()[-1] in printed.err
    if line not in ("--algorithms foo", "--levels foo"):  # around these tyro draws a box
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
