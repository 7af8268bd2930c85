"""experiments.py: which runs there are, what is left of them, and that none outlives, or is lost with, its runner."""

import dataclasses
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import tyro
from filelock import FileLock

import experiments

ROOT = Path(__file__).parent.parent
TOY = """
import json, os, signal, sys, threading, time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
import tyro
from filelock import FileLock

MAY_CHANGE = {"total_timesteps", "checkpoint_interval", "run_dir", "resume"}

@dataclass
class Args:
    exp_name: str = "NAME"
    level: Literal["simple", "hard"] = "hard"
    backend: str = "batched"
    seed: int = 1
    alpha: float | None = None
    use_g: bool = True
    total_timesteps: int = 100
    checkpoint_interval: int = 1000
    run_dir: str | None = None
    resume: str | None = None

class InputError(ValueError):
    pass

def prepare(args):
    args.alpha = args.alpha or 0.5
    if not 0 <= args.seed < 100:
        raise InputError(f"--seed is {args.seed}; it must be in [0, 100).")

def main():
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    args, step = tyro.cli(Args), 0
    folder = Path(args.resume or args.run_dir)
    folder.mkdir(parents=True, exist_ok=bool(args.resume))
    (lock := FileLock(folder / "run.lock")).acquire(timeout=0)
    if args.resume:
        saved = json.loads((folder / "checkpoint.pt").read_text())
        step, args = saved["step"], Args(**saved["args"] | {"total_timesteps": args.total_timesteps})
        (folder / f"resumed_{step}.json").touch()
    else:
        prepare(args)
        (folder / "config.json").write_text(json.dumps({"algorithm": "NAME", "args": asdict(args)}))
    while True:
        ends = step >= args.total_timesteps or stop.is_set()
        if ends or step % args.checkpoint_interval == 0:
            (folder / "checkpoint.pt").write_text(json.dumps({"step": step, "args": asdict(args)}))
            (folder / "metrics.csv").write_text(f"step,return_mean,seconds\\n0,0,0\\n{step},5,{step / 100}\\n")
        if ends:
            break
        step += 1
        time.sleep(0.005)
    if step < args.total_timesteps:
        return 130
    (folder / "summary.json").write_text(json.dumps({"env_steps": step}))
    print("trained", args.seed, "with", os.environ["OMP_NUM_THREADS"])
    return args.seed == 13

if __name__ == "__main__":
    sys.exit(main())
"""  # a script, as far as the runner can tell, that does nothing 200 times a second


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A copy of the runner beside two scripts of a moment, also for calls in this process."""
    shutil.copy(ROOT / "experiments.py", tmp_path)
    for name in ("toy_mpe", "toy_smacv2"):
        (tmp_path / f"{name}.py").write_text(
            TOY.replace("NAME", name).replace("level", "map" if "2" in name else "level")
        )
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield tmp_path
    for name in ("toy_mpe", "toy_smacv2"):
        sys.modules.pop(name, None)


def main(monkeypatch, capsys, line):
    """In this process: exit code, standard output and error."""
    monkeypatch.setattr(sys, "argv", ["experiments.py", *line.split()])
    return (experiments.main(), *capsys.readouterr())


def start(line, cwd=None):
    return subprocess.Popen(
        [sys.executable, "experiments.py", *line.split()],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd,
    )  # fmt: skip


def run(line, code=0):
    process = start(line)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == code, out
    return out


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def saved_step(folder):
    return json.loads((folder / "checkpoint.pt").read_text())["step"]


def free(folder):
    """No process trains there."""
    return not experiments.locked(Path(folder))


# --- Which runs ---


@pytest.mark.parametrize("name", ["table2", "table3", "table4", "figure3"])
def test_the_papers_experiments_are_what_the_scripts_take(name):
    places, steps, algorithms = experiments.EXPERIMENTS[name]
    runs, missing = experiments.plan(experiments.Args(name))
    there = {key: seeds for key, (command, seeds) in algorithms.items() if command.split()[0] not in missing}
    assert len(runs) == len(places) * sum(there.values())
    assert {run.steps for run in runs} == {steps}
    assert [run.options["seed"] for run in runs] == sorted(run.options["seed"] for run in runs)
    assert {f"{run.script}.py" for run in runs} == {algorithms[key][0].split()[0] for key in there}
    assert all(not (ROOT / file).exists() for file in missing)


PAPER = {  # what an algorithm of a table is: script, options other than the script's own, seeds
    ("table3", "qmix"): ("qmix_mpe", {}, 5),
    ("table3", "softqmix_0.1"): ("softqmix_mpe", {"alpha": 0.1}, 5),
    ("table3", "softqmix_0.3"): ("softqmix_mpe", {"alpha": 0.3}, 5),
    ("table3", "softqmix_1.0"): ("softqmix_mpe", {"alpha": 1.0}, 5),
    ("table4", "qmix"): ("qmix_smacv2", {}, 3),
    ("table4", "entropy"): ("softqmix_smacv2", {"use_g": False, "use_f": False}, 3),
    ("table4", "function_f"): ("softqmix_smacv2", {"use_g": False}, 3),
    ("table4", "softqmix"): ("softqmix_smacv2", {}, 3),
}


@pytest.mark.parametrize(("experiment", "algorithm"), PAPER)
def test_an_algorithm_of_the_papers_tables_is_this_script_with_these_options(experiment, algorithm):
    name, different, seeds = PAPER[experiment, algorithm]
    runs, _ = experiments.plan(experiments.Args(experiment, algorithms=(algorithm,)))
    assert [run.options["seed"] for run in runs] == sorted([*range(1, seeds + 1)] * 3)
    for run in runs:
        place = "level" if experiment == "table3" else "map"
        plain = ["--" + place, run.options[place], "--seed", str(run.options["seed"]), *run.more]
        own, _ = experiments.check(sys.modules[name], plain)
        assert run.script == name
        assert own | different == run.options


def test_one_computation_is_one_run_in_every_experiment():
    four, three = ({run.identity for run in experiments.plan(experiments.Args(n))[0]} for n in ("table4", "figure3"))
    assert len(four) == 4 * 3 * 3
    assert len(four & three) == 2 * 3 * 3  # QMIX and Soft-QMIX at 5 against 5, three seeds


def test_subsets_and_varied_options(house, monkeypatch):
    monkeypatch.setitem(experiments.EXPERIMENTS, "mine", (("simple", "hard"), 70, {
        "a": ("toy_mpe.py --no-use-g", 2), "b": ("toy_mpe.py", 3), "c": ("absent_mpe.py", 1)}))  # fmt: skip
    runs, missing = experiments.plan(experiments.Args("mine"))
    assert missing == ["absent_mpe.py"]
    names = [run.folder.name for run in runs]
    assert names[:4] == ["simple__a__1", "hard__a__1", "simple__b__1", "hard__b__1"]
    assert len(names) == 2 * 2 + 2 * 3
    given = {"algorithms": ("b",), "places": ("hard",), "seeds": (7, 8), "folder": "x", "backend": "other"}
    vary = (("alpha", "0.5", "2"), ("use-g", "True", "False"))
    runs, missing = experiments.plan(experiments.Args("mine", **given, vary=vary, total_timesteps=9))
    assert missing == []
    assert [(r.options["seed"], r.options["alpha"], r.options["use_g"]) for r in runs] == [
        (seed, alpha, use_g) for seed in (7, 8) for alpha in (0.5, 2.0) for use_g in (True, False)
    ]
    assert {(run.steps, run.options["level"], run.options["backend"]) for run in runs} == {(9, "hard", "other")}
    assert runs[0].more == ["--total-timesteps", "9"]
    ((run, *_), _) = experiments.plan(experiments.Args("mine", **given, total_timesteps=9, checkpoint_interval=5))
    assert run.more == ["--total-timesteps", "9", "--checkpoint-interval", "5"]  # toys know no interval of tests
    assert str(runs[0].folder) == "x/hard__b__alpha=0.5__use_g=True__7"


def test_a_script_varies_the_options_that_it_knows(house):
    text = (house / "toy_smacv2.py").read_text()
    (house / "toy_smacv2.py").write_text(text.replace("    alpha: float | None = None\n", "").replace(
        "    args.alpha = args.alpha or 0.5\n", ""))  # fmt: skip
    vary = (("alpha", "1", "2"),)
    runs, _ = experiments.plan(experiments.Args("custom", scripts=("toy_mpe", "toy_smacv2.py"), vary=vary))
    assert [run.script for run in runs] == ["toy_mpe", "toy_mpe", "toy_smacv2"]


# --- What is left ---


def test_finished_runs_are_skipped_and_unfinished_ones_resumed(house, monkeypatch, capsys):
    line = "custom --scripts toy_mpe --seeds 1 2 --workers 2"
    out = run(f"{line} --run")
    assert "0 of 2 runs are finished, 2 are left to do" in out
    assert "finished: runs/hard__toy_mpe__1" in out
    assert (house / "runs/hard__toy_mpe__2.log").read_text() == "trained 2 with 1\n"
    # Under another name, and by the value that the script's default stands for: the same computation
    (house / "runs/hard__toy_mpe__1").rename(house / "runs/elsewhere")
    code, out, _ = main(monkeypatch, capsys, f"{line} --run --vary alpha 0.5")
    assert code == 0
    assert "2 of 2 runs are finished, 0 are left to do" in out
    # Under its name, another
    code, out, _ = main(monkeypatch, capsys, f"{line} --vary alpha 0.7")
    assert "0 of 2 runs are finished" in out
    # More steps: it goes on
    out = run(f"{line} --total-timesteps 150 --run")
    assert "0 of 2 runs are finished, 2 are left to do" in out
    assert (house / "runs/elsewhere/resumed_100.json").exists()
    assert saved_step(house / "runs/elsewhere") == 150
    assert sorted(path.name for path in (house / "runs").iterdir()) == [
        "elsewhere", "elsewhere.log", "hard__toy_mpe__1.log", "hard__toy_mpe__2", "hard__toy_mpe__2.log"
    ]  # fmt: skip


def test_a_run_has_one_thread_or_what_the_environment_says(house, monkeypatch):
    for given, threads in ((None, 1), ("3", 3)):  # on however many cores, and with however few workers
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        run(f"custom --scripts toy_mpe --seeds {threads} --workers 1 --run")
        assert (house / f"runs/hard__toy_mpe__{threads}.log").read_text() == f"trained {threads} with {threads}\n"


def test_runs_that_would_be_called_alike_get_folders_of_their_own(house):
    Path("runs/hard__toy_mpe__1-2").mkdir(parents=True)  # somebody's
    commands = run("custom --scripts toy_mpe --vary backend batched mpe2 other --print").splitlines()
    folders = [words[words.index("--run-dir") + 1] for words in map(shlex.split, commands)]
    assert folders == ["runs/hard__toy_mpe__1", "runs/hard__toy_mpe__1-3", "runs/hard__toy_mpe__1-4"]


def put(folder, args, algorithm="toy_mpe", **files):
    """A run folder that somebody left."""
    folder.mkdir(parents=True)
    everything = {"exp_name": algorithm, "level": "hard", "backend": "batched", "seed": 1, "alpha": 0.5, "use_g": True,
                  "total_timesteps": 100, "checkpoint_interval": 1000, "run_dir": "", "resume": None}  # fmt: skip
    args = everything | args
    config = {"algorithm": algorithm, "simulator_version": args.pop("simulator_version", None), "args": args}
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)


ONE = "custom --scripts toy_mpe --folder r"


@pytest.mark.parametrize(
    ("args", "algorithm", "same"),
    [
        ({}, "toy_mpe", True), ({"exp_name": "mine", "total_timesteps": 3}, "toy_mpe", True),
        ({"seed": 2}, "toy_mpe", False), ({"alpha": 0.6}, "toy_mpe", False), ({"level": "simple"}, "toy_mpe", False),
        ({"other": 1}, "toy_mpe", False), ({}, "toy_smacv2", False), ({"simulator_version": "1"}, "toy_mpe", False),
    ],
)  # fmt: skip
def test_a_run_is_what_its_config_says_and_not_its_name(house, monkeypatch, capsys, args, algorithm, same):
    put(house / "r/hard__toy_mpe__1", args, algorithm, checkpoint_pt="", summary_json='{"env_steps": 100}')
    out = main(monkeypatch, capsys, ONE)[1]
    assert out.splitlines()[-1].startswith(f"{int(same)} of 1 runs are finished")
    words = main(monkeypatch, capsys, f"{ONE} --print")[1].split()
    assert words == [] if same else words[words.index("--run-dir") + 1] == "r/hard__toy_mpe__1-2"  # nothing is touched


@pytest.mark.parametrize(("weight", "rate"), [(0.1, "1.00"), (1.0, "0.25")])
def test_a_matrix_game_shows_the_result_of_its_own_weight(weight, rate, tmp_path):
    (tmp_path / "metrics.csv").write_text("step,td_weight,success_rate\n130,0.1,1.0\n130,1.0,0.25\n")
    run = experiments.Run("qmix_matrix", [], [], {"td_weight": weight}, 130, "", tmp_path)
    assert run.progress() == (130, f"success rate {rate}", 0)


@pytest.mark.parametrize("script", ["qmix_matrix", "softqmix_matrix", "fop_matrix"])
def test_a_payoff_file_that_has_changed_makes_another_run(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("game.csv").write_text("1, 0\n0, 2\n")
    line = f"custom --scripts {script} --places game.csv --vary num-seeds 1 --total-timesteps 130"
    (_, _, *words) = shlex.split(main(monkeypatch, capsys, f"{line} --print")[1])
    module = sys.modules[script]
    module.train(tyro.cli(module.Args, args=words))
    Path("game.csv").write_text("1,0\n\n0,2.0\n")  # the same in other letters
    assert "1 of 1 runs are finished" in main(monkeypatch, capsys, line)[1]
    Path("game.csv").write_text("1, 0\n0, 3\n")
    assert "0 of 1 runs are finished" in main(monkeypatch, capsys, line)[1]


def test_the_most_advanced_of_several_folders_goes_on(house, monkeypatch, capsys):
    for name, step in (("a", 10), ("b", 30), ("c", 20)):
        metrics = f"step,return_mean,seconds\n0,1,0\n{step},1,1\n"
        put(house / "r" / name, {}, metrics_csv=metrics, checkpoint_pt="", summary_json='{"env_steps": 5}')
    put(house / "r/d", {}, metrics_csv="step,return_mean,seconds\n0,1,0\n90,1,1\n")  # nothing to go on from
    words = main(monkeypatch, capsys, f"{ONE} --print")[1].split()
    assert words[1:] == [f"{house}/toy_mpe.py", "--resume", "r/b", "--total-timesteps", "100"]


def test_a_folder_in_which_somebody_trains_is_left_alone_and_named(house, monkeypatch, capsys):
    put(house / "r/theirs", {}, checkpoint_pt="")
    with FileLock(house / "r/theirs/run.lock"):
        code, out, _ = main(monkeypatch, capsys, f"{ONE} --run")
    assert code == 0
    assert "r/theirs is left alone: another process trains in it." in out
    assert "0 are left to do" in out


def test_a_run_that_has_not_learnt_yet_says_nothing_of_its_pace(tmp_path, monkeypatch):
    monkeypatch.setitem(experiments.HOURS, "qmix_smacv2", 2.0)
    run = experiments.Run("qmix_smacv2", [], [], {"map": "zerg_5_vs_5"}, 1_000_000, "", tmp_path)
    rows = ["step,updates,win_rate,seconds", "0,0,0,0", "100000,0,0,10", "200000,5,0,300", "300000,9,0.5,660"]
    for known, hours in ((2, 2.0), (3, 1.8), (4, 1.6), (5, 700_000 * 360 / 100_000 / 3600)):
        (tmp_path / "metrics.csv").write_text("\n".join(rows[:known]) + "\n")
        assert run.hours() == pytest.approx(hours)


@pytest.mark.parametrize(("env", "game"), [(None, "batched"), ("mpe2.simple_reference_v3", "mpe2.simple_reference_v3")])
def test_the_list_names_the_game_that_is_played(env, game, tmp_path):
    run = experiments.Run("qmix_mpe", [], [], {"env": env, "backend": "batched"}, 100, "", tmp_path / "run")
    assert run.line().endswith(f"  run ({game})")


def test_hours_are_the_tables_or_the_runs_own(house, monkeypatch, capsys):
    monkeypatch.setitem(experiments.HOURS, "toy_mpe", 2.0)
    runs = experiments.plan(experiments.Args("custom", scripts=("toy_mpe",), total_timesteps=1_500_000))[0]
    assert runs[0].hours() == 3
    assert dataclasses.replace(runs[0], options={"map": "protoss_10_vs_11"}).hours() == 3 * experiments.GROWTH[20]
    put(house / "r/x", {}, metrics_csv="step,return_mean,seconds\n0,1,0\n500000,1,1800\n", checkpoint_pt="")
    out = main(monkeypatch, capsys, f"{ONE} --total-timesteps 1500000 --workers 2")[1]
    assert "500,000/1,500,000  return 1.00" in out
    assert "278/s" in out
    cores = min(2, os.cpu_count())
    assert f"1.0 hours of one core, {1 / cores:.1f} hours here with --workers 2." in out
    out = main(monkeypatch, capsys, "custom --scripts toy_smacv2 --places simple")[1]
    assert "1 runs whose hours nobody has measured" in out


# --- Doing it ---


def test_a_failed_run_is_named_and_the_others_go_on(house):
    out = run("custom --scripts toy_mpe --seeds 13 1 --run", code=1)
    assert "exit code 1, see runs/hard__toy_mpe__13.log: trained 13 with 1: runs/hard__toy_mpe__13" in out
    assert "finished: runs/hard__toy_mpe__1\n" in out


LONG = "custom --scripts toy_mpe --seeds 1 2 3 --total-timesteps 100000 --workers 2 --run"
FOLDERS = ("runs/hard__toy_mpe__1", "runs/hard__toy_mpe__2")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_runner_stops_its_runs_with_a_checkpoint_and_waits(house, signum):
    process = start(LONG)
    wait_for(lambda: all((house / folder / "metrics.csv").exists() for folder in FOLDERS))
    time.sleep(0.3)
    process.send_signal(signum)
    out = process.communicate(timeout=30)[0]
    assert process.returncode == 130, out
    assert all(free(folder) and saved_step(house / folder) > 0 for folder in FOLDERS)
    assert "stopped: runs/hard__toy_mpe__1" in out
    assert "not begun: runs/hard__toy_mpe__3" in out
    assert "Traceback" not in out


def test_runs_of_a_killed_runner_end_with_a_checkpoint_and_the_next_one_goes_on(house):
    process = start(LONG)
    wait_for(lambda: all((house / folder / "metrics.csv").exists() for folder in FOLDERS))
    time.sleep(0.3)
    process.kill()
    process.wait()
    wait_for(lambda: all(saved_step(house / folder) > 0 for folder in FOLDERS), 10)
    wait_for(lambda: all(map(free, FOLDERS)), 10)
    assert process.stdout.read().count("finished") == 1  # of the list before
    run("custom --scripts toy_mpe --seeds 1 2 --workers 2 --run --total-timesteps 200")
    assert all(list((house / folder).glob("resumed_*.json")) for folder in FOLDERS)
    assert all(saved_step(house / folder) >= 200 for folder in FOLDERS)


def test_a_run_that_another_process_has_finished_is_not_made_again(house):
    (run,), _ = experiments.plan(experiments.Args("custom", scripts=("toy_mpe",), folder="r"))
    put(house / "r/hard__toy_mpe__1", {}, checkpoint_pt="", summary_json='{"env_steps": 100}')
    assert experiments.work(run, 1, str(house)) == "finished"
    assert not list(house.glob("r/*.log"))


def test_a_run_gets_the_backend_of_the_plan_wherever_it_trains(monkeypatch):
    """And shorter runs of MAPPO go on with more steps; what planning has opened is closed."""
    import mappo_smacv2

    closed = []
    monkeypatch.setattr(mappo_smacv2.SMACv2Sim, "close", lambda env: closed.append(env))
    monkeypatch.setattr(mappo_smacv2, "is_installed", lambda map_name: False)
    wanted = experiments.Args("figure3", algorithms=("mappo",), places=("terran_5_vs_5",), seeds=(1,))
    (run,), _ = experiments.plan(wanted)
    assert run.command()[-4:] == ["--run-dir", "runs/terran_5_vs_5__mappo__1", "--total-timesteps", "10050000"]
    assert run.words[-2:] == ["--backend", "sim"]
    assert "mappo__1 (sim)" in run.line()
    assert len(closed) == 2
    (shorter,), _ = experiments.plan(dataclasses.replace(wanted, total_timesteps=1000))
    assert shorter.identity == run.identity


def test_with_a_script_of_this_project(tmp_path):
    """Started, stopped, resumed, and then finished."""
    vary = (("eval_episodes", "4"), ("batch_size", "5000"))  # it learns nothing
    wanted = experiments.Args("custom", scripts=("qmix_mpe",), places=("simple",), vary=vary, folder=str(tmp_path))
    (run,), _ = experiments.plan(wanted)
    with ThreadPoolExecutor() as pool:
        stop = threading.Event()
        outcome = pool.submit(experiments.work, run, 1, str(tmp_path), stop=stop)
        wait_for(lambda: (run.folder / "checkpoint.pt").exists() or outcome.done(), 100)
        stop.set()
        assert outcome.result() == "stopped"
    steps = torch.load(run.folder / "checkpoint.pt", weights_only=True)["step"] + 400
    (again,), _ = experiments.plan(dataclasses.replace(wanted, total_timesteps=steps))
    experiments.find([again], str(tmp_path))
    assert (again.folder, again.state) == (run.folder, "unfinished")
    assert experiments.work(again, 1, str(tmp_path)) == "finished"
    assert len(list(run.folder.glob("resumed_*.json"))) == 1
    experiments.find([again], str(tmp_path))
    assert again.state == "finished"


class Terminal:
    def __init__(self, live):
        self.text, self.live = "", live

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return self.live


@pytest.mark.parametrize("live", [True, False], ids=["terminal", "file"])
def test_progress_is_a_table_on_a_terminal_and_a_line_a_minute_elsewhere(house, monkeypatch, live):
    put(house / "r/x", {}, metrics_csv="step,win_rate,seconds\n0,0,0\n3600,0.25,36\n")
    run = experiments.plan(experiments.Args("custom", scripts=("toy_mpe",), total_timesteps=363_600))[0][0]
    run.folder = house / "r/x"
    rounds, clock, out = iter([{}, {}, {}, {}, {0: "finished"}]), iter(range(0, 1000, 25)), Terminal(live)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    stop = type("Stop", (), {"is_set": lambda self: False, "wait": lambda self, seconds: None})()
    assert experiments.watch({0: run}, lambda _: next(rounds), stop) == 0
    line = "     3,600/363,600    win rate 0.25       100/s   1.0 h left  x"
    if live:
        assert out.text.count(line) == 4
        assert out.text.count("\033[2F\033[J") == 4  # each table replaces the one before it
    else:
        assert out.text.count(line) == 1
    assert f"finished: {house / 'r/x'}" in out.text


# --- Bad input ---


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("table5", "'table5'"), ("custom", "--scripts"), ("figure3 --scripts toy_mpe", "--scripts"),
        ("custom --scripts absent_mpe", "no script absent_mpe.py: choose of needy_mpe.py, toy_mpe.py"),
        ("custom --scripts experiments", "experiments.py"), ("figure3 --algorithms foo", "'foo'"),
        ("custom --scripts toy_mpe --seeds -1", "--seed is -1"), ("custom --scripts toy_mpe --places foo", "foo"),
        ("custom --scripts toy_mpe --vary alpha foo", "foo"), ("custom --scripts toy_mpe --vary beta 1", "--beta"),
        ("custom --scripts toy_mpe --vary total-timesteps 9 8", "--total-timesteps instead"),
        ("custom --scripts toy_mpe --vary seed 3 4", "--seeds instead"),
        ("custom --scripts toy_mpe --vary level simple hard", "--places instead"),
        ("custom --scripts toy_mpe --vary exp_name mine", "exp_name, which makes no other run"),
        ("custom --scripts toy_mpe --vary alpha it's", "a quotation without an end"),
        ("custom --scripts needy_mpe", "needs the package nowhere_to_be_found"),
        ("custom --scripts toy_mpe --vary", "--vary names no option"),
        ("custom --scripts toy_mpe --vary use_g True --vary use-g False", "--vary is given twice for use_g"),
        ("custom --scripts toy_mpe --vary alpha", "alpha"), ("custom --scripts toy_mpe --vary use_g yes", "'yes'"),
        ("custom --scripts toy_mpe --workers 0", "--workers is 0"), ("custom --scripts toy_mpe --gpus nan", "--gpus"),
        ("custom --scripts toy_mpe --total-timesteps 0", "--total-timesteps is 0"),
        ("custom --scripts toy_mpe --run --folder /dev/null/x", "/dev/null/x"),
        ("custom --scripts toy_mpe --folder needy_mpe.py", "needy_mpe.py is a file"),
        ("custom --scripts elsewhere/toy_mpe.py", "'elsewhere/toy_mpe.py'; scripts are those beside experiments.py"),
        ("custom --scripts toy_mpe --eval-interval 0", "--eval-interval is 0"),
        ("custom --scripts toy_mpe --run --ray auto", "requirements-ray.txt"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_sentence(house, monkeypatch, capsys, line, named):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    (house / "needy_mpe.py").write_text("import nowhere_to_be_found")
    code, _, err = main(monkeypatch, capsys, line)
    assert code == 2
    assert err.startswith("error: ")
    assert named in err
    assert len(err.splitlines()) == 1
    assert not list(house.rglob("config.json"))


@pytest.mark.parametrize("content", ["", "[]", '{"env_steps": "many"}'])
def test_a_damaged_summary_is_named(house, monkeypatch, capsys, content):
    put(house / "r/x", {}, summary_json=content)
    code, _, err = main(monkeypatch, capsys, ONE)
    assert code == 2
    assert err == "error: r/x/summary.json is damaged or not of such a run: move it away.\n"


# --- A cluster ---

needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not installed: requirements-ray.txt")
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
node = cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(node)
    print("removed", flush=True)
cluster.shutdown()
"""


@pytest.fixture
def cluster(house):
    """Its address, and what kills one of its two nodes."""
    command = [sys.executable, "-c", CLUSTER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, text=True, **pipes)
    address = next(line.strip() for line in process.stdout if ":" in line and " " not in line.strip())

    def kill():
        process.stdin.write("kill\n")
        process.stdin.flush()
        assert process.stdout.readline() == "removed\n"

    yield address, kill
    process.stdin.close()
    process.wait(timeout=60)


@needs_ray
def test_on_a_cluster_a_run_goes_on_elsewhere_when_its_node_dies(house, cluster):
    address, kill = cluster
    process = start(f"custom --scripts toy_mpe --seeds 1 2 --total-timesteps 1500 --memory 0.05 --ray {address} --run")
    wait_for(lambda: all((house / folder / "metrics.csv").exists() for folder in FOLDERS))
    time.sleep(0.5)
    kill()
    out = process.communicate(timeout=180)[0]
    assert process.returncode == 0, out
    assert [saved_step(house / folder) for folder in FOLDERS] == [1500, 1500]
    resumed = [int(path.stem.split("_")[1]) for folder in FOLDERS for path in (house / folder).glob("resumed_*.json")]
    assert len(resumed) == 1
    assert resumed[0] > 0


@needs_ray
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_on_a_cluster_no_run_outlives_its_runner(house, cluster, signum):
    process = start(LONG + f" --ray {cluster[0]}")
    wait_for(lambda: all((house / folder / "metrics.csv").exists() for folder in FOLDERS))
    time.sleep(0.5)
    process.send_signal(signum)
    process.communicate(timeout=60)
    assert process.returncode == (130 if signum == signal.SIGINT else -9)
    if signum == signal.SIGINT:
        assert all(map(free, FOLDERS))
    wait_for(lambda: all(map(free, FOLDERS)), 30)
    assert all(saved_step(house / folder) > 0 for folder in FOLDERS)


@needs_ray
@pytest.mark.parametrize("address", ["auto", "127.0.0.1:1", "nowhere"])
def test_a_cluster_that_does_not_answer_is_named(house, address):
    out = run(f"custom --scripts toy_mpe --run --ray {address}", code=2)
    assert out.splitlines()[-1].startswith(f"error: --ray {address}: no cluster answers")
    assert "Traceback" not in out


@pytest.mark.parametrize("experiment", ["table2", "table3", "table4", "figure3"])
def test_a_plan_leaves_no_file_behind(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiments.plan(experiments.Args(experiment, seeds=(1,), folder="runs"))
    assert not list(tmp_path.iterdir())


def test_tests_between_are_as_frequent_as_asked_for_and_another_game_gives_its_name():
    """With a real script, which has such an interval."""
    given = dict(scripts=("qmix_mpe",), seeds=(1,), total_timesteps=9, eval_interval=3)
    ((run,), _) = experiments.plan(experiments.Args("custom", **given, vary=(("env", "mpe2.simple_reference_v3"),)))
    assert run.more == ["--total-timesteps", "9", "--eval-interval", "3"]
    assert str(run.folder) == "runs/mpe2.simple_reference_v3__qmix_mpe__1"
