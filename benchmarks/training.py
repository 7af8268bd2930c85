"""End-to-end speed of the training scripts at the paper's settings, and where the time goes.

    python benchmarks/training.py                                              # Soft-QMIX and QMIX, a minute each
    python benchmarks/training.py --scripts mappo_smacv2 hasac_smacv2 --maps terran_5_vs_5 --num-envs 8
    python benchmarks/training.py --scripts softqmix_smacv2 --num-envs 64 --full-replay --seconds 480
    python benchmarks/training.py --scripts softqmix_smacv2 --maps protoss_5_vs_5 protoss_10_vs_10 --num-envs 4 16 64

Trains with the script's own train(), with a clock around its parts, between two updates: the first one after the
warm-up, and the first one --seconds later. The time for 10M steps, the paper's run, is extrapolated from that. With
Soft-QMIX and QMIX an update follows every 4 episodes whatever the number of environments, so that more of them save
acting, not learning. With MAPPO sampling is making a batch of the rollout, an update is all passes over it, and
--full-replay has no meaning; the paper has 8 environments for it and for HASAC. Tests and checkpoints come at the
scripts' default intervals: a short measurement sees no checkpoint. "the rest" is recording and storing episodes, and
the loop itself. On a machine shared with others, processor time tells more than the clock. Unless --full-replay is
given, the replay is far from full; sampling takes as long, only memory grows. On a GPU every part is waited for, so
that it is charged to itself: training without the clock is a little faster.
"""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.options import too_low, wrong_json, wrong_maps

SCRIPTS = ("softqmix_smacv2", "qmix_smacv2", "softqmix_mpe", "qmix_mpe")
Script = Literal[(*SCRIPTS, "mappo_smacv2", "fop_smacv2", "hasac_smacv2")]


@dataclass
class Args:
    scripts: tuple[Script, ...] = SCRIPTS  # which ones
    maps: tuple[str, ...] = ("protoss_5_vs_5",)  # of the SMACv2 scripts, played on the simulator
    levels: tuple[Literal["simple", "medium", "hard"], ...] = ("hard",)  # of the MPE scripts
    num_envs: tuple[int, ...] = (4,)  # environments at a time
    seconds: float = 60.0  # measured, after the warm-up
    warm_up: float = 20.0  # seconds before
    full_replay: bool = False  # let the warm-up last until the replay is full, if that comes later
    threads: int = 2  # of PyTorch and of the simulator on the CPU; the scripts take one
    cuda: bool = True  # use the GPU if there is one
    json: str | None = None  # also write the figures to this file


def measure(name: str, place: str, num_envs: int, args: Args) -> dict:
    """Train for the given time in this process, which is spoilt by it."""
    script = importlib.import_module(name)
    if "smacv2" in name:
        environment, settings = script.SMACv2Sim, {"map": place, "backend": "sim"}
    else:
        environment, settings = script.Spread, {"level": place}
    cuda = args.cuda and torch.cuda.is_available()
    if name == "hasac_smacv2":
        sampling = script.Replay, "sample"
    else:
        sampling = script, "make_batch" if name == "mappo_smacv2" else "sample_batch"
    parts = {
        "acting": (script, "act"), "environment": (environment, "step"), "sampling": sampling,
        "learning": (script, "update"), "logging": (script.SummaryWriter, "add_scalar"),
        "tests": (script, "evaluate"), "files": (script, "write"),
    }  # fmt: skip
    spent, calls = dict.fromkeys(parts, 0.0), dict.fromkeys(parts, 0)
    busy, stop, marks = threading.Lock(), threading.Event(), []
    stored = None if name == "mappo_smacv2" else 0  # which has no replay

    def clock(part: str, function):
        def timed(*arguments, **options):
            nonlocal stored
            if not busy.acquire(blocking=False):  # inside of another part, which is charged for it
                return function(*arguments, **options)
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                if cuda:
                    torch.cuda.synchronize()
                spent[part] += time.perf_counter() - start
                calls[part] += 1
                busy.release()
                if part == "sampling" and stored is not None:
                    stored = arguments[0].size * num_envs if name == "hasac_smacv2" else len(arguments[0])
                if part == "learning":
                    mark()

        return timed

    def mark():
        """After an update: does the measurement begin or end here? More updates can follow in the same step."""
        now = time.perf_counter()
        full = stored is None or stored > options.buffer_size - num_envs  # HASAC's is a multiple of num_envs
        warm = now > began + args.warm_up and (full or not args.full_replay)
        if not stop.is_set() and (now > marks[0][0] + args.seconds if marks else warm):
            marks.append((now, time.process_time(), calls["acting"], calls["learning"], *spent.values()))
            if len(marks) == 2:
                stop.set()

    for part, (owner, function) in parts.items():
        setattr(owner, function, clock(part, getattr(owner, function)))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as messages:
        options = script.Args(**settings, cuda=args.cuda, num_envs=num_envs, run_dir=f"{folder}/run")
        began = time.perf_counter()
        with contextlib.redirect_stdout(messages), contextlib.suppress(KeyboardInterrupt):
            script.train(options, stop)
    seconds, processor, acted, updates, *times = (b - a for a, b in zip(*marks, strict=True))
    spent, steps = dict(zip(parts, times, strict=True)), acted * num_envs
    return {
        "script": name, "place": place, "num_envs": num_envs, "seconds": seconds, "steps": steps, "updates": updates,
        "steps/s": steps / seconds, "steps per processor second": steps / processor,
        "minutes for 10M steps, extrapolated": 1e7 / (steps / seconds) / 60,
        "episodes in the replay (HASAC: steps)": stored,
        "peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "GPU memory, MB": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
        "ms of acting per step of all environments": 1000 * spent["acting"] / acted if acted else None,
        "ms of sampling and learning per update": 1000 * (spent["sampling"] + spent["learning"]) / updates,
        "percent": {part: 100 * t / seconds for part, t in spent.items()}
        | {"the rest": 100 * (1 - sum(times) / seconds)},
    }  # fmt: skip


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    numbers = {"seconds": ([args.seconds], 1), "warm_up": ([args.warm_up], 0), "num_envs": (args.num_envs, 1)}
    if error := too_low(**numbers, threads=([args.threads], 1)) or wrong_maps(args.maps) or wrong_json(args.json):
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), str(args.threads))  # of measuring processes
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the scripts
    name = torch.cuda.get_device_name() if args.cuda and torch.cuda.is_available() else f"{platform.machine()} CPU"
    print(f"{name}, {os.cpu_count()} cores, {args.threads} threads, torch {torch.__version__}")
    results = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for script in args.scripts:
            for place, num_envs in product(args.maps if "smacv2" in script else args.levels, args.num_envs):
                row = pool.apply(measure, (script, place, num_envs, args))
                results.append(row)
                print(f"\n{script}, {place}, {num_envs} environments: {row['steps']} steps in {row['seconds']:.0f} s")
                for key in list(row)[6:-1]:
                    if row[key] is not None:
                        print(f"  {key:44}{row[key]:9.1f}")
                print("  percent of the time: ", ", ".join(f"{p} {share:.1f}" for p, share in row["percent"].items()))
    if args.json:
        Path(args.json).write_text(json.dumps({"device": name, "args": asdict(args), "results": results}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
