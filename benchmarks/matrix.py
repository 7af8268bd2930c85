"""How many seeds find the optimum of a one-step matrix game: the tables of results/matrix.md, as markdown.

OMP_NUM_THREADS=1 python benchmarks/matrix.py               # 64 seeds a cell, half an hour on one busy core
python benchmarks/matrix.py --num-seeds 4 --total-timesteps 500                                # a minute, to look
"""

import argparse
import datetime
import os
import platform
import sys
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import qmix_matrix
import softqmix_matrix


class PlainAgent(nn.Sequential):
    """Linear, ReLU, linear: what the scripts' agent is without its GRU."""

    def __init__(self, num_agents: int, num_actions: int, hidden_size: int = 64):
        layers = nn.Linear(1 + num_agents, hidden_size), nn.ReLU(), nn.Linear(hidden_size, num_actions)
        super().__init__(*layers)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.cat([obs, torch.eye(len(obs))], dim=-1))


SOFT, QMIX = softqmix_matrix, qmix_matrix
PLAIN = {"agent": PlainAgent}
# Title, weights (columns), then rows: label, script, settings.
TABLES = [
    (
        "Table 1's game",
        (1.0, 0.5, 0.1),
        [(f"Soft-QMIX, alpha {alpha:g}", SOFT, {"alpha": alpha}) for alpha in (0.03, 0.3, 1.0, 3.0)]
        + [("QMIX", QMIX, {})],
    ),
    (
        "Table 1's game, variants (Soft-QMIX at alpha 1)",
        (1.0, 0.1),
        [
            ("Soft-QMIX without g", SOFT, {"use_g": False}),
            ("Soft-QMIX without f", SOFT, {"use_f": False}),
            ("Soft-QMIX, sum instead of mixer", SOFT, {"mixer": "vdn"}),
            ("Soft-QMIX, agent without GRU", SOFT, PLAIN),
            ("QMIX, sum instead of mixer (VDN)", QMIX, {"mixer": "vdn"}),
            ("QMIX, agent without GRU", QMIX, PLAIN),
            ("QMIX, epsilon 1 to .05 over 100 games", QMIX, {"epsilon_anneal_time": 100}),
            ("QMIX, epsilon 1 to .05 over 100,000 games", QMIX, {"epsilon_anneal_time": 100_000}),
            ("QMIX, epsilon fixed at 1", QMIX, {"epsilon_finish": 1.0}),
        ],
    ),
    (
        "Other games",
        (1.0, 0.1),
        [
            (f"{name}, `{game}`", script, {"payoff": game})
            for game in ("released", "climbing", "penalty")
            for name, script in (("Soft-QMIX, alpha 1", SOFT), ("QMIX", QMIX))
        ],
    ),
]


def measure(script, weights: tuple[float, ...], seeds: list[int], agent=None, **settings) -> list[dict]:
    """Train the seeds at every weight; returns `summarise` of each weight."""
    args = script.Args(num_seeds=len(seeds), **settings)
    script.check_args(args)
    game = script.Game(script.load_payoff(args.payoff))
    own_agent = script.Agent
    script.Agent = agent or own_agent
    try:
        learners = script.Seeds(game, args, seeds * len(weights), [w for w in weights for _ in seeds])
    finally:
        script.Agent = own_agent
    while learners.step < args.total_timesteps:
        learners.advance()
    tested = {name: value.unflatten(0, (-1, len(seeds))) for name, value in learners.test().items()}
    return [
        script.summarise({name: value[i] for name, value in tested.items()}, game, seeds, weight)
        for i, weight in enumerate(weights)
    ]


def cell(result: dict) -> str:
    low, high = result["interval"]
    return f"{result['successes']}/{len(result['seeds'])} = {result['success_rate']:.2f} ({low:.2f} to {high:.2f})"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seeds", type=int, default=64)
    parser.add_argument("--total-timesteps", type=int, default=10_000)
    options = parser.parse_args()
    for name, low in (("num_seeds", 1), ("total_timesteps", SOFT.Args.batch_size)):  # an update needs a full batch
        if not low <= (value := getattr(options, name)) <= 1e9:
            print(f"error: --{name.replace('_', '-')} is {value}; it must be in [{low}, 1e9].", file=sys.stderr)
            return 2
    torch.set_num_threads(1)
    print(f"{datetime.date.today()}, {cpu_name()}, {os.cpu_count()} cores, torch {torch.__version__}.", end=" ")
    print(f"{options.num_seeds} seeds a cell, {options.total_timesteps:,} games a seed; 95 % Wilson intervals.")
    bar = tqdm(total=sum(len(rows) for _, _, rows in TABLES), unit="row", file=sys.stderr, mininterval=5)
    for title, weights, rows in TABLES:
        print(
            f"\n## {title}\n\n| | "
            + " | ".join(f"weight {w:g}" for w in weights)
            + " |\n| --- |"
            + " --- |" * len(weights)
        )
        for label, script, settings in rows:
            steps = {"total_timesteps": options.total_timesteps}
            results = measure(script, weights, list(range(1, options.num_seeds + 1)), **settings, **steps)
            print(f"| {label} | " + " | ".join(map(cell, results)) + " |", flush=True)
            bar.update()
    bar.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
