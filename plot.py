"""Plot learning curves: mean and 95 % band over seeds, against steps and against hours, and print the table.

    python plot.py runs/                                  # every run below runs/, a row of panels per map
    python plot.py runs/ results/csv --out curves.png     # several folders

Reads the config.json and metrics.csv that every training script leaves in its run folder. Runs are grouped by map (or
Spread level), by algorithm (exp_name and the options in which its runs differ) and by backend: a simulator's curve is
never averaged with StarCraft II's.
"""

import csv
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Two-sided 95 % quantiles of Student's t for n - 1 degrees of freedom: a handful of seeds needs more than 1.96.
T95 = [np.nan, np.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]
# Options that do not make another experiment; runs that differ in any other are never averaged.
NEUTRAL = {
    "exp_name", "map", "level", "backend", "seed", "run_dir", "resume", "evaluate", "cuda", "torch_deterministic",
    "total_timesteps", "buffer_device", "checkpoint_interval", "checkpoint_replay", "save_replay", "check_env",
    "capture_video", "compile",
}  # fmt: skip


@dataclass
class Args:
    folders: tyro.conf.Positional[list[str]]
    """folders to search for runs"""
    out: str = "curves.png"
    """the picture to write"""
    smooth: int = 5
    """evaluations averaged for a point of a curve"""
    final: int = 10
    """last evaluations averaged for the table's final value"""
    at: tuple[int, ...] = (100_000, 250_000, 500_000, 1_000_000, 2_000_000, 5_000_000)
    """steps at which the table gives the mean of the evaluations of the last 50,000 steps"""


@dataclass
class Run:
    """One seed's curve: each column of metrics.csv as an array."""

    place: str
    name: str
    options: dict[str, str]
    seed: int
    columns: dict[str, np.ndarray]


def read_run(folder: Path) -> Run | None:
    """None if the folder's files are incomplete, as those of a run that has just begun."""
    try:
        config = json.loads((folder / "config.json").read_text())
        rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
        columns = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
        args, backend = config["args"], config["backend"]
        version = f" {config['simulator_version']}" if config.get("simulator_version") else ""
        place = f"{args['map']} ({backend}{version})" if "map" in args else f"spread {args['level']} ({backend})"
        options = {name: str(value) for name, value in args.items() if name not in NEUTRAL}
        return Run(place, args["exp_name"], options, args["seed"], columns)
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return None


def label_of(run: Run, runs: list[Run]) -> str:
    """exp_name and the options in which runs of that name and place differ, among those that know them."""
    same = [other.options for other in runs if (other.place, other.name) == (run.place, run.name)]
    names = [n for n in run.options if len({other[n] for other in same if n in other}) > 1]
    return " ".join([run.name, *(f"{name}={run.options[name]}" for name in names)])


def average(values: np.ndarray, window: int) -> np.ndarray:
    """Each value's mean with up to window - 1 before it."""
    return np.array([values[max(0, i + 1 - window) : i + 1].mean() for i in range(len(values))])


def band(runs: list[Run], x: str, y: str, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, mean and half-width of the 95 % interval over seeds, as far as the shortest run goes."""
    end = min(run.columns[x][-1] for run in runs)
    points = np.unique(np.concatenate([run.columns[x] for run in runs]))
    points = points[points <= end]
    curves = np.array([np.interp(points, run.columns[x], average(run.columns[y], window)) for run in runs])
    n = len(runs)
    half = T95[min(n, 10)] * curves.std(0, ddof=1) / np.sqrt(n) if n > 1 else np.zeros(len(points))
    return points, curves.mean(0), half


def table(groups: dict, args: Args) -> list[str]:
    """A row a group: values on the way, final value and area under the curve, mean +- standard deviation over seeds."""
    longest = max(run.columns["step"][-1] for runs in groups.values() for run in runs)
    at = [step for step in args.at if step <= longest]
    heads = ["where", "algorithm", "measure", "seeds", "steps", *(f"{step / 1e6:g}M" for step in at), "final", "area"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for (place, label), runs in sorted(groups.items()):
        measure = "win_rate" if "win_rate" in runs[0].columns else "return_mean"
        steps = min(run.columns["step"][-1] for run in runs)
        found = {head: [] for head in heads[5:]}
        for run in runs:
            inside = run.columns["step"] <= steps
            values, x = run.columns[measure][inside], run.columns["step"][inside]
            for step, head in zip(at, heads[5:-2], strict=True):
                window = (x > step - 50_000) & (x <= step)
                if step <= steps and window.any():
                    found[head].append(values[window].mean())
            found["final"].append(values[-args.final :].mean())
            found["area"].append(np.trapezoid(values, x) / (x[-1] - x[0]) if len(x) > 1 else values[0])
        cells = [
            f"{np.mean(v):.3g}" + (f" +- {np.std(v, ddof=1):.2g}" if len(v) > 1 else "") if v else ""
            for v in found.values()
        ]
        lines.append(f"| {place} | {label} | {measure} | {len(runs)} | {steps:,.0f} | {' | '.join(cells)} |")
    return lines


def draw(groups: dict, args: Args) -> None:
    """A row a place: win rate where there is one, and return, against steps and hours."""
    places = sorted({place for place, _ in groups})
    colours = {label: f"C{i}" for i, label in enumerate(sorted({label for _, label in groups}))}
    measures = {p: [m for m in ("win_rate", "return_mean") if any(q == p and m in runs[0].columns
                for (q, _), runs in groups.items())] for p in places}  # fmt: skip
    width = 2 * max(len(m) for m in measures.values())
    figure, axes = plt.subplots(len(places), width, figsize=(4.2 * width, 3.2 * len(places)), squeeze=False)
    for row, place in zip(axes, places, strict=True):
        panels = [(m, x, scale) for m in measures[place] for x, scale in (("step", 1e6), ("seconds", 3600))]
        for axis in row[len(panels) :]:
            axis.axis("off")
        for axis, (measure, x, scale) in zip(row, panels, strict=False):
            for (where, label), runs in sorted(groups.items()):
                if where != place:
                    continue
                points, mean, half = band(runs, x, measure, args.smooth)
                axis.plot(points / scale, mean, color=colours[label], label=f"{label} ({len(runs)})")
                axis.fill_between(points / scale, mean - half, mean + half, color=colours[label], alpha=0.2, lw=0)
            axis.set_xlabel("million steps" if x == "step" else "hours")
            axis.set_ylabel({"win_rate": "test win rate", "return_mean": "test return"}[measure])
            axis.set_title(place, fontsize=9)
            if measure == "win_rate":
                axis.set_ylim(0, 1)
            axis.grid(alpha=0.3)
        row[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    found = [read_run(file.parent) for folder in args.folders for file in sorted(Path(folder).rglob("metrics.csv"))]
    runs = [run for run in found if run is not None]
    if not runs:
        print(f"error: no config.json with metrics.csv below {', '.join(args.folders)}: train first.", file=sys.stderr)
        return 2
    groups = defaultdict(list)
    for run in runs:
        groups[run.place, label_of(run, runs)].append(run)
    for (place, label), same in groups.items():
        if len({run.seed for run in same}) < len(same):
            print(f"warning: {place}, {label}: a seed is there more than once and counts as several.", file=sys.stderr)
    print("\n".join(table(groups, args)))
    try:
        draw(groups, args)
    except (OSError, ValueError) as error:  # ValueError: a picture format that matplotlib does not know
        print(f"error: {args.out} cannot be written ({error}).", file=sys.stderr)
        return 2
    print(f"Picture: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
