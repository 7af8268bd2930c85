"""The runs of the paper's Table 3, MPE Spread at three levels, one process each.

    python benchmarks/mpe.py --print                      # only show the commands
    python benchmarks/mpe.py --workers 2                  # 3 levels, 5 seeds, QMIX and Soft-QMIX at 3 alphas
    python benchmarks/mpe.py --levels hard --algorithms qmix softqmix_1.0 --total-timesteps 1000000 --workers 2

Call it again after an interruption, or with more steps or seeds: finished runs are skipped, unfinished ones resumed.
Nothing is ever deleted: the folder of a run that was killed before its first checkpoint is yours to remove.
Then: python plot.py FOLDER. Each run leaves its messages in FOLDER/{name}.log.
"""

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.smacv2 import run_all

ALGORITHMS = {
    "qmix": ["qmix_mpe.py"],
    **{f"softqmix_{alpha}": ["softqmix_mpe.py", "--alpha", alpha] for alpha in ("1.0", "0.3", "0.1")},
}


@dataclass
class Args:
    levels: tuple[Literal["simple", "medium", "hard"], ...] = ("hard", "medium", "simple")
    """which levels"""
    algorithms: tuple[Literal["qmix", "softqmix_1.0", "softqmix_0.3", "softqmix_0.1"], ...] = tuple(ALGORITHMS)
    """which algorithms; the number is alpha"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """which seeds"""
    total_timesteps: int = 10_000_000
    """environment steps of each run"""
    checkpoint_interval: int = 100_000
    """environment steps between checkpoints, from which a killed run goes on"""
    folder: str = "runs/mpe"
    """where the run folders go"""
    workers: int = 1
    """processes at a time, each with an equal share of the cores"""
    print: bool = False
    """print the commands that are left to do, and stop"""


def jobs(args: Args) -> dict[Path, list[str]]:
    """Each run's folder, and the words that start it; level by level, and seed by seed."""
    return {
        Path(args.folder) / f"{level}__{algorithm}__{seed}": [
            *ALGORITHMS[algorithm], "--level", level, "--seed", str(seed)
        ]
        for level, seed, algorithm in product(args.levels, args.seeds, args.algorithms)
    }  # fmt: skip


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    return run_all(args, jobs(args))


if __name__ == "__main__":
    sys.exit(main())
