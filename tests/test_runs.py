"""What befalls runs of all four scripts: signals, second processes, foreign and damaged files, full disks, odd options.

Most of it happens within this process; commands are started where only a process shows it.
"""

import itertools
import json
import math
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from common import (
    FOP,
    MPE,
    ROOT,
    SMACV2,
    SOFT,
    checkpoint_of,
    config_of,
    logged_steps,
    one_sentence,
    over,
    read_metrics,
    resumed_args,
    run_main,
    small_args,
    train,
)
from filelock import FileLock

SCRIPTS = SMACV2 + MPE
STEPS = 400  # of the finished run
NAMES = [script.__name__ for script in SCRIPTS]


@pytest.fixture(scope="module", params=SCRIPTS, ids=NAMES)
def finished(request, tmp_path_factory):
    """A script and the folder of a finished run of it, to be left as it is."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(request.param, small_args(request.param, folder, total_timesteps=STEPS))
    return request.param, folder


@pytest.fixture
def run(finished, tmp_path):
    """The same, to be spoilt."""
    script, folder = finished
    return script, shutil.copytree(folder, tmp_path / "run")


def tiny(script, **changes) -> list:
    """Options of a run that is over at once."""
    options = dict(level="simple") if script in MPE else dict(map="terran_3_vs_2", backend="sim")
    options |= dict(burn_in=2) if script in FOP else {}
    options |= dict(total_timesteps=400, batch_size=2, buffer_size=8, eval_interval=200, eval_episodes=2) | changes
    return [text for name, value in options.items() for text in ("--" + name.replace("_", "-"), str(value))]


def at_test(script, number: int, happens):
    """From now on this happens during the script's test of that number."""
    tests, evaluate = itertools.count(1), script.evaluate

    def wrapper(*arguments):
        if next(tests) == number:
            happens()
        return evaluate(*arguments)

    return wrapper


# --- Signals ---


@over(SCRIPTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_saves_a_checkpoint_and_the_printed_cure_can_be_pasted(script, number, tmp_path, monkeypatch, capsys):
    """Also where the folder's name has spaces and quotes; the checkpoint is of the step that the signal came at."""
    monkeypatch.setattr(script, "evaluate", at_test(script, 2, lambda: signal.raise_signal(number)))
    folder = tmp_path / "my 'best' run"
    before = signal.signal(number, lambda *_: pytest.fail("The script does not handle it."))
    try:
        code, output = run_main(script, capsys, "--run-dir", folder, *tiny(script))
    finally:
        signal.signal(number, before)
    assert code == 130
    assert "Traceback" not in output
    cure = output.strip().splitlines()[-1]
    assert cure.startswith("Resume by python ")
    python, program, *options = shlex.split(cure.removeprefix("Resume by "))
    assert (python, program, options) == ("python", f"{script.__name__}.py", ["--resume", str(folder)])
    assert checkpoint_of(folder).counts[0] == 200
    assert run_main(script, capsys, *options)[0] == 0
    assert [row["step"] for row in read_metrics(folder)] == ["0", "200", "400"]
    assert checkpoint_of(folder).counts[0] == 400


@over(SCRIPTS + FOP)
def test_the_printed_cure_quotes_the_scripts_own_folder(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "evaluate", at_test(script, 2, lambda: stop.append(True)))
    monkeypatch.setattr(sys, "argv", [f"my scripts/{script.__name__}.py"])
    stop = []
    event = type("Event", (), {"is_set": lambda _: bool(stop)})()
    with pytest.raises(KeyboardInterrupt) as interrupt:
        script.train(small_args(script, tmp_path), event)
    assert shlex.split(str(interrupt.value))[3:] == [f"my scripts/{script.__name__}.py", "--resume", str(tmp_path)]


@over(SCRIPTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(script, number, tmp_path, monkeypatch, capsys):
    """As SIGINT is in a job in a shell script's background, and SIGHUP under nohup."""
    monkeypatch.setattr(script, "evaluate", at_test(script, 2, lambda: signal.raise_signal(number)))
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert run_main(script, capsys, "--run-dir", tmp_path / "run", *tiny(script))[0] == 0
    finally:
        signal.signal(number, before)
    assert checkpoint_of(tmp_path / "run").counts[0] == 400


def start(script, *options, **settings) -> subprocess.Popen:
    """A command, its output through a pipe."""
    return subprocess.Popen(
        [sys.executable, ROOT / f"{script.__name__}.py", *map(str, options)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **settings,
    )  # fmt: skip


def wait_for(path, process) -> None:
    """Until the process has written this file."""
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise TimeoutError(path)


def test_a_run_whose_output_nobody_reads_any_more_goes_on_and_is_saved(tmp_path):
    """As behind `2>&1 | tee log` when tee has ended, or in a terminal that was closed."""
    script = SMACV2[0]
    options = tiny(script, total_timesteps=10**6, eval_interval=10**6)
    process = start(script, "--run-dir", tmp_path, *options, cwd=tmp_path)
    wait_for(tmp_path / "checkpoint.pt", process)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    step = checkpoint_of(tmp_path).counts[0]
    assert train(script, resumed_args(script, tmp_path, total_timesteps=step + 40))


def test_closed_output_is_no_error(tmp_path):
    """As by `>&- 2>&-` in a shell."""
    command = [sys.executable, ROOT / "qmix_smacv2.py", "--run-dir", tmp_path, *tiny(SMACV2[1], total_timesteps=4)]
    closed = subprocess.run(["bash", "-c", '"$@" >&- 2>&-', "bash", *command], timeout=120, check=False)
    assert closed.returncode == 0
    assert (tmp_path / "summary.json").exists()


@over(SCRIPTS)
def test_the_bar_writes_a_line_a_minute_to_a_file(script, tmp_path, monkeypatch, capsys):
    now = itertools.count(0, 5)  # seconds; tqdm asks once a step
    monkeypatch.setattr("tqdm.std.time", lambda: next(now))
    options = tiny(script, total_timesteps=120, eval_interval=4, eval_episodes=1, batch_size=8)
    code, output = run_main(script, capsys, "--run-dir", tmp_path, *options)
    assert code == 0
    lines = output.count("step/s") + output.count("s/step")
    assert 3 <= lines <= 2 + 120 // 4 * 5 * 2 / 60  # the first, the last, and one a minute


@over(SCRIPTS + FOP)
def test_an_error_has_a_line_of_its_own(script, tmp_path, monkeypatch, capsys):
    """Beside the bar, which is drawn without an end of line."""
    monkeypatch.setattr(script, "update", lambda *_: {"td": math.nan})
    code, output = run_main(script, capsys, "--run-dir", tmp_path, *tiny(script))
    assert code == 1
    assert any(line.startswith("error: A loss is not finite") for line in output.replace("\r", "\n").splitlines())


@over(SCRIPTS)
def test_ctrl_c_during_the_imports_ends_them_without_a_traceback(script, tmp_path):
    (tmp_path / "numpy.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n")
    process = start(script, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert process.communicate(timeout=25) == ("", None)
    assert process.returncode == -signal.SIGINT


# --- One process per folder, and one folder per run ---


@pytest.mark.parametrize("option", ["--resume", "--run-dir"])
def test_a_second_process_in_a_runs_folder_gets_one_sentence(finished, option, capsys):
    script, folder = finished
    with FileLock(folder / "run.lock"):
        options = (option, folder, *(tiny(script) if option == "--run-dir" else ("--total-timesteps", 800)))
        sentence = one_sentence(run_main(script, capsys, *options))
    assert sentence == f"error: {folder} cannot be used: another process trains in it."


def test_a_folder_is_locked_until_its_last_file_is_written(run, monkeypatch):
    script, folder = run
    write, free = script.write, {}

    def spy(path, content):
        write(path, content)
        try:
            FileLock(folder / "run.lock").acquire(timeout=0).lock.release()
            free[path.name] = True
        except TimeoutError:
            free[path.name] = False

    monkeypatch.setattr(script, "write", spy)
    train(script, resumed_args(script, folder, total_timesteps=STEPS + 40))
    assert set(free) == {f"resumed_{STEPS}.json", "metrics.csv", "checkpoint.pt", "policy.pt", "summary.json"}
    assert not any(free.values())
    FileLock(folder / "run.lock").acquire(timeout=0).lock.release()  # and then no longer


def test_a_killed_process_leaves_its_folder_to_the_next(tmp_path, capsys):
    """While it trains, it has the folder to itself."""
    script = MPE[0]
    process = start(script, "--run-dir", tmp_path, *tiny(script, total_timesteps=10**6, eval_interval=10**6))
    wait_for(tmp_path / "checkpoint.pt", process)
    try:
        assert "another process" in one_sentence(run_main(script, capsys, "--resume", tmp_path))
    finally:
        process.kill()
        process.communicate()
    step = checkpoint_of(tmp_path).counts[0]
    assert run_main(script, capsys, "--resume", tmp_path, "--total-timesteps", step + 40)[0] == 0


def test_tensorboard_shows_no_step_twice_after_a_kill(run):
    """What a killed process had logged after its last checkpoint is dropped there when that checkpoint is resumed."""
    script, folder = run
    kept = (folder / "checkpoint.pt").read_bytes()
    for steps in (40, 80):
        (folder / "checkpoint.pt").write_bytes(kept)
        train(script, resumed_args(script, folder, total_timesteps=STEPS + steps, eval_interval=20))
    steps = logged_steps(folder, "eval/return_mean")
    assert steps[-4:] == [STEPS + more for more in (20, 40, 60, 80)]
    assert len(set(steps)) == len(steps)


@over(SCRIPTS)
def test_runs_that_start_in_the_same_second_get_folders_of_their_own(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "now")
    exploration = "--alpha" if script in SOFT else "--epsilon-finish"
    for pid, value in ((17, 0.1), (18, 0.2), (19, 0.1)):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        assert run_main(script, capsys, *tiny(script, total_timesteps=4), exploration, value)[0] == 0
    folders = sorted(tmp_path.glob("runs/*"))
    assert [folder.name.rpartition("-")[2] for folder in folders] == ["17", "18", "19"]
    name = exploration[2:].replace("-", "_")
    assert [config_of(folder)["args"][name] for folder in folders] == [0.1, 0.2, 0.1]
    before = (folders[-1] / "metrics.csv").read_bytes()
    assert "cannot be used" in one_sentence(run_main(script, capsys, *tiny(script)))
    assert (folders[-1] / "metrics.csv").read_bytes() == before


def test_a_run_is_never_overwritten(finished, capsys):
    script, folder = finished
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert "already holds a run" in one_sentence(run_main(script, capsys, "--run-dir", folder, *tiny(script)))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_what_is_left_of_a_damaged_run_is_not_overwritten_either(run, capsys):
    script, folder = run
    for name in ("config.json", "summary.json", "checkpoint.pt"):
        (folder / name).unlink()
        before = {path: path.read_bytes() for path in folder.iterdir()}
        assert "already holds a run" in one_sentence(run_main(script, capsys, "--run-dir", folder, *tiny(script)))
        assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_goes_on_with_an_option_that_a_researcher_has_added_since(run):
    script, folder = run
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    del saved["args"]["tau"]  # as if it were new
    torch.save(saved, folder / "checkpoint.pt")
    assert train(script, resumed_args(script, folder, total_timesteps=800))["env_steps"] == 800


def test_foreign_files_in_a_runs_folder_survive_and_disturb_nothing(run, capsys):
    script, folder = run
    foreign = [folder / name for name in (".DS_Store", "x.tmp", "400_backup/policy.pt", "notes.json")]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    assert run_main(script, capsys, "--resume", folder, "--total-timesteps", STEPS + 40)[0] == 0
    assert run_main(script, capsys, "--evaluate", folder)[0] == 0
    assert all(path.read_bytes() == b"mine" for path in foreign)


# --- Going on ---


@pytest.mark.parametrize(
    "change", ["--alpha 0.5", "--epsilon-finish 0.3", "--learning-rate 0.01", "--batch-size 4", "--seed 2", "--tau 0.5"]
)
def test_a_run_does_not_go_on_with_another_algorithm(finished, change, capsys):
    """It says so, and not that it has made its steps: with more of them it would be refused all the same."""
    script, folder = finished
    option, value = change.split()
    if not hasattr(script.Args, name := option[2:].replace("-", "_")):
        pytest.skip("not an option of this script")
    sentence = one_sentence(run_main(script, capsys, "--resume", folder, option, value))
    assert sentence.startswith(f"error: {name} is {value}, but was ")
    assert str(folder) in sentence


def test_of_several_options_that_differ_the_first_is_named(finished, capsys):
    script, folder = finished
    changes = ["--tau", 0.5, "--seed", 2, "--gamma", 0.5, "--learning-rate", 0.01]
    assert "error: gamma is" in one_sentence(run_main(script, capsys, "--resume", folder, *changes))


def test_a_finished_run_goes_on_with_more_steps_only(run, capsys):
    script, folder = run
    sentence = one_sentence(run_main(script, capsys, "--resume", folder))
    assert f"has made its {STEPS} steps: give more --total-timesteps" in sentence
    config = (folder / "config.json").read_bytes()
    assert run_main(script, capsys, "--resume", folder, "--total-timesteps", STEPS + 40)[0] == 0
    assert (folder / "config.json").read_bytes() == config
    assert config_of(folder, f"resumed_{STEPS}")["args"]["total_timesteps"] == STEPS + 40
    assert config_of(folder, "summary")["env_steps"] == STEPS + 40
    assert config_of(folder, "summary")["args"]["batch_size"] == 8  # what was not given is as it was


def test_a_run_that_lacks_only_its_summary_is_completed(run, capsys):
    """It was killed after its last checkpoint, or its last test failed."""
    script, folder = run
    summary, rows = config_of(folder, "summary"), read_metrics(folder)
    (folder / "summary.json").unlink()
    assert run_main(script, capsys, "--resume", folder)[0] == 0
    again, timed = config_of(folder, "summary"), ("sps", "seconds")
    for name in timed:
        assert [again.pop(name) > 0, summary.pop(name) > 0] == [True, True]
    for name in ("resume", "run_dir"):
        again["args"].pop(name), summary["args"].pop(name)
    assert again == summary
    ours = [{name: value for name, value in row.items() if name not in timed} for row in read_metrics(folder)]
    assert ours == [{name: value for name, value in row.items() if name not in timed} for row in rows]


@pytest.mark.parametrize("others", [("--evaluate",), ("--run-dir",)], ids=lambda options: options[0])
def test_a_run_has_one_folder(finished, others, capsys):
    """Even if both options name the same one."""
    script, folder = finished
    options = [text for option in ("--resume", *others) for text in (option, folder)]
    assert "exclude each other" in one_sentence(run_main(script, capsys, *options, "--total-timesteps", 2 * STEPS))


@over(SCRIPTS + FOP)
@pytest.mark.parametrize("option", ["--resume", "--evaluate", "--run-dir"])
def test_an_empty_path_starts_nothing(script, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "empty" in one_sentence(run_main(script, capsys, option, "", *tiny(script)))
    assert not list(tmp_path.iterdir())


def spoil(path, damage: str) -> None:
    """Make this checkpoint or policy one that does not fit."""
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        path.write_text("policy")
    elif damage == "missing":
        path.unlink()
    elif damage == "a flipped byte":  # which the unpickler does not see
        content = bytearray(content)
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    elif damage == "foreign":
        torch.save({"weights": torch.ones(3)}, path)
    else:
        saved = torch.load(path, weights_only=True)
        if damage == "other sizes":
            saved["obs_size"] += 1
        if damage == "older version":
            saved["kind"] = saved["kind"].removesuffix(" 2")
        if damage == "another script's":
            saved["kind"] = "mappo_" + saved["kind"]
        torch.save(saved, path)


@pytest.mark.parametrize("kind", ["checkpoint", "policy"])
@pytest.mark.parametrize(
    "damage",
    ["truncated", "a flipped byte", "text", "missing", "foreign", "other sizes", "older version", "another script's"],
)
def test_files_that_do_not_fit_are_refused_in_one_sentence(run, kind, damage, capsys):
    script, folder = run
    spoil(folder / f"{kind}.pt", damage)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    options = ("--resume", folder, "--total-timesteps", 800) if kind == "checkpoint" else ("--evaluate", folder)
    sentence = one_sentence(run_main(script, capsys, *options))
    assert str(folder) in sentence
    assert {"other sizes": damage, "missing": "no such file"}.get(damage, "") in sentence
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_checkpoint_is_no_policy_and_a_policy_no_checkpoint(finished, capsys):
    script, folder = finished
    found = {"--evaluate": f"it is {script.__name__} checkpoint 2", "--resume": "there is no such file"}
    for option, name in (("--evaluate", "checkpoint.pt"), ("--resume", "policy.pt"), ("--resume", "checkpoint.pt")):
        sentence = one_sentence(run_main(script, capsys, option, folder / name, "--total-timesteps", 800))
        assert f"{found[option]}; give a folder with one." in sentence


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_run_goes_on_without_its_policy_and_writes_a_new_one(run, damage, capsys):
    script, folder = run
    spoil(folder / "policy.pt", damage)
    assert run_main(script, capsys, "--resume", folder, "--total-timesteps", 800)[0] == 0
    assert script.load(str(folder), "policy")["step"] == 800


# --- Time, disk, memory ---


@over(SCRIPTS)
def test_a_clock_set_back_makes_no_time_negative(script, tmp_path, monkeypatch, capsys):
    now = itertools.count(2_000_000_000, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    assert run_main(script, capsys, "--run-dir", tmp_path, *tiny(script))[0] == 0
    seconds, speeds = ([float(row[name]) for row in read_metrics(tmp_path, drop=())] for name in ("seconds", "sps"))
    assert sorted(seconds) == seconds
    assert 0 <= seconds[0] <= seconds[-1] < 60
    assert speeds[0] == 0
    assert min(speeds[1:]) > 0


def too_much_for_a_gpu():
    raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")


@over(SCRIPTS)
@pytest.mark.parametrize(
    "allocate",
    [too_much_for_a_gpu, lambda: torch.empty(10**15), lambda: np.empty(10**15)],
    ids=["GPU", "torch", "numpy"],
)
def test_running_out_of_memory_gets_one_sentence(script, allocate, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "update", lambda *_: allocate())
    code, output = run_main(script, capsys, "--run-dir", tmp_path / "run", *tiny(script))
    assert code == 1
    assert "error: out of memory; lower --num-envs" in output
    assert "Traceback" not in output


@over(SCRIPTS)
def test_other_errors_of_pytorch_are_not_hidden(script, tmp_path, monkeypatch, capsys):
    def update(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(script, "update", update)
    with pytest.raises(RuntimeError, match="illegal"):
        run_main(script, capsys, "--run-dir", tmp_path / "run", *tiny(script))


@pytest.mark.parametrize("name", ["checkpoint.pt", "policy.pt", "metrics.csv"])
def test_a_full_disk_leaves_the_older_files_intact(run, name, monkeypatch, capsys):
    script, folder = run
    before, path_class = (folder / name).read_bytes(), type(folder)
    save, write_text = torch.save, path_class.write_text

    def save_half(what, path):
        if path.name.startswith(name):
            path.write_bytes(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")
        save(what, path)

    def write_half(path, text):
        if path.name.startswith(name):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write_text(path, text)

    monkeypatch.setattr(torch, "save", save_half)
    monkeypatch.setattr(path_class, "write_text", write_half)
    code, output = run_main(script, capsys, "--resume", folder, "--total-timesteps", 800)
    assert code == 1
    assert f"{folder / name} cannot be written; no space or permission?" in output
    assert "Traceback" not in output
    assert (folder / name).read_bytes() == before
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("softqmix_smacv2", "--map terran_3_vs_2 --backend sim --eval-episodes 2 --batch-size 5000"),
        ("qmix_mpe", "--level simple --eval-episodes 2 --batch-size 5000"),
        ("softqmix_matrix", "--num-seeds 2 --eval-interval 4 --batch-size 4"),
        ("qmix_matrix", "--num-seeds 2 --eval-interval 4 --batch-size 4"),
    ],
)
def test_a_disk_that_is_full_for_tensorboard_too_gets_one_sentence(script, options, tmp_path):
    """No file may grow beyond 8,000 bytes."""
    options = ["--run-dir", tmp_path / "run", *options.split()]
    run = subprocess.run(
        [sys.executable, ROOT / f"{script}.py", *options], capture_output=True, text=True, timeout=120, cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)),
    )  # fmt: skip
    assert run.returncode == 1
    assert "error: " in run.stderr
    assert "File too large" in run.stderr or "no space or permission?" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_checkpoint(run, monkeypatch, capsys):
    script, folder = run
    monkeypatch.setattr(script, "td_lambda_targets", lambda reward, *rest: reward + math.nan)
    code, output = run_main(script, capsys, "--resume", folder, "--total-timesteps", 800)
    assert code == 1
    assert "not finite" in output
    assert "Traceback" not in output
    assert checkpoint_of(folder).counts[0] == STEPS
    assert all(value.isfinite().all() for value in checkpoint_of(folder).networks.values())


# --- Options ---


@over(SCRIPTS + FOP)
@pytest.mark.parametrize("option", ["--alpha 1e-50", "--learning-rate 1e-50", "--max-grad-norm 0", "--tau 0"])
def test_numbers_out_of_range_are_refused_by_their_own_name(script, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if not hasattr(script.Args, option.split()[0][2:].replace("-", "_")):
        pytest.skip("not an option of this script")
    sentence = one_sentence(run_main(script, capsys, *option.split()))
    assert sentence.startswith(f"error: {option.split()[0]} is ")
    assert not list(tmp_path.iterdir())


@over(SCRIPTS)
def test_a_single_test_episode_is_enough(script, tmp_path, capsys):
    """Its deviation is not a number."""
    assert run_main(script, capsys, "--run-dir", tmp_path, *tiny(script, eval_episodes=1))[0] == 0
    assert {row["return_std"] for row in read_metrics(tmp_path)} == {"nan"}
    assert math.isnan(config_of(tmp_path, "summary")["return_std"])
    code, output = run_main(script, capsys, "--evaluate", tmp_path)
    assert code == 0
    assert "+- nan" in output


@over(SCRIPTS)
def test_a_run_too_short_to_learn_says_so(script, tmp_path, monkeypatch, capsys):
    """The bar does all along, until the first update is made."""
    shown = []

    class Bar(script.tqdm):
        def set_postfix_str(self, text, *arguments, **settings):
            if "until the first update" in text:  # and not a test's result
                shown.append(text.split()[:3])
            super().set_postfix_str(text, *arguments, **settings)

    monkeypatch.setattr(script, "tqdm", Bar)
    options = tiny(script, total_timesteps=300, batch_size=128, buffer_size=200)
    code, output = run_main(script, capsys, "--run-dir", tmp_path / "short", *options)
    assert code == 0
    episodes = config_of(tmp_path / "short", "summary")["episodes"]
    assert shown[-1] == [str(episodes), "of", "128"]
    assert len(shown) == 300 // 4
    (told,) = [line for line in output.splitlines() if line.startswith("Nothing was learnt")]
    assert "the first update waits for 128 " in told
    assert f" and {episodes} were played" in told
    shown.clear()
    code, output = run_main(script, capsys, "--run-dir", tmp_path / "longer", *tiny(script))
    assert code == 0
    assert "Nothing was learnt" not in output
    assert 0 < len(shown) < 400 // 4


@over(SCRIPTS + FOP)
def test_a_script_without_its_environments_says_which_folder_it_needs(script, tmp_path):
    shutil.copy(ROOT / f"{script.__name__}.py", tmp_path)
    run = subprocess.run([sys.executable, tmp_path / f"{script.__name__}.py"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == f"error: The folder envs/ must stand beside {script.__name__}.py: copy it, too.\n"


@over(SCRIPTS)
def test_the_users_settings_of_openmp_win(script, tmp_path):
    (tmp_path / "numpy.py").write_text(
        "import os\nprint(os.environ['OMP_NUM_THREADS'], os.environ['OMP_WAIT_POLICY'], flush=True)\nos._exit(0)\n"
    )
    unset = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    unset["PYTHONPATH"] = str(tmp_path)
    own = {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE"}
    outputs = [start(script, env=variables).communicate()[0] for variables in (unset, unset | own)]
    assert outputs == ["1 PASSIVE\n", "7 ACTIVE\n"]


def test_a_name_in_another_alphabet_than_the_locales_does_no_harm(tmp_path):
    script, environment = MPE[0], os.environ | {"LC_ALL": "C"}
    process = start(
        script, "--exp-name", "größe_大きさ", *tiny(script, total_timesteps=4), cwd=tmp_path, env=environment
    )
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    (folder,) = tmp_path.glob("runs/*größe_大きさ*")
    assert checkpoint_of(folder).counts[0] == 4


def test_a_name_that_python_cannot_spell_gets_one_sentence(tmp_path):
    """TensorBoard could not either."""
    script, environment = SMACV2[1], os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = start(script, "--exp-name", "größe", *tiny(script), cwd=tmp_path, env=environment)
    output = process.communicate(timeout=120)[0]
    assert one_sentence((process.returncode, output)).startswith("error: --exp-name is 'gr")
    assert not list(tmp_path.iterdir())


# --- Weights & Biases ---


def installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def test_tracking_without_the_package_starts_nothing(finished, tmp_path, monkeypatch, capsys):
    script, _ = finished
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install wandb" in one_sentence(run_main(script, capsys, "--track", *tiny(script)))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not installed("wandb"), reason="needs the package wandb")
def test_a_tracked_run_has_the_name_of_its_folder(tmp_path):
    """And its options; offline, so that it can be sent later."""
    script = MPE[0]
    options = tiny(script, total_timesteps=8)
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    process = start(script, "--track", "--run-dir", tmp_path / "my_run", *options, cwd=tmp_path, env=environment)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    (record,) = tmp_path.glob("wandb/offline-run-*-my_run/run-my_run.wandb")
    assert b"eval/return_mean" in record.read_bytes()
    assert json.loads((tmp_path / "my_run" / "config.json").read_text())["args"]["track"] is True
