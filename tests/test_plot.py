"""plot.py and the experiment runner: grouping, averages, picture; which runs are left to do."""

import importlib
import json
import sys

import pytest
import tyro
from PIL import Image

import plot
from benchmarks import mpe, smacv2


def write_run(folder, name, seed, win_rates, backend="sim", **options):
    """A finished run with an evaluation every 10,000 steps."""
    folder.mkdir(parents=True)
    args = {"exp_name": name, "map": "zerg_5_vs_5", "seed": seed, **options}
    (folder / "config.json").write_text(json.dumps({"args": args, "backend": backend, "simulator_version": "1"}))
    rows = [f"{10_000 * i},{w},{10 * w},{60 * i}" for i, w in enumerate(win_rates)]
    (folder / "metrics.csv").write_text("\n".join(["step,win_rate,return_mean,seconds", *rows]))


def run_plot(monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, options)])
    return plot.main(), capsys.readouterr()


def test_table_and_picture(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", "soft", 1, [0.0, 0.2, 0.4], alpha=0.03)
    write_run(tmp_path / "b", "soft", 2, [0.0, 0.4, 0.8], alpha=0.03, younger_option=True)
    write_run(tmp_path / "c", "soft", 1, [0.0, 0.0, 0.0], alpha=0.5)
    write_run(tmp_path / "d", "soft", 1, [1.0, 1.0, 1.0], backend="starcraft2", alpha=0.03)
    write_run(tmp_path / "f", "qmix", 1, [0.0, 0.0, 0.0])
    write_run(tmp_path / "g", "qmix", 2, [0.0, 0.0, 0.0], td_weight=1)
    write_run(tmp_path / "h", "qmix", 3, [0.0, 0.0, 0.0], td_weight=0.1)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "metrics.csv").write_text("")  # a run that has just begun
    code, printed = run_plot(monkeypatch, capsys, tmp_path, "--out", tmp_path / "x.png", "--final", 2, "--at", 20_000)
    assert code == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.out.splitlines() if "zerg" in line]
    assert [row[:4] for row in rows] == [
        ["zerg_5_vs_5 (sim 1)", "qmix", "win_rate", "1"],  # older than the option in which the others differ
        ["zerg_5_vs_5 (sim 1)", "qmix td_weight=0.1", "win_rate", "1"],
        ["zerg_5_vs_5 (sim 1)", "qmix td_weight=1", "win_rate", "1"],
        ["zerg_5_vs_5 (sim 1)", "soft alpha=0.03", "win_rate", "2"],
        ["zerg_5_vs_5 (sim 1)", "soft alpha=0.5", "win_rate", "1"],
        ["zerg_5_vs_5 (starcraft2 1)", "soft", "win_rate", "1"],  # never averaged with the simulator's
    ]
    assert rows[3][5:] == ["0.3 +- 0.14", "0.45 +- 0.21", "0.3 +- 0.14"]  # at, final, area
    assert Image.open(tmp_path / "x.png").width > 800


def test_nothing_to_plot_is_said_in_one_sentence(tmp_path, monkeypatch, capsys):
    code, printed = run_plot(monkeypatch, capsys, tmp_path)
    assert code == 2
    assert len(printed.err.strip().splitlines()) == 1


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
