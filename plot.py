"""Plot learning curves, a panel per map: mean and 95 % band over seeds; print the table, and compare algorithms.

    python plot.py runs/                                        # every run below runs/
    python plot.py runs/ results/mpe --out curves.pdf           # several folders
    python plot.py runs/ --aggregate --statistic iqm            # over all maps, too: inter-quartile means
    python plot.py runs/ --compare softqmix_smacv2 qmix_smacv2  # how likely is the first better than the second?
    python plot.py runs/ --json runs.json                       # for marl-eval

Reads the config.json and metrics.csv that the SMACv2 and MPE scripts leave in their run folders; of a matrix script's
run it draws q_tot.png into its folder. Runs are grouped by map (or Spread level) and backend, by algorithm (as
config.json says), by exp_name, and by every option in which they differ or that only some of them know; nothing else is
averaged.
A run that stopped early counts as far as it goes: a cross marks where, and the table says how many seeds a figure has.
A folder that cannot be read is skipped with a warning.

Intervals are 95 % percentile bootstraps over seeds, each map's by themselves (stratified, Agarwal et al. 2021), by
scipy. A bootstrap of few seeds is too narrow: of normal data, it covers the mean with 3 seeds in 75 % of cases, with 5
in 84 %, with 10 in 91 %. Fewer than five are called few.
"""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback, during the imports, too

import io
import json
import os
import re
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import tyro
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt

plt.rcParams.update({"font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False})

# Options that do not make another experiment; runs that differ in any other are never averaged.
NEUTRAL = {
    "exp_name", "map", "level", "env", "backend", "seed", "run_dir", "resume", "evaluate", "cuda", "total_timesteps",
    "torch_deterministic", "buffer_device", "checkpoint_interval", "checkpoint_replay", "save_replay", "check_env",
    "capture_video", "compile", "cudagraphs", "track", "wandb_project_name", "wandb_entity",
}  # fmt: skip
# What runs from before config.json named the algorithm did, where they do not say so: these options came late.
LATER = {"fix_enemy_wipe": False, "prob_obs_enemy": 1.0, "action_mask": True}
FORMATS = (".png", ".pdf", ".svg", ".jpg")
DASHES = ("-", "--", "-.", (0, (1, 1)))  # for each ten colours
FEW = 5  # seeds
NAMES = {"win_rate": "test win rate", "return_mean": "test return"}


@dataclass
class Args:
    folders: tyro.conf.Positional[list[str]]
    """folders to search for runs"""
    out: str = "curves.png"
    """the picture to write: .png, .pdf, .svg or .jpg"""
    json: str | None = None
    """a file to write all runs to, in the layout that marl-eval reads"""
    measure: Literal["auto", "win_rate", "return_mean"] = "auto"
    """what is drawn and tabled; auto: win rate where there is one, else return"""
    statistic: Literal["mean", "iqm"] = "mean"
    """over seeds: the mean, or the inter-quartile mean"""
    aggregate: bool = False
    """a curve and a row over all maps or levels, too; returns are taken as they are"""
    compare: tuple[str, str] | None = None
    """two algorithms of the table: the probability that a run of the first ends better than one of the second"""
    x: Literal["steps", "hours"] = "steps"
    """what the curves are drawn against"""
    smooth: int = 5
    """evaluations averaged for a point of a curve"""
    final: int = 10
    """last evaluations averaged for the table's final value; never that at step 0"""
    at: tuple[int, ...] = (100_000, 250_000, 500_000, 1_000_000, 2_000_000, 5_000_000)
    """steps at which the table gives the mean of the evaluations of the last 50,000 steps"""
    title: str = ""
    """above the picture"""
    labels: tuple[str, ...] = ()
    """what the picture calls the algorithms of the table, such as qmix_smacv2=QMIX; colours follow the order given"""
    columns: int = 3
    """panels in a row"""
    size: tuple[float, float] | None = None
    """width and height of the picture in inches"""
    caption: bool = True
    """say below what lines and bands are"""


class InputError(ValueError):
    """Something the user can put right, told in one sentence: exit code 2, no traceback."""


def check_args(args: Args) -> None:
    for name, low in (("smooth", 1), ("final", 1), ("at", 0), ("columns", 1), ("size", 0.5)):
        value = getattr(args, name)
        lowest = value if isinstance(value, int) else min(value or (), default=low)
        if not low <= lowest:
            raise InputError(f"--{name} is {lowest}; it must be at least {low}.")
    if Path(args.out).suffix.lower() not in FORMATS:
        formats = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise InputError(f"--out is {args.out!r}; it must be a file name that ends in {formats}.")
    if args.size and max(args.size) > 100:
        raise InputError(f"--size is {max(args.size):g}; it must be at most 100 inches.")
    if wrong := [label for label in args.labels if "=" not in label]:
        raise InputError(f"--labels has {wrong[0]!r}; it must be a name of the table, =, and the name to show.")
    if not args.folders:
        raise InputError("There is no folder to search: python plot.py runs/")
    for folder in args.folders:
        if not Path(folder).is_dir():
            raise InputError(f"There is no folder {folder}: give folders that a training script has written.")


@dataclass
class Run:
    """One seed's curve: each column of metrics.csv as an array."""

    folder: Path
    game: str  # with backend and version
    task: str  # map, level or environment
    place: str  # both
    name: str  # algorithm, and exp_name if it is another
    options: dict[str, str]
    seed: int
    columns: dict[str, np.ndarray]
    older: bool = False  # from before config.json named the algorithm: other options, and another learner
    label: str = ""

    @property
    def end(self) -> float:
        return self.columns["step"][-1]


def read_run(folder: Path) -> Run:
    """The run in this folder; ValueError, saying why not, if its files are incomplete or not those of such a run."""
    try:
        config = json.loads((folder / "config.json").read_text())
        args, backend = config["args"], config["backend"]
        older = "algorithm" not in config
        args = LATER | args if older and "map" in args else args
        version = f" {config['simulator_version']}" if config.get("simulator_version") else ""
        if args.get("env"):
            game, task = "PettingZoo", args["env"]
        else:
            game, task = ("SMACv2", args["map"]) if "map" in args else ("Spread", f"spread {args['level']}")
        args = {"env_options": {}} | args
        options = {name: str(value) for name, value in args.items() if name not in NEUTRAL}
        exp_name, seed = str(args["exp_name"]), int(args["seed"])
        algorithm = str(config.get("algorithm", exp_name))
    except FileNotFoundError:
        raise ValueError("it has no config.json") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise ValueError("its config.json is not one of the SMACv2 and MPE scripts, or damaged") from None
    try:
        lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
        header, rows = lines[0] if lines else [], lines[1:]
        values = np.array(rows, float).T  # (columns, tests); ValueError if a line is shorter than the others
        if rows and len(values) != len(header):
            raise ValueError
    except (OSError, ValueError):
        raise ValueError("its metrics.csv has an incomplete line or something other than numbers in it") from None
    if not rows:
        raise ValueError("its metrics.csv is empty, as before the first test")
    needed = {"step", "seconds", "return_mean", *(["win_rate"] if "map" in args else [])}
    if missing := needed - set(header):
        raise ValueError(f"its metrics.csv has no column {' or '.join(sorted(missing))}")
    columns = dict(zip(header, values, strict=True))
    if not np.isfinite([columns[name] for name in needed]).all() or (np.diff(columns["step"]) <= 0).any():
        raise ValueError("its metrics.csv has something other than numbers in it, or steps that do not rise")
    name = algorithm if exp_name == algorithm else f"{algorithm} {exp_name}"
    where = f"({backend}{version})"
    return Run(folder, f"{game} {where}", task, f"{task} {where}", name, options, seed, columns, older)


def label_of(run: Run, runs: list[Run]) -> str:
    """Its name, and the options in which runs of that name and place differ, as far as it knows them."""
    same = [other for other in runs if (other.place, other.name) == (run.place, run.name)]
    alike = [other.options for other in same if other.older == run.older]
    names = [name for name in run.options if len({options.get(name) for options in alike}) > 1]
    older = ["(older)"] if run.older and len(alike) < len(same) else []
    return " ".join([run.name, *older, *(f"{name}={run.options[name]}" for name in names)])


# --- Statistics: samples are a list of arrays (seeds, ...), one for each map ------------------------------------------
def center(*samples, axis=0, kind: str):
    values = np.concatenate(samples, axis)
    return values.mean(axis) if kind == "mean" else stats.trim_mean(values, 0.25, axis)


def improvement(*samples, axis=0):
    """P(X > Y) + P(X = Y) / 2, averaged over maps: samples are X of all maps, then Y of all maps."""
    pairs = zip(samples[: len(samples) // 2], samples[len(samples) // 2 :], strict=True)
    return np.mean([stats.mannwhitneyu(x, y, axis=axis, method="asymptotic").statistic / (x.shape[axis] * y.shape[axis])
                    for x, y in pairs], axis=0)  # fmt: skip


def interval(samples: list[np.ndarray], statistic, **settings) -> tuple:
    """95 % percentile bootstrap, each sample's seeds drawn by themselves; NaN if a map has one seed."""
    if min(map(len, samples)) < 2:
        return (np.full(samples[0].shape[1:], np.nan),) * 2

    def resampled(*samples, axis):
        return statistic(*samples, axis=axis, **settings)

    how = {"n_resamples": 2000, "batch": 100, "method": "percentile", "rng": np.random.default_rng(0)}
    return tuple(stats.bootstrap(samples, resampled, axis=0, vectorized=True, **how).confidence_interval)


def complete(runs: list[Run]) -> list[Run]:
    """Those that go as far as the longest, but for one test."""
    longest = max(runs, key=lambda run: run.end)
    gap = np.diff(longest.columns["step"]).max(initial=0)
    return [run for run in runs if run.end >= longest.end - gap]


def average(values: np.ndarray, window: int) -> np.ndarray:
    """Each value's mean with up to window - 1 before it."""
    return np.array([values[max(0, i + 1 - window) : i + 1].mean() for i in range(len(values))])


def band(strata: list[list[Run]], x: str, y: str, args: Args) -> tuple[np.ndarray, ...]:
    """Points, statistic, both ends of its interval, and which points are the last of some run that stopped early.

    It goes as far as the runs of every map (stratum) that have not stopped early; those that have are in it up to
    there."""
    end = min(run.columns[x][-1] for runs in strata for run in complete(runs))
    ends = sorted({end, *(run.columns[x][-1] for runs in strata for run in runs if run.columns[x][-1] < end)})
    points = np.unique(np.concatenate([run.columns[x] for runs in strata for run in runs]))
    points = points[points <= end]
    kept = (np.arange(len(points)) % max(1, len(points) // 400) == 0) | np.isin(points, ends)
    points, parts = points[kept], []
    for start, stop in pairwise([-np.inf, *ends]):
        piece = points[(points > start) & (points <= stop)]
        samples = [
            np.array([np.interp(piece, run.columns[x], average(run.columns[y], args.smooth)) for run in runs
                      if run.columns[x][-1] >= stop]) for runs in strata
        ]  # fmt: skip
        middle = center(*samples, kind=args.statistic)
        parts.append((piece, middle, *interval(samples, center, kind=args.statistic)))
    return *map(np.concatenate, zip(*parts, strict=True)), np.isin(points, ends[:-1])


def last_tests(values: np.ndarray, steps: np.ndarray, final: int) -> np.ndarray:
    """The last `final` values; that of step 0, before any training, only if there is no other."""
    return (values[steps > 0] if steps[-1] > 0 else values)[-final:]


def scores(run: Run, measure: str, at: list[int], end: float, final: int) -> dict:
    """The table's figures of one run, without those it did not get to."""
    inside = run.columns["step"] <= end
    values, x = run.columns[measure][inside], run.columns["step"][inside]
    found = {}
    for step in at:
        window = (x > step - 50_000) & (x <= step)
        if step <= run.end and window.any():
            found[step] = values[window].mean()
    if run.end >= end:
        found["final"] = last_tests(values, x, final).mean()
        found["area"] = np.trapezoid(values, x) / (x[-1] - x[0]) if len(x) > 1 else values[0]
    return found


def cell(samples: list[list[float]], seeds: int, kind: str) -> str:
    """The statistic; +- the standard deviation over a single map's seeds; how many seeds, if not all."""
    values = np.concatenate(samples)
    if not all(map(len, samples)):
        return ""
    text = f"{center(*map(np.array, samples), kind=kind):.3g}"
    if len(values) > 1 and kind == "mean" and len(samples) == 1:
        text += f" +- {float(f'{np.std(values, ddof=1):.2g}'):g}"
    return text + (f" ({len(values)} of {seeds})" if len(values) < seeds else "")


def table(groups: dict, measures: dict, args: Args) -> list[str]:
    """A row a group: values on the way, final value, area under the curve, and the final value's interval."""
    longest = max(run.end for strata in groups.values() for runs in strata for run in runs)
    at = [step for step in dict.fromkeys(args.at) if step <= longest]
    heads = ["where", "algorithm", "measure", "seeds", "steps", *(f"{step / 1e6:g}M" for step in at), "final", "area"]
    heads += ["final, 95 %"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for (place, label), strata in groups.items():
        found = [
            [scores(run, measures[place], at, min(run.end for run in complete(runs)), args.final) for run in runs]
            for runs in strata
        ]
        seeds = sum(map(len, strata))
        samples = {key: [[run[key] for run in runs if key in run] for runs in found] for key in (*at, "final", "area")}
        low, high = interval([np.array(values) for values in samples["final"]], center, kind=args.statistic)
        steps = {f"{run.end:,.0f}": run.end for runs in strata for run in runs}
        cells = [cell(values, seeds, args.statistic) for values in samples.values()]
        cells += [f"{low:.3g} to {high:.3g}" if np.isfinite(low) else ""]
        length = " to ".join(sorted({min(steps, key=steps.get), max(steps, key=steps.get)}, key=steps.get))
        row = [place, label, measures[place], count(strata), length, *cells]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def meanings(args: Args) -> str:
    """What the table's columns are, in a sentence below it."""
    over = "mean +- standard deviation" if args.statistic == "mean" else "inter-quartile mean"
    last = f"final: of a run's last {args.final} tests after step 0" if args.final > 1 else "final: of the last test"
    return f"Cells: {over} over seeds. A step: of the tests in the 50,000 before it; {last}; area: of all, by steps."


def count(strata: list[list[Run]]) -> str:
    """The number of seeds, and whether they are few on some map."""
    few = " (few)" if min(map(len, strata)) < FEW else ""
    return f"{sum(map(len, strata))}{few}"


def comparison(groups: dict, measures: dict, args: Args) -> list[str]:
    """How likely a run of the first algorithm ends better than one of the second, on each map, and over all."""
    labels = sorted({label for _, label in groups})
    for name in args.compare:
        if name not in labels:
            raise InputError(f"--compare names {name!r}, which is not in the table: choose of {', '.join(labels)}.")
    lines = []
    for place in dict.fromkeys(place for place, _ in groups):
        if not all((place, name) in groups for name in args.compare):
            continue
        sides = [{runs[0].task: complete(runs) for runs in groups[place, name]} for name in args.compare]
        tasks = [task for task in sides[0] if task in sides[1]]
        where = re.sub(r"\d+ maps$", f"{len(tasks)} maps", place)  # of those over all maps, those that both played
        if where != place and len(tasks) < 2:
            continue  # the one map has its own line
        ends = {task: min(run.end for side in sides for run in side[task]) for task in tasks}
        samples = [
            np.array([scores(run, measures[place], [], ends[task], args.final)["final"] for run in side[task]])
            for side in sides for task in tasks
        ]  # fmt: skip
        low, high = interval(samples, improvement)
        within = f"(95 %: {low:.2f} to {high:.2f})" if np.isfinite(low) else "(no interval: a single seed)"
        few = ", few seeds" if min(map(len, samples)) < FEW else ""
        better = f"{args.compare[0]} ends better than {args.compare[1]} with probability {improvement(*samples):.2f}"
        at = " or ".join(f"{end:,.0f}" for end in sorted(set(ends.values())))
        lines.append(f"{where}: {better} {within}{few}, at {at} steps")
    return lines or [f"There is no map with runs of both {' and '.join(args.compare)}."]


def marl_eval(runs: list[Run], final: int) -> dict:
    """game -> task -> algorithm -> seed -> step_i -> measures. Ours for `absolute_metrics`, which is to be the best
    policy's test on ten times as many episodes, is the mean of the last tests."""
    tree: dict = {}
    for run in runs:
        measures = [name for name in NAMES if name in run.columns]
        seeds = tree.setdefault(run.game, {}).setdefault(run.task, {}).setdefault(run.label, {})
        again = sum(name.split("-")[0] == f"seed_{run.seed}" for name in seeds)
        name = f"seed_{run.seed}" + (f"-{again + 1}" if again else "")
        steps = zip(run.columns["step"], *(run.columns[measure] for measure in measures), strict=True)
        seeds[name] = {
            f"step_{i}": {"step_count": int(step), **{m: [value] for m, value in zip(measures, values, strict=True)}}
            for i, (step, *values) in enumerate(steps)
        }
        seeds[name]["absolute_metrics"] = {
            m: [last_tests(run.columns[m], run.columns["step"], final).mean()] for m in measures
        }
    return tree


def shown_names(labels: list[str], wanted: tuple[str, ...]) -> dict[str, str]:
    """What the picture calls each label; those that are given a name come first, in that order."""
    shown = {}
    for text in wanted:  # labels hold =, too
        name = max((label for label in labels if text.startswith(f"{label}=")), key=len, default=None)
        if name is None:
            raise InputError(f"--labels has {text!r}; it must be one of {', '.join(labels)}, then = and what to show.")
        shown[name] = text[len(name) + 1 :]
    return shown | {label: label for label in labels if label not in shown}


def write(path: Path, content: bytes) -> None:
    """Under a temporary name and renamed, so that no file is ever left half written; makes its folder."""
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def picture(figure: plt.Figure, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:].lower(), dpi=200)
    write(path, image.getvalue())


def draw(groups: dict, measures: dict, args: Args) -> None:
    """A panel a place, one legend for all. Limits follow the curves, not the bands."""
    places = list(dict.fromkeys(place for place, _ in groups))
    shown = shown_names(sorted({label for _, label in groups}), args.labels)
    labels = list(shown)
    columns = min(args.columns, len(places))
    rows = -(-len(places) // columns)
    size = args.size or ({1: 4.5, 2: 6.5}.get(columns, 2.5 * columns), (2.4 if columns == 1 else 2.0) * rows + 0.9)
    x, unit, scale = ("step", "million steps", 1e6) if args.x == "steps" else ("seconds", "hours", 3600)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    lines, heights = {}, defaultdict(list)  # a line for each label: one with crosses, if there is one
    for axis, place in zip(axes.flat, places, strict=False):
        for j, label in enumerate(labels):
            if (place, label) not in groups:
                continue
            points, middle, low, high, stops = band(groups[place, label], x, measures[place], args)
            style = {"color": f"C{j % 10}", "linestyle": DASHES[j // 10 % len(DASHES)], "linewidth": 1.3}
            marks = {"marker": "x", "markersize": 5, "markevery": np.flatnonzero(stops).tolist()}
            if len(points) == 1:  # a single test is no line
                marks = {"marker": "o", "markersize": 4}
            line = axis.plot(points / scale, middle, **style, **marks)[0]
            lines[label] = line if stops.any() or label not in lines else lines[label]
            axis.fill_between(points / scale, low, high, color=f"C{j % 10}", alpha=0.18, linewidth=0)
            heights[axis] += [middle.min(), middle.max()]
        axis.set_title(place, parse_math=False)
        axis.grid(alpha=0.3)
        axis.locator_params(axis="x", nbins=5)
    best = max([max(heights[axis]) for axis, place in zip(axes.flat, places, strict=False)
                if measures[place] == "win_rate"], default=0)  # fmt: skip
    for i, axis in enumerate(axes.flat):
        if i >= len(places):
            axis.remove()
        elif measures[places[i]] == "win_rate":
            axis.set_ylim(0, min(1, 1.1 * best) or 1)  # the same on every map
        else:
            margin = 0.08 * (max(heights[axis]) - min(heights[axis])) or 1
            axis.set_ylim(min(heights[axis]) - margin, max(heights[axis]) + margin)
        if i + columns >= len(places):
            axis.set_xlabel(unit)
        if i < len(places) and (i % columns == 0 or measures[places[i]] != measures[places[i - 1]]):
            axis.set_ylabel(NAMES[measures[places[i]]])
    lines = {label: lines[label] for label in labels if label in lines}
    caption = ""
    if args.caption:
        kind = "mean" if args.statistic == "mean" else "inter-quartile mean"
        tests = f", of a running mean over {args.smooth} tests" if args.smooth > 1 else ""
        sentences = [f"Line: {kind} over seeds{tests}. Band: its 95 % bootstrap interval."]
        sentences += ["Cross: a run stopped early."] if any(line.get_markevery() for line in lines.values()) else []
        caption = "\n".join(textwrap.fill(text, int(22 * size[0])) for text in sentences)  # letters in its small print
    handles = [plt.Line2D([], [], color=line.get_color(), linestyle=line.get_linestyle()) for line in lines.values()]
    names = []
    for label in lines:
        counts = [len(strata[0]) for (_, name), strata in groups.items() if name == label and len(strata) == 1]
        number = "to".join(f" {n} " for n in sorted({min(counts), max(counts)})).strip()
        few = ", few" if min(counts) < FEW else ""
        names.append(f"{shown[label]} ({number} seed{'s' if number != '1' else ''}{few})")
    for ncols in range(len(lines), 0, -1):  # as many columns as fit
        legend = figure.legend(handles, [f"line {i}" for i in range(len(lines))], loc="outside lower center",
                               frameon=False, ncols=ncols, title=caption, title_fontsize=6)  # fmt: skip
        for text, name in zip(legend.get_texts(), names, strict=True):  # set here, as it may hold $ or begin with _
            text.set_parse_math(False)
            text.set_text(name)
        if ncols == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    if args.title:
        figure.suptitle(args.title, parse_math=False)
    picture(figure, Path(args.out))
    plt.close(figure)


def matrix_picture(run_dir: Path) -> Path:
    """q_tot.png in a matrix script's folder: payoff, and what a seed of the most frequent outcome learnt."""
    run = json.loads((run_dir / "summary.json").read_text())
    args, payoff = run["args"], np.array(run["payoff"])
    (n, m), panels = payoff.shape, [("payoff\n", payoff, [])]
    for result in [run] if args.get("td_weight", 1) == 1 else [run, run["weight_1"]]:  # FOP has no such weight
        k, won = result["seeds"].index(result["representative"]), f"{result['successes']} of {len(result['seeds'])}"
        setting = next(name for name in ("td_weight", "alpha") if name in result)
        title = f"Q_tot of seed {result['representative']}, {setting.replace('_', '-')} {result[setting]:g}"
        panels.append((f"{title}\n({won} seeds find an optimum)", np.array(result["q_tot"][k]), result["policy"][k]))
    names = [chr(ord("A") + u) if u < 26 else str(u) for u in range(max(n, m))]  # of actions
    figure = plt.Figure(figsize=(2 + 4 * len(panels), 7.5), layout="constrained")
    name = "FOP" if "td_weight" not in args else "Soft-QMIX" if "alpha" in args else "QMIX"
    alpha = f", alpha {args['alpha']:g}" if args.get("alpha") else ""  # FOP's own falls
    title = f"{name} on {args['payoff']}{alpha}, seeds {run['seeds'][0]} to {run['seeds'][-1]}"
    figure.suptitle(title, fontsize="x-large", weight="bold")
    grid, size = figure.subplots(2, len(panels), height_ratios=[3, 1]), min(14, 45 / m, 200 / n)  # size of letters
    for (above, below), (title, matrix, policies) in zip(grid.T, panels, strict=True):
        image = above.imshow(matrix, vmin=payoff.min(), vmax=payoff.max(), aspect="auto")
        above.set(title=title, xlabel="agent 2", xticks=range(m), xticklabels=names[:m])
        above.set(ylabel="agent 1", yticks=range(n), yticklabels=names[:n])
        for (i, j), value in np.ndenumerate(matrix):
            color = "white" if value < (payoff.min() + payoff.max()) / 2 else "black"
            above.text(j, i, f"{round(value, 2) + 0:.9g}", ha="center", va="center", fontsize=size, color=color)
        for i, policy in enumerate(policies):
            bars = below.bar(np.arange(len(policy)) + 0.4 * i - 0.2, policy, 0.4, label=f"agent {i + 1}")
            below.bar_label(bars, fmt="%.2f", fontsize=min(11, 36 / len(names)))
        below.set(title="its agents' policies", xticks=range(len(names)), xticklabels=names, yticks=[], ylim=(0, 1.25))
    figure.colorbar(image, ax=grid[0], label="payoff, Q_tot", extend="both")
    grid[1, 0].remove()
    figure.legend(*below.get_legend_handles_labels(), title="policies", fontsize="x-large", loc="lower left")
    picture(figure, run_dir / "q_tot.png")
    return run_dir / "q_tot.png"


def draws_matrix_game(folder: Path) -> bool:
    """Whether this is a matrix script's run: then its picture is drawn, and there are no curves."""
    try:
        if not str(json.loads((folder / "config.json").read_text())["algorithm"]).endswith("_matrix"):
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False  # read_run says what is wrong with it
    try:
        print(f"Picture: {matrix_picture(folder)}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        print(f"warning: no picture of {folder}: is the run complete? ({error!r})", file=sys.stderr)
    return True


def read_runs(folders: list[str]) -> list[Run]:
    """All readable runs, once each, though one folder may lie in another; says which are skipped."""
    files = {file.resolve(): file for folder in folders for file in sorted(Path(folder).rglob("metrics.csv"))}
    curves = [file for file in files.values() if not draws_matrix_game(file.parent)]
    runs = []
    for file in curves:
        try:
            runs.append(read_run(file.parent))
        except ValueError as reason:
            print(f"warning: {file.parent} is skipped: {reason}.", file=sys.stderr)
    if not runs and (curves or not files):
        why = "none of these runs can be drawn" if files else f"no metrics.csv below {', '.join(folders)}"
        raise InputError(f"{why}: train with a SMACv2 or MPE script first.")
    for run in runs:
        run.label = label_of(run, runs)
    return runs


def strata_of(runs: list[Run]) -> tuple[dict, dict]:
    """(place, label) -> [its runs], and (game and number of maps, label) -> the runs of each map, where there are
    several maps."""
    groups, overall, places = {}, {}, defaultdict(set)
    for run in runs:
        places[run.game].add(run.place)
    for run in sorted(runs, key=lambda run: (run.game, run.place, run.label)):
        groups.setdefault((run.place, run.label), [[]])[0].append(run)
        if len(places[run.game]) > 1:
            name = f"{run.game}, {len(places[run.game])} maps"
            overall.setdefault((name, run.label), {}).setdefault(run.place, groups[run.place, run.label][0])
    return groups, {key: list(strata.values()) for key, strata in overall.items()}


def warn(groups: dict, overall: dict) -> None:
    """Of what a reader of the table would not expect."""
    for (place, label), (runs,) in groups.items():
        if len({run.seed for run in runs}) < len(runs):
            print(f"warning: {place}, {label}: a seed is there more than once and counts as several.", file=sys.stderr)
        longest, whole = max(run.end for run in runs), complete(runs)
        for run in (run for run in runs if run not in whole):
            text = f"stops at {run.end:,.0f} of {longest:,.0f} steps and counts as far as it goes"
            print(f"warning: {place}, {label}: {run.folder} {text}.", file=sys.stderr)
    for (name, label), strata in overall.items():
        if not name.endswith(f", {len(strata)} maps"):
            text = f"{label} has runs on {len(strata)} of them: do not compare its figures with others'"
            print(f"warning: {name}: {text}.", file=sys.stderr)


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    file = args.out
    try:
        check_args(args)
        runs = read_runs(args.folders)
        if not runs:
            return 0  # matrix games only
        groups, overall = strata_of(runs)
        warn(groups, overall if args.aggregate else {})
        measures = {}
        for (place, _), strata in (groups | overall).items():
            won = all("win_rate" in run.columns for runs in strata for run in runs)
            if args.measure == "win_rate" and not won:
                raise InputError(f"--measure is win_rate, and runs of {place} have none: leave it out.")
            measures[place] = "win_rate" if won and args.measure != "return_mean" else "return_mean"
        lines = table(groups | (overall if args.aggregate else {}), measures, args)
        lines += ["", meanings(args), ""]
        lines += comparison(groups | overall, measures, args) if args.compare else []
        shown_names(sorted({label for _, label in groups}), args.labels)
        print("\n".join(lines))
        draw(groups | (overall if args.aggregate else {}), measures, args)
        if file := args.json:
            write(Path(file), json.dumps(marl_eval(runs, args.final), indent=1).encode())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:  # ValueError: a picture too large for its format
        print(f"error: {file} cannot be written ({error}).", file=sys.stderr)
        return 2
    try:
        print(f"Picture: {args.out}" + (f"\nRuns: {args.json}" if args.json else ""), flush=True)
    except BrokenPipeError:  # nobody reads on; the files are written
        os._exit(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
