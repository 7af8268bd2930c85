"""The paper's experiments, and your own: what is left to do, and doing it on this machine or on a Ray cluster.

    python experiments.py figure3                          # what is left to do, with the hours it will take
    python experiments.py figure3 --run --workers 2        # here, two runs at a time
    python experiments.py figure3 --run --ray auto         # on a Ray cluster; pip install -r requirements-ray.txt
    python experiments.py table4 --places zerg_5_vs_5 --algorithms qmix softqmix --seeds 1 2 --total-timesteps 500000
    python experiments.py custom --scripts softqmix_smacv2 --places zerg_5_vs_5 --seeds 1 2 3 --vary alpha 0.01 0.03 0.1

A run is known by what it computes: algorithm, options, game and seed, as any config.json below --folder says. Call it
again after an interruption, or with more steps or seeds: finished runs are skipped, unfinished ones resumed from their
checkpoint, and those that another process trains in are left alone. Nothing is ever deleted. Ctrl-C, SIGTERM and SIGHUP
stop all runs, each with a checkpoint; they end like that, too, if this process or its machine's Ray is killed. Each
run's messages are in FOLDER/{name}.log. Then: python plot.py FOLDER.

On a cluster, this folder and --folder must be on storage that all nodes see under the same path, with the same Python
environment. Each run is a task with --cpus and --gpus of its own; when a node dies, another goes on from the run's last
checkpoint, so choose --checkpoint-interval by what you can lose.
"""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback, during the imports, too

import contextlib
import csv
import dataclasses
import importlib
import io
import json
import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import count, product
from pathlib import Path

import tyro
from filelock import FileLock

ROOT = Path(__file__).resolve().parent
FIVE = ("protoss_5_vs_5", "terran_5_vs_5", "zerg_5_vs_5")
TEN = ("protoss_10_vs_10", "terran_10_vs_10", "zerg_10_vs_10")
PLACE = {"smacv2": "map", "mpe": "level", "matrix": "payoff"}  # the option that says where a script's runs play
EXPERIMENTS = {  # where, environment steps, and for each algorithm its command and the number of seeds
    "table2": (("table1",), 10_000, {
        "softqmix": ("softqmix_matrix.py --num-seeds 64", 1),
        "fop": ("fop_matrix.py --num-seeds 64", 1),
        "qmix": ("qmix_matrix.py --num-seeds 64", 1),
    }),
    "table3": (("hard", "medium", "simple"), 10_000_000, {
        "qmix": ("qmix_mpe.py", 5),
        "softqmix_0.1": ("softqmix_mpe.py --alpha 0.1", 5),
        "softqmix_0.3": ("softqmix_mpe.py --alpha 0.3", 5),
        "softqmix_1.0": ("softqmix_mpe.py --alpha 1.0", 5),
    }),
    "table4": (FIVE, 10_050_000, {
        "qmix": ("qmix_smacv2.py", 3),
        "entropy": ("softqmix_smacv2.py --no-use-g --no-use-f", 3),
        "function_f": ("softqmix_smacv2.py --no-use-g", 3),
        "softqmix": ("softqmix_smacv2.py", 3),
    }),
    "figure3": (FIVE + TEN, 10_050_000, {
        "softqmix": ("softqmix_smacv2.py", 5),
        "qmix": ("qmix_smacv2.py", 5),
        "mappo": ("mappo_smacv2.py --anneal-steps 10050000", 5),  # of the whole run, so that a shorter one can go on
        "fop": ("fop_smacv2.py", 5),
        "hasac": ("hasac_smacv2.py", 3),
    }),
    "custom": ((), None, {}),  # by --scripts, --places, --seeds, --vary
}  # fmt: skip
# Hours of one core per million steps, and how much longer 5, 10, 20 a side take: an AMD EPYC (Zen 2), 2026-11-24,
# OMP_NUM_THREADS=1 python benchmarks/training.py --threads 1 --seconds 40 (docs/performance.md). MPE: with two threads,
# both counted; the growth is Soft-QMIX's; matrix games: 64 seeds at two weights, 2026-11-22 (results/matrix.md), FOP's
# on an Intel Xeon, 2026-11-26. MAPPO, FOP, HASAC: docs/mappo.md, docs/fop.md, docs/hasac.md, 2026-11-25.
HOURS = {"softqmix_smacv2": 0.69, "qmix_smacv2": 0.45, "softqmix_mpe": 0.64, "qmix_mpe": 0.46}
HOURS |= {"softqmix_matrix": 2.2, "qmix_matrix": 2.2, "fop_matrix": 7.3}
HOURS |= {"mappo_smacv2": 0.3, "fop_smacv2": 0.9, "hasac_smacv2": 7.5}
GROWTH = {5: 1.0, 10: 2.2, 20: 6.5}
# What a run's process does before it becomes the script: it will stop itself (SIGTERM, so with a checkpoint) as soon as
# its standard input ends, because the process that started it closes it or is no more.
CHILD = """
import os, runpy, signal, sys, threading
if child := os.fork():  # Ray kills the children of a process that ends, but not their children
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)
def watch():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=watch, daemon=True).start()
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass
class Args:
    experiment: tyro.conf.Positional[str]  # table2, table3, table4, figure3 or custom
    run: bool = False  # do it; without, only say what is left to do
    print: bool = False  # print the commands that are left to do, for a batch system of your own, and stop
    workers: int = 1  # runs at a time on this machine, each with one thread (or the environment's OMP_NUM_THREADS)
    ray: str | None = None  # run on the Ray cluster at this address instead; auto: the one this machine belongs to
    cpus: int = 1  # of each run on the cluster
    gpus: float = 0.0  # of each run on the cluster; 0.5: two share one, which gains much with NVIDIA's MPS only
    memory: float = 0.0  # GB of each run on the cluster, which bounds the runs of a node; such as of StarCraft II's
    algorithms: tuple[str, ...] = ()  # instead of all of the experiment's
    scripts: tuple[str, ...] = ()  # of a custom experiment
    places: tuple[str, ...] = ()  # maps, levels or payoffs, instead of the experiment's
    seeds: tuple[int, ...] = ()  # instead of the experiment's, which begin with 1
    vary: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()  # an option and its values; again: combinations
    total_timesteps: int | None = None  # environment steps of each run, instead of the experiment's
    eval_interval: int | None = None  # environment steps between tests, instead of the scripts'
    checkpoint_interval: int | None = None  # environment steps between checkpoints, instead of the scripts'
    backend: str | None = None  # as for the scripts
    folder: str = "runs"  # where runs are looked for, and new ones go


class InputError(ValueError):
    """Something the user can put right, told in one sentence: exit code 2, no traceback."""


@dataclass
class Run:
    script: str
    words: list[str]  # the options that start it
    more: list[str]  # the options that it gets when it is resumed, too
    options: dict  # all of them, as the script will use them
    steps: int
    identity: str  # what it computes
    folder: Path
    state: str = "new"  # or finished, unfinished, in use

    def command(self) -> list[str]:
        """What resumes or starts it, as things stand now; a folder that cannot be resumed is left as it is."""
        script = str(ROOT / f"{self.script}.py")
        if (self.folder / "checkpoint.pt").exists():
            return [script, "--resume", str(self.folder), *self.more]
        self.folder = unused(self.folder)
        return [script, *self.words, "--run-dir", str(self.folder), *self.more]

    def progress(self) -> tuple[int, str, float]:
        """Step, result, and steps per second by those of the last ten tests that found updates made; 0: unknown."""
        try:
            rows = list(csv.DictReader((self.folder / "metrics.csv").read_text().splitlines()))
            own = (None, str(self.options.get("td_weight")))  # a matrix script's file has the rows of weight 1, too
            rows = [row for row in rows if row.get("td_weight") in own][-10:]
            name = next(name for name in ("win_rate", "success_rate", "return_mean") if name in rows[-1])
            result = f"{name.removesuffix('_mean').replace('_', ' ')} {float(rows[-1][name]):.2f}"
            step, first = int(rows[-1]["step"]), next((row for row in rows if row.get("updates") != "0"), rows[-1])
            seconds = float(rows[-1].get("seconds", 0)) - float(first.get("seconds", 0))
            return step, result, (step - int(first["step"])) / seconds if seconds > 0 else 0.0
        except (OSError, ValueError, KeyError, IndexError, StopIteration):
            return 0, "", 0.0

    def hours(self) -> float | None:
        """Left to do: by its own pace, or one core's by the table."""
        step, _, rate = self.progress()
        if self.state == "finished":
            return 0.0
        if rate:
            return max(0, self.steps - step) / rate / 3600
        sizes = [int(word) for word in self.options.get("map", "").split("_") if word.isdigit()]
        growth = next((GROWTH[size] for size in GROWTH if max(sizes, default=0) <= size), GROWTH[20])
        return HOURS[self.script] * growth * max(0, self.steps - step) / 1e6 if self.script in HOURS else None

    def line(self) -> str:
        """Step, result, steps per second, hours left, name."""
        step, result, rate = self.progress()
        hours, pace = self.hours(), f"{rate:,.0f}/s" if rate else ""
        left = "" if self.state == "finished" else "? h left" if hours is None else f"{hours:.1f} h left"
        game = self.options.get("env") or self.options.get("backend")  # another game's name, where there is one
        game = f" ({game})" if game else ""
        return f"{step:>10,}/{self.steps:<10,} {result:17} {pace:>7} {left:>12}  {self.folder.name}{game}"


# --- Which runs there are, and how far they are -----------------------------------------------------------------------
def option(name: str, value: str, field: dataclasses.Field) -> list[str]:
    """The words that give a script this option."""
    if field.type is not bool:
        try:
            return [f"--{name.replace('_', '-')}", *shlex.split(value)]
        except ValueError:
            raise InputError(f"--vary {name} has {value!r}, a quotation without an end.") from None
    if value not in ("True", "False"):
        raise InputError(f"--vary {name} has {value!r}; it must be True or False.")
    return [f"--{'' if value == 'True' else 'no-'}{name.replace('_', '-')}"]


def ignored(script) -> set[str]:
    """Options that do not change what a run of this script computes."""
    return getattr(script, "MAY_CHANGE", {"run_dir"}) | {"exp_name"}


def identity(script, game: str | list | None, options: dict) -> str:
    """What a run of this script computes, as text to compare."""
    options = {name: value for name, value in options.items() if name not in ignored(script)}
    return json.dumps([script.__name__, game, options], sort_keys=True)


def check(script, words: list[str]) -> tuple[dict, str | list | None]:
    """The script's options as it will use them, and what they do not say of the game: the simulator's version, or the
    payoff itself, as a file may change; InputError if it would refuse them."""
    name = f"{script.__name__}.py"
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
            args = tyro.cli(script.Args, args=words)
            prepared = script.prepare(args)
    except SystemExit:
        raise InputError(f"{name} does not take {shlex.join(words)}: see python {name} --help.") from None
    except script.InputError as error:
        raise InputError(f"{name}: {error}") from None
    options = json.loads(json.dumps(asdict(args)))
    if not isinstance(prepared, tuple):  # None or a payoff
        return options, prepared if prepared is None else prepared.tolist()
    for env in prepared[:2]:
        env.close()  # which may have processes of its own
    return options, prepared[0].about.get("simulator_version")


def plan(args: Args) -> tuple[list[Run], list[str]]:
    """The experiment's runs, seed by seed, and the scripts that do not exist; InputError for what is impossible."""
    if args.experiment not in EXPERIMENTS:
        raise InputError(f"There is no experiment {args.experiment!r}: choose of {', '.join(EXPERIMENTS)}.")
    for name, low in (
        ("workers", 1),
        ("cpus", 1),
        ("gpus", 0),
        ("memory", 0),
        ("total_timesteps", 1),
        ("eval_interval", 1),
        ("checkpoint_interval", 1),
    ):
        if (value := getattr(args, name)) is not None and not low <= value:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least {low}.")
    if Path(args.folder).exists() and not Path(args.folder).is_dir():
        raise InputError(f"--folder {args.folder} is a file: give a folder, which need not exist yet.")
    if (args.experiment == "custom") != bool(args.scripts):
        raise InputError(
            "A custom experiment, and no other, needs --scripts: python experiments.py custom --scripts ..."
        )
    if wrong := [name for name in args.scripts if Path(name).parent != Path() and Path(name).resolve().parent != ROOT]:
        raise InputError(f"--scripts has {wrong[0]!r}; scripts are those beside experiments.py: copy it to yours.")
    places, steps, algorithms = EXPERIMENTS[args.experiment]
    algorithms = algorithms | {Path(name).stem: (name, 1) for name in args.scripts}
    if unknown := [name for name in args.algorithms if name not in algorithms]:
        raise InputError(f"{args.experiment} has no algorithm {unknown[0]!r}: choose of {', '.join(algorithms)}.")
    vary, rule = {}, "give an option and all of its values after one --vary."
    if () in args.vary:
        raise InputError(f"--vary names no option: {rule}")
    for word, *values in args.vary:
        if (name := word.replace("-", "_")) in vary:
            raise InputError(f"--vary is given twice for {name}: {rule}")
        vary[name] = values
    if empty := [name for name, values in vary.items() if not values]:
        raise InputError(f"--vary {empty[0]} has no values: --vary {empty[0]} VALUE VALUE ...")
    own = {"seed": "seeds", "total_timesteps": "total-timesteps"} | dict.fromkeys(PLACE.values(), "places")
    if wrong := [name for name in vary if name in own]:
        raise InputError(f"--vary does not take {wrong[0]}: give --{own[wrong[0]]} instead.")
    vary |= {"backend": (args.backend,)} if args.backend else {}
    runs, missing, used = {}, [], set()
    for algorithm in args.algorithms or algorithms:
        (file, *fixed), seeds = algorithms[algorithm][0].split(), algorithms[algorithm][1]
        name, place_option = Path(file).stem, PLACE.get(Path(file).stem.rpartition("_")[2])
        if not place_option or not (ROOT / f"{name}.py").exists():
            missing.append(f"{name}.py")
            continue
        try:
            script = importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise InputError(f"{name}.py needs the package {error.name}: pip install -r requirements.txt") from None
        known = {field.name: field for field in dataclasses.fields(script.Args)}
        varied = {key: values for key, values in vary.items() if key in known}
        used |= varied.keys()
        if wrong := sorted(varied.keys() & ignored(script)):
            raise InputError(f"--vary does not take {wrong[0]}, which makes no other run: leave it out.")
        more = ["--total-timesteps", str(args.total_timesteps or steps or known["total_timesteps"].default)]
        for key in ("eval_interval", "checkpoint_interval"):
            if (interval := getattr(args, key)) and key in known:
                more += [f"--{key.replace('_', '-')}", str(interval)]
        where = args.places or places or (known[place_option].default,)
        for seed, place, *values in product(args.seeds or range(1, seeds + 1), where, *varied.values()):
            chosen = dict(zip(varied, values, strict=True))
            words = [*fixed, f"--{place_option}", place, "--seed", str(seed)]
            words += [word for key, value in chosen.items() for word in option(key, value, known[key])]
            options, game = check(script, words + more)
            words += ["--backend", options["backend"]] if "backend" in options and "backend" not in chosen else []
            others = (f"{k}={v}" for k, v in chosen.items() if k not in ("backend", "env"))
            label = [chosen.get("env", Path(place).stem), algorithm, *others, str(seed)]  # another game has no level
            folder = Path(args.folder, "__".join(label).replace("/", "-").replace(" ", "-"))
            same = identity(script, game, options)
            runs.setdefault(same, Run(name, words, more, options, options["total_timesteps"], same, folder))
    if not runs or (args.scripts and missing):
        there = sorted(path.name for kind in PLACE for path in ROOT.glob(f"*_{kind}.py"))
        raise InputError(f"There is no script {' and no '.join(missing)}: choose of {', '.join(there)}.")
    if unknown := [name for name in vary if name not in used]:
        raise InputError(f"No script of this experiment has an option --{unknown[0].replace('_', '-')}: leave it out.")
    return sorted(runs.values(), key=lambda run: run.options["seed"]), missing


def unused(folder: Path, taken=()) -> Path:
    """This folder, or the first of FOLDER-2, FOLDER-3, ... that neither exists nor is taken."""
    names = (folder.with_name(f"{folder.name}-{number}") if number > 1 else folder for number in count(1))
    return next(name for name in names if name not in taken and not name.exists())


def locked(folder: Path, patience: float = 0) -> bool:
    """Whether another process trains in this folder, after waiting some seconds for it to end."""
    if not (folder / "run.lock").exists():
        return False
    try:
        with FileLock(folder / "run.lock").acquire(timeout=patience):
            return False
    except OSError:  # a timeout, too
        return True


def state_of(folder: Path, steps: int) -> str:
    """How far a folder that holds a run is: new, if it cannot be resumed."""
    file = folder / "summary.json"
    try:
        if json.loads(file.read_text()).get("env_steps", steps) >= steps:
            return "finished"
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, AttributeError):
        raise InputError(f"{file} is damaged or not of such a run: move it away.") from None
    return "in use" if locked(folder) else "unfinished" if (folder / "checkpoint.pt").exists() else "new"


def find(runs: list[Run], folder: str) -> None:
    """Give each run the folder that holds it, the most advanced if there are several, and its state."""
    wanted, holders = {run.script: importlib.import_module(run.script) for run in runs}, defaultdict(list)
    for file in sorted(Path(folder).rglob("config.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # not of such a run
            config = json.loads(file.read_text())
            script = wanted[config.get("algorithm", config["args"]["exp_name"])]
            game = config.get("simulator_version") or config.get("payoff")
            holders[identity(script, game, config["args"])].append(file.parent)
    taken = set()
    for run in runs:
        order, best = ["new", "unfinished", "in use", "finished"], (0, 0)
        for place in holders[run.identity]:
            there = dataclasses.replace(run, folder=place, state=state_of(place, run.steps))
            if (rank := (order.index(there.state), there.progress()[0])) > best and there.state != "new":
                run.folder, run.state, best = there.folder, there.state, rank
        if run.state == "new":  # what has its name is something else, or cannot be resumed
            run.folder = unused(run.folder, taken)
            taken.add(run.folder)


# --- Doing what is left -----------------------------------------------------------------------------------------------
def work(run: Run, threads: int | str, cwd: str, patience: float = 0, stop: threading.Event | None = None) -> str:
    """Train one run, or the rest of it; what became of it. However this ends, the run ends with it."""
    if stop and stop.is_set():
        return "not begun"
    if locked(run.folder, patience):
        return "left alone, since another process trains in it"
    if state_of(run.folder, run.steps) == "finished":  # by another process, since this one looked
        return "finished"
    command = run.command()
    log = run.folder.with_name(f"{run.folder.name}.log")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    how = {"stdin": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True, "cwd": cwd}
    try:
        output = open(log, "ab")  # noqa: SIM115
    except OSError as error:
        return f"not begun, since {log} cannot be written ({error.strerror})"
    with output:
        child = subprocess.Popen([sys.executable, "-c", CHILD, *command], env=environment, stdout=output, **how)
    try:
        while child.poll() is None and not (stop and stop.is_set()):
            time.sleep(0.2)
    finally:
        child.stdin.close()  # see CHILD
        code = child.wait()
    if code in (0, 130, 128 + signal.SIGTERM):  # the last: before the script was ready for it
        return "finished" if code == 0 else "stopped"
    return f"exit code {code}, see {log}: {' '.join(log.read_text(errors='replace').splitlines()[-1:])}"


def watch(pending: dict, ended, stop: threading.Event) -> int:
    """Show how far runs {future: run} are until `ended`, {future: what became of it}, has had all; the exit code."""
    runs, outcomes, shown, reported, live = len(pending), [], 0, time.monotonic(), sys.stdout.isatty()
    while pending:
        for future, outcome in ended(list(pending)).items():
            print(f"\033[{shown}F\033[J" * (shown > 0) + f"{outcome}: {pending.pop(future).folder}", flush=True)
            outcomes, shown = [*outcomes, outcome], 0
        size, begun = shutil.get_terminal_size(), [run for run in pending.values() if run.folder.exists()]
        lines = [run.line() for run in begun][: max(1, size.lines - 3)]
        lines.append(f"{len(outcomes)} of {runs} runs have ended{', the others are told to stop' * stop.is_set()}")
        if live:
            print(
                f"\033[{shown}F\033[J" * (shown > 0) + "\n".join(line[: size.columns - 1] for line in lines), flush=True
            )
            shown = len(lines)
        elif time.monotonic() - reported >= 60:
            print("; ".join([time.strftime("%H:%M"), *reversed(lines)]), flush=True)
            reported = time.monotonic()
        time.sleep(0.2) if stop.is_set() else stop.wait(1)
    return 130 if stop.is_set() else int(set(outcomes) != {"finished"})


def stop_on_signals() -> threading.Event:
    stop = threading.Event()
    for signum in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(signum, lambda *_: stop.set())
    return stop


def run_here(runs: list[Run], args: Args) -> int:
    stop, threads = stop_on_signals(), os.environ.get("OMP_NUM_THREADS", "1")
    with ThreadPoolExecutor(args.workers) as pool:
        pending = {pool.submit(work, run, threads, os.getcwd(), stop=stop): run for run in runs}
        try:
            return watch(
                pending, lambda futures: {future: future.result() for future in futures if future.done()}, stop
            )
        finally:
            stop.set()  # whatever went wrong, no run goes on unseen


def run_on_ray(runs: list[Run], args: Args) -> int:
    try:
        import ray

        if args.ray != "auto":  # Ray itself tries for minutes
            host, _, port = args.ray.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=args.ray, log_to_driver=False, logging_level="ERROR")
    except ImportError:
        raise InputError("--ray needs the package ray: pip install -r requirements-ray.txt") from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"--ray {args.ray}: no cluster answers; begin one with ray start --head ({reason})") from None
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= args.cpus and node.get("GPU", 0) >= args.gpus for node in nodes):
        print(f"No node has --cpus {args.cpus} and --gpus {args.gpus:g} yet: waiting for one.", flush=True)
    stop, cancelled = stop_on_signals(), set()
    for run in runs:
        run.folder = run.folder.resolve()
    needs = {"num_cpus": args.cpus, "num_gpus": args.gpus, "memory": args.memory * 1e9 or None}
    task = ray.remote(**needs, max_retries=20)(work)  # again, if its node dies
    pending = {}
    for run in runs:  # under the run's name in Ray's dashboard
        pending[task.options(name=run.folder.name).remote(run, args.cpus, os.getcwd(), patience=600)] = run

    def ended(refs: list) -> dict:
        for ref in set(refs) - cancelled if stop.is_set() else ():
            cancelled.add(ref)
            ray.cancel(ref)  # a KeyboardInterrupt in work(), which ends its run
        found = {}
        for ref in ray.wait(refs, num_returns=len(refs), timeout=0)[0]:
            try:
                found[ref] = ray.get(ref)
            except (ray.exceptions.RayError, KeyboardInterrupt) as error:
                found[ref] = "stopped" if stop.is_set() else f"lost ({str(error).splitlines()[0]})"
        return found

    try:
        return watch(pending, ended, stop)
    finally:
        ray.shutdown()


def describe(runs: list[Run], missing: list[str], workers: int) -> str:
    """What there is and what is left to do."""
    lines = [f"{run.state:10}{run.line()}" for run in runs]
    lines += [f"Left out, since there is no such script: {', '.join(missing)}."] if missing else []
    lines += [f"{run.folder} is left alone: another process trains in it." for run in runs if run.state == "in use"]
    hours = [run.hours() for run in runs if run.state in ("new", "unfinished")]
    total, cores = sum(left or 0 for left in hours), min(workers, os.cpu_count() or 1)
    finished = f"{sum(run.state == 'finished' for run in runs)} of {len(runs)} runs are finished"
    text = f"{total:.1f} hours of one core, {total / cores:.1f} hours here with --workers {workers}"
    unknown = f", and {hours.count(None)} runs whose hours nobody has measured" if None in hours else ""
    return "\n".join([*lines, f"{finished}, {len(hours)} are left to do: {text}{unknown}."])


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    try:
        runs, missing = plan(args)
        find(runs, args.folder)
        left = [run for run in runs if run.state in ("new", "unfinished")]
        if args.print:
            print("\n".join(shlex.join(["python", *run.command()]) for run in left))
            return 0
        print(describe(runs, missing, args.workers), flush=True)
        if not args.run or not left:
            return 0
        try:
            Path(args.folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=args.folder).close()  # an existing folder may be closed to us
        except OSError as error:
            raise InputError(f"--folder {args.folder} cannot be written ({error.strerror}): choose another.") from None
        return run_on_ray(left, args) if args.ray else run_here(left, args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
