"""Plot learning curves: mean and 95 % band over seeds, against steps and against hours, and print the table.

    python plot.py runs/                                  # every run below runs/, a row of panels per map
    python plot.py runs/ results/mpe --out curves.pdf     # several folders

Reads the config.json and metrics.csv that the SMACv2 and MPE scripts leave in their run folders (the matrix scripts
draw their own picture, q_tot.png). Runs are grouped by map (or Spread level), by algorithm (exp_name and the options in
which its runs differ) and by backend: a simulator's curve is never averaged with StarCraft II's. A folder that cannot
be read is skipped with a warning.
"""

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
    "capture_video", "compile", "cudagraphs",
}  # fmt: skip
FORMATS = (".png", ".pdf", ".svg", ".jpg")


@dataclass
class Args:
    folders: tyro.conf.Positional[list[str]]
    """folders to search for runs"""
    out: str = "curves.png"
    """the picture to write: .png, .pdf, .svg or .jpg"""
    smooth: int = 5
    """evaluations averaged for a point of a curve"""
    final: int = 10
    """last evaluations averaged for the table's final value"""
    at: tuple[int, ...] = (100_000, 250_000, 500_000, 1_000_000, 2_000_000, 5_000_000)
    """steps at which the table gives the mean of the evaluations of the last 50,000 steps"""


def find_error(args: Args) -> str | None:
    """What is wrong with the options, in one sentence."""
    for name, low, values in (("smooth", 1, [args.smooth]), ("final", 1, [args.final]), ("at", 0, args.at)):
        if min(values, default=low) < low:
            return f"--{name} is {min(values)}; it must be at least {low}."
    if Path(args.out).suffix.lower() not in FORMATS:
        return f"--out is {args.out!r}; it must be a file name that ends in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}."
    if not args.folders:
        return "There is no folder to search: python plot.py runs/"
    for folder in args.folders:
        if not Path(folder).is_dir():
            return f"There is no folder {folder}: give folders that a training script has written."
    return None


@dataclass
class Run:
    """One seed's curve: each column of metrics.csv as an array."""

    place: str
    name: str
    options: dict[str, str]
    seed: int
    columns: dict[str, np.ndarray]


def read_run(folder: Path) -> Run:
    """The run in this folder; ValueError, saying why not, if its files are incomplete or not those of such a run."""
    try:
        config = json.loads((folder / "config.json").read_text())
        args, backend = config["args"], config["backend"]
        version = f" {config['simulator_version']}" if config.get("simulator_version") else ""
        place = f"{args['map']} ({backend}{version})" if "map" in args else f"spread {args['level']} ({backend})"
        options = {name: str(value) for name, value in args.items() if name not in NEUTRAL}
        name, seed = str(args["exp_name"]), int(args["seed"])
    except FileNotFoundError:
        raise ValueError("it has no config.json") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("its config.json is not one of the SMACv2 and MPE scripts, or damaged") from None
    try:
        lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
        header, rows = lines[0] if lines else [], lines[1:]
        values = np.array(rows, float).T  # (columns, tests); ValueError if a line is shorter than the others
        if rows and (len(values) != len(header) or not np.isfinite(values).all()):
            raise ValueError
    except (OSError, ValueError):
        raise ValueError("its metrics.csv has an incomplete line or something other than numbers in it") from None
    if not rows:
        raise ValueError("its metrics.csv is empty, as before the first test")
    missing = {"step", "seconds", "return_mean", *(["win_rate"] if "map" in args else [])} - set(header)
    if missing:
        raise ValueError(f"its metrics.csv has no column {' or '.join(sorted(missing))}")
    return Run(place, name, options, seed, dict(zip(header, values, strict=True)))


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
    at = [step for step in dict.fromkeys(args.at) if step <= longest]
    heads = ["where", "algorithm", "measure", "seeds", "steps", *(f"{step / 1e6:g}M" for step in at), "final", "area"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for (place, label), runs in sorted(groups.items()):
        measure = "win_rate" if "win_rate" in runs[0].columns else "return_mean"
        steps = min(run.columns["step"][-1] for run in runs)
        found = {column: [] for column in (*at, "final", "area")}
        for run in runs:
            inside = run.columns["step"] <= steps
            values, x = run.columns[measure][inside], run.columns["step"][inside]
            for step in at:
                window = (x > step - 50_000) & (x <= step)
                if step <= steps and window.any():
                    found[step].append(values[window].mean())
            found["final"].append(values[-args.final :].mean())
            found["area"].append(np.trapezoid(values, x) / (x[-1] - x[0]) if len(x) > 1 else values[0])
        cells = [
            f"{np.mean(v):.3g}" + (f" +- {float(f'{np.std(v, ddof=1):.2g}'):g}" if len(v) > 1 else "") if v else ""
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
    tests = f"a running mean over {args.smooth} tests" if args.smooth > 1 else "every test"
    caption = (
        f"Lines: {tests}, averaged over the seeds (their number in brackets). Bands: 95 % t interval over the seeds."
    )
    figure.supxlabel(caption, fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    if error := find_error(args):
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Once each, though one folder may lie in another
    files = {file.resolve(): file for folder in args.folders for file in sorted(Path(folder).rglob("metrics.csv"))}
    runs = []
    for file in files.values():
        try:
            runs.append(read_run(file.parent))
        except ValueError as reason:
            print(f"warning: {file.parent} is skipped: {reason}.", file=sys.stderr)
    if not runs:
        why = "none of these runs can be drawn" if files else f"no metrics.csv below {', '.join(args.folders)}"
        print(f"error: {why}: train with a SMACv2 or MPE script first.", file=sys.stderr)
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
    except (OSError, ValueError) as error:  # ValueError: a picture too large for its format
        print(f"error: {args.out} cannot be written ({error}).", file=sys.stderr)
        return 2
    print(f"Picture: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
