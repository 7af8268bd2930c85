"""The runs of the paper's Figure 3 and Table 4, one process each, on the simulator or on StarCraft II.

    python benchmarks/smacv2.py --print                                    # only show the commands
    python benchmarks/smacv2.py --experiment figure3 --workers 2           # 6 maps, QMIX and Soft-QMIX, 5 seeds
    python benchmarks/smacv2.py --experiment table4 --workers 2            # 3 maps, 4 algorithms, 3 seeds
    python benchmarks/smacv2.py --maps terran_5_vs_5 --seeds 1 2 3 --total-timesteps 500000 --workers 2

Call it again after an interruption, or with more steps or seeds: finished runs are skipped, unfinished ones resumed.
Nothing is ever deleted: the folder of a run that was killed before its first checkpoint is yours to remove.
Then: python plot.py FOLDER. Each run leaves its messages in FOLDER/{name}.log.
"""

import importlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the scripts, which check the options
ALGORITHMS = {
    "qmix": ["qmix_smacv2.py"],
    "entropy": ["softqmix_smacv2.py", "--no-use-g", "--no-use-f"],  # Table 4's "+entropy"
    "function_f": ["softqmix_smacv2.py", "--no-use-g"],  # Table 4's "+function f"
    "softqmix": ["softqmix_smacv2.py"],
    "softqmix_vdn": ["softqmix_smacv2.py", "--mixer", "vdn"],  # the sum that the authors' released code computes
}
FIVE = ["protoss_5_vs_5", "terran_5_vs_5", "zerg_5_vs_5"]
TEN = ["protoss_10_vs_10", "terran_10_vs_10", "zerg_10_vs_10"]
EXPERIMENTS = {
    "figure3": (FIVE + TEN, ["qmix", "softqmix"], 5),
    "table4": (FIVE, ["qmix", "entropy", "function_f", "softqmix"], 3),
}


@dataclass
class Args:
    experiment: Literal["figure3", "table4"] = "figure3"
    """which maps, algorithms and number of seeds, unless given below"""
    maps: tuple[str, ...] = ()
    """instead of the experiment's"""
    algorithms: tuple[Literal["qmix", "entropy", "function_f", "softqmix", "softqmix_vdn"], ...] = ()
    """instead of the experiment's"""
    seeds: tuple[int, ...] = ()
    """instead of the experiment's"""
    total_timesteps: int = 10_050_000
    """environment steps of each run"""
    checkpoint_interval: int = 100_000
    """environment steps between checkpoints, from which a killed run goes on"""
    backend: Literal["auto", "starcraft2", "sim"] = "auto"
    """as for the scripts"""
    folder: str = "runs/smacv2"
    """where the run folders go"""
    workers: int = 1
    """processes at a time, each with an equal share of the cores"""
    print: bool = False
    """print the commands that are left to do, and stop"""


class InputError(ValueError):
    """Something the user can put right, told in one sentence: exit code 2, no traceback."""


def jobs(args: Args) -> dict[Path, list[str]]:
    """Each run's folder, and the words that start it; seed by seed."""
    maps, algorithms, seeds = EXPERIMENTS[args.experiment]
    wanted = product(args.seeds or range(1, seeds + 1), args.maps or maps, args.algorithms or algorithms)
    return {
        Path(args.folder) / f"{map_name}__{algorithm}__{seed}": [
            *ALGORITHMS[algorithm], "--map", map_name, "--backend", args.backend, "--seed", str(seed)
        ]
        for seed, map_name, algorithm in wanted
    }  # fmt: skip


def steps(args) -> list[str]:
    """The options that every run gets, new or resumed."""
    return ["--total-timesteps", str(args.total_timesteps), "--checkpoint-interval", str(args.checkpoint_interval)]


def command(args, run_dir: Path, start: list[str]) -> list[str] | None:
    """What starts or resumes the run, None if it is finished."""
    try:
        if json.loads((run_dir / "summary.json").read_text())["env_steps"] >= args.total_timesteps:
            return None
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{run_dir / 'summary.json'} is damaged or not of such a run: move it away.") from None
    options = [*start[1:], "--run-dir", str(run_dir)]
    if any(file.parent.name.isdigit() for file in run_dir.glob("checkpoints/*/training.pt")):
        options = ["--resume", str(run_dir)]
    return [sys.executable, str(ROOT / start[0]), *options, *steps(args)]


def commands_left(args, jobs: dict[Path, list[str]]) -> dict[Path, list[str]]:
    """The unfinished runs' commands; InputError if an option is impossible or a run folder would be overwritten."""
    if args.workers < 1:
        raise InputError(f"--workers is {args.workers}; it must be at least 1.")
    for start in jobs.values():  # seeds, maps and steps that the scripts would refuse one after the other
        script = importlib.import_module(start[0].removesuffix(".py"))
        try:
            script.check_args(tyro.cli(script.Args, args=[*start[1:], *steps(args)]))
        except script.InputError as error:
            raise InputError(str(error)) from None
    left = {run_dir: words for run_dir, start in jobs.items() if (words := command(args, run_dir, start))}
    occupied = [str(run_dir) for run_dir, words in left.items() if "--resume" not in words and run_dir.exists()]
    if occupied:
        cure = "move away or delete what is there, or choose another --folder"
        raise InputError(f"There is no checkpoint to go on from in {', '.join(occupied)}: {cure}.")
    return left


def run(words: list[str], threads: int, run_dir: Path) -> int:
    """Train; the exit code."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    log = run_dir.with_name(f"{run_dir.name}.log")
    with open(log, "a") as output:
        code = subprocess.run(words, env=environment, stdout=output, stderr=output, check=False).returncode
    print(f"{'finished' if code == 0 else f'exit code {code}, see {log}'}: {shlex.join(words)}", flush=True)
    return code


def run_all(args, jobs: dict[Path, list[str]]) -> int:
    """Do what is left of the jobs, or print it; the exit code."""
    try:
        left = commands_left(args, jobs)
        if not args.print:
            Path(args.folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=args.folder).close()  # an existing folder may be closed to us
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --folder {args.folder} cannot be written ({error.strerror}): choose another.", file=sys.stderr)
        return 2
    print(f"{len(jobs) - len(left)} of {len(jobs)} runs are finished.", flush=True)
    if args.print:
        print("\n".join(map(shlex.join, left.values())))
        return 0
    threads = max(1, (os.cpu_count() or 1) // args.workers)
    with ThreadPoolExecutor(args.workers) as pool:
        futures = [pool.submit(run, words, threads, run_dir) for run_dir, words in left.items()]
        try:
            return int(any([future.result() for future in futures]))
        except KeyboardInterrupt:  # the runs have got it, too, and save a checkpoint
            pool.shutdown(wait=True, cancel_futures=True)
            return 130


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    return run_all(args, jobs(args))


if __name__ == "__main__":
    sys.exit(main())
