"""Draws this folder's pictures: architecture.png, batch.png and teaser.png.

    python docs/draw.py            # into docs/
    python docs/draw.py pictures   # into another folder

The teaser's curves are those of results/, computed as plot.py does; its battle is battle.png, which
`envs/smacv2_render.py` drew. tests/test_draw.py holds the shapes below to the networks and the batch to the replay.
"""

import sys
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).resolve().parent
EXECUTION, TRAINING, STATE, INK = "#0062a8", "#ce5400", "#117733", "#1e1e1e"
TINT = {EXECUTION: "#dbe9f5", TRAINING: "#fbe6d8", STATE: "#dff0e2"}
SHAPES = {  # of each layer: inputs, hidden units, outputs; N agents, A actions, O observation, S state features
    "agent.fc_in": "O+A+N 64", "agent.gru": "64 64", "agent.fc_out": "64 A",
    "g.w1": "S 64 N*32", "g.b1": "S N*32", "g.w2": "S 64 N*32", "g.b2": "S 64 N",
    "mixer.w1": "S 64 N*32", "mixer.b1": "S 32", "mixer.w2": "S 64 32", "mixer.b2": "S 64 1",
    "f.w": "S 64 N", "f.b": "S 64 N",
}  # fmt: skip
LENGTHS = (4, 2, 1)  # steps of the episodes in batch.png, the longest first


def shape(name: str) -> str:
    return " → ".join(SHAPES[name].split()).replace("*", "·").replace("+", " + ")


def canvas(width: float, height: float) -> tuple:
    """Units are tenths of an inch, so that text sizes and boxes go together."""
    figure = plt.figure(figsize=(width, height))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 10 * width), ylim=(0, 10 * height))
    axis.axis("off")
    return figure, axis


def box(axis, x, y, width, height, title, lines, color, size=11):
    axis.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.8", facecolor=TINT[color],
                                  edgecolor=color, linewidth=1.6))  # fmt: skip
    middle, step = x + width / 2, 1.9 if size > 10 else 1.75
    top = y + height / 2 + step * len(lines) / 2
    axis.text(middle, top, title, ha="center", va="center", fontsize=size + 1, weight="bold", color=color)
    for k, line in enumerate(lines):
        axis.text(middle, top - step * (k + 1), line, ha="center", va="center", fontsize=size - 1, color=INK)


def arrow(axis, points, color=INK, text="", at=None, **style):
    """Along these points; text beside the place `at`."""
    style = {"linewidth": 1.6} | style
    for a, b in pairwise(points[:-1]):
        axis.plot(*zip(a, b, strict=True), color=color, solid_capstyle="round", **style)
    axis.add_patch(FancyArrowPatch(*points[-2:], arrowstyle="-|>", mutation_scale=13, color=color, shrinkA=0, shrinkB=0,
                                   **style))  # fmt: skip
    if text:
        axis.text(*at, text, fontsize=10, color=color, ha="center", va="center")


def architecture(path: Path) -> None:
    """What runs where: the agent network in execution, everything else only while learning."""
    figure, axis = canvas(13, 7.4)
    axis.add_patch(
        FancyBboxPatch((1, 4), 33, 65, "round,pad=0,rounding_size=1.5", facecolor="#f3f8fc", edgecolor="none")
    )
    axis.add_patch(
        FancyBboxPatch((36, 4), 93, 65, "round,pad=0,rounding_size=1.5", facecolor="#fef7f2", edgecolor="none")
    )
    axis.text(17.5, 71, "execution and training", ha="center", va="center", fontsize=14, weight="bold", color=EXECUTION)
    axis.text(82, 71, "training only", ha="center", va="center", fontsize=14, weight="bold", color=TRAINING)
    hidden = SHAPES["agent.gru"].split()[0]
    box(axis, 4, 8, 27, 8, "what agent i sees", ["observation O, last action A, id N"], EXECUTION)
    box(axis, 4, 24, 27, 15, "agent network $f^{stage1}$",
        ["shared by all agents", f"linear {shape('agent.fc_in')}, ReLU", f"GRU {shape('agent.gru')}",
         f"linear {shape('agent.fc_out')}"], EXECUTION)  # fmt: skip
    box(axis, 4, 54, 27, 8, "greedy action", ["argmax over available actions"], EXECUTION)
    arrow(axis, [(17.5, 16), (17.5, 24)], EXECUTION, f"(R, N, O + A + N)\nand hidden (R, N, {hidden})", (25.5, 20))
    arrow(axis, [(17.5, 39), (17.5, 54)], EXECUTION, "values (R, N, A)", (24.6, 50.5))

    embed = SHAPES["mixer.w2"].split()[-1]
    box(
        axis,
        41,
        39,
        22,
        13,
        "$g_i$",
        [f"1 → {embed} → 1, ELU, weights ≥ 0,", "plus its input:", "order kept strictly"],
        TRAINING,
    )
    box(axis, 72, 54, 22, 11, "$f_i$", ["$|w_i(s)|\\, Q_i + b_i(s)$:", "order kept"], TRAINING)
    box(axis, 72, 39, 22, 11, "mixer", [f"N → {embed} → 1, ELU,", "weights ≥ 0: monotonic"], TRAINING)
    box(
        axis,
        104,
        54,
        22,
        11,
        "policy $\\pi_i$",
        ["softmax($f_i$ / α), available", "actions: acts in training"],
        TRAINING,
    )
    losses = ["$L_Q$ trains agent, g, mixer;", "$L_\\pi$ trains f alone"]
    box(axis, 104, 39, 22, 11, "$Q_{tot}$ (R) and losses", losses, TRAINING)
    arrow(axis, [(17.5, 45.5), (41, 45.5)], EXECUTION)
    arrow(axis, [(63, 44.5), (72, 44.5)], TRAINING, "$Q_i$ (R, N)\nof actions\ntaken", (67.3, 40.3))
    arrow(axis, [(63, 48), (67, 48), (67, 59.5), (72, 59.5)], TRAINING, "$Q_i$ (R, N, A)", (61.2, 57.5))
    arrow(axis, [(94, 59.5), (104, 59.5)], TRAINING, "(R, N, A)", (99, 61.5))
    arrow(axis, [(94, 44.5), (104, 44.5)], TRAINING, "(R)", (100.3, 46.3))
    arrow(axis, [(83, 54), (83, 52), (115, 52), (115, 50)], TRAINING, "$\\Sigma_i f_i(Q_i)$ for $L_\\pi$", (108, 53))

    box(axis, 41, 7, 22, 6, "state s", ["(R, S)"], STATE)
    for x, network, parts in ((41, "g", ("w1", "b1", "w2", "b2")), (72, "mixer", ("w1", "b1", "w2", "b2")),
                              (104, "f", ("w", "b"))):  # fmt: skip
        lines = [f"{part}: {shape(f'{network}.{part}')}" for part in parts]
        name = {"g": "$g_i$", "f": "$f_i$"}.get(network, network)
        box(axis, x, 19, 22, 13, f"hypernetworks: {name}", lines, STATE)
    arrow(axis, [(52, 13), (52, 19)], STATE)
    arrow(axis, [(63, 10), (83, 10), (83, 19)], STATE)
    arrow(axis, [(83, 10), (115, 10), (115, 19)], STATE)
    arrow(axis, [(52, 32), (52, 39)], STATE, linestyle="--")
    arrow(axis, [(83, 32), (83, 39)], STATE, linestyle="--")
    arrow(axis, [(115, 32), (115, 35.5), (96.5, 35.5), (96.5, 57), (94, 57)], STATE, linestyle="--")
    caption = (
        "R rows (environments when acting, steps of a batch when learning), N agents, A actions, O observation and\n"
        "S state features. Dashed: generated weights. A second copy of agent, g and mixer makes the targets."
    )
    axis.text(65, 1.6, caption, ha="center", va="center", fontsize=10, color=INK)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def batch_rows(lengths: tuple[int, ...]) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """(episode, t) of each row, sizes and now, for episodes of these lengths, the longest first."""
    rows = [(b, t) for t in range(max(lengths) + 1) for b in range(len(lengths)) if t <= lengths[b]]
    sizes = [sum(t == time for _, time in rows) for t in range(max(lengths) + 1)]
    return rows, sizes, [i for i, (b, t) in enumerate(rows) if t < lengths[b]]


def batch(path: Path) -> None:
    """Episodes of different lengths as rows in order of time."""
    figure, axis = canvas(13, 6.3)
    (rows, sizes, now), B, colors = batch_rows(LENGTHS), len(LENGTHS), ("#4477aa", "#ddaa33", "#aa3377")

    def cell(x, y, b, t, width=8, height=5, row=""):
        last = t == LENGTHS[b]
        axis.add_patch(plt.Rectangle((x, y), width, height, facecolor="white" if last else colors[b],
                                     edgecolor=colors[b], linewidth=2.5))  # fmt: skip
        axis.text(x + width / 2, y + height / 2, f"{row}{'abc'[b]}, t={t}", ha="center", va="center", fontsize=11,
                  color=colors[b] if last else "white", weight="bold")  # fmt: skip

    def text(x, y, words, size=11, **style):
        axis.text(x, y, words, va="center", fontsize=size, **style)

    text(3, 60, "episodes in the replay: L steps are L + 1 rows", 13, weight="bold")
    for b, length in enumerate(LENGTHS):
        text(3, 54 - 6.5 * b, f"{'abc'[b]}: L = {length}", 12, color=colors[b], weight="bold")
        for t in range(length + 1):
            cell(16 + 9 * t, 51.5 - 6.5 * b, b, t)
    text(68, 54, "A row: observations, state, action mask at time t,\nand the last action, reward and terminated flag")
    text(68, 51, "that led there.")
    text(
        68,
        45.5,
        "White: the row at t = L. It has no action of its own;\nit is there for the value after the last step.",
    )
    M, left, width, y = len(rows), 20, 10.6, 16
    title = f"the batch: all rows in order of time, no padding (B = {B} episodes, M = {M} rows, R = {len(now)})"
    text(3, 32.5, title, 13, weight="bold")
    for height, name in ((y + 2.5, "rows"), (y - 3.3, "sizes[t]"), (y - 9, "now")):
        text(3, height, name, 12, weight="bold")
    for i, (b, t) in enumerate(rows):
        cell(left + width * i, y, b, t, width - 0.8, row=f"row {i}\n")
    start = 0
    for t, size in enumerate(sizes):
        x0, x1 = left + width * start, left + width * (start + size) - 0.8
        axis.plot([x0, x0, x1, x1], [y - 1, y - 1.6, y - 1.6, y - 1], color=INK, linewidth=1.3)
        axis.text((x0 + x1) / 2, y - 3.3, f"sizes[{t}] = {size}", ha="center", va="center", fontsize=11)
        start += size
    for i, row in enumerate(now):
        middle = left + width * row + width / 2 - 0.4
        axis.text(middle, y - 9, f"now[{i}] = {row}", ha="center", va="center", fontsize=11)
        follows = left + width * (B + i) + width / 2 - 0.4
        axis.add_patch(FancyArrowPatch((middle, y + 5.2), (follows - 1, y + 5.2), connectionstyle="arc3,rad=-0.33",
                                       arrowstyle="-|>", mutation_scale=12, linewidth=1.5,
                                       color=colors[rows[row][0]]))  # fmt: skip
    words = "Arrows: the row after now[i] is row B + i. So values of the next step are rows[B:], the GRU goes through"
    text(3, 2.2, f"{words} split(sizes), and no mask is needed.")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def teaser(path: Path) -> None:
    """A battle, and what results/ says about the two algorithms."""
    sys.path.insert(0, str(HERE.parent))
    import plot

    runs = plot.read_runs([str(HERE.parent / "results" / name) for name in ("smacv2_sim_1M", "smacv2_sim_2M", "mpe")])
    groups, _ = plot.strata_of(runs)
    settings = plot.Args(folders=[])
    names = {f"{algorithm}_{game}": name for game in ("smacv2", "mpe")
             for algorithm, name in (("qmix", "QMIX"), ("softqmix", "Soft-QMIX"))}  # fmt: skip
    with plt.rc_context({"font.size": 15, "axes.spines.top": False, "axes.spines.right": False}):
        figure = plt.figure(figsize=(16, 6.4))
        still = figure.add_axes((0.012, 0.05, 0.32, 0.9))  # 512 x 576 pixels, as they are
        still.imshow(plt.imread(HERE / "battle.png"), interpolation="none")
        still.axis("off")
        grid = figure.add_gridspec(2, 2, left=0.405, right=0.985, top=0.84, bottom=0.19, hspace=0.55, wspace=0.25)
        for k, task in enumerate(("terran_5_vs_5", "zerg_5_vs_5", "protoss_5_vs_5", "spread hard")):
            axis, spread = figure.add_subplot(grid[divmod(k, 2)]), task.startswith("spread")
            for (place, label), (seeds,) in groups.items():
                if place.split(" (")[0] == task and label in names:
                    measure = "return_mean" if spread else "win_rate"
                    x, middle, low, high, _ = plot.band([seeds], "step", measure, settings)
                    color = f"C{sorted(set(names.values())).index(names[label])}"
                    axis.plot(x / 1e6, middle, color=color, linewidth=2.5, label=names[label])
                    axis.fill_between(x / 1e6, low, high, color=color, alpha=0.2, linewidth=0)
            axis.set_title(f"{'MPE' if spread else 'SMACv2'} {task.replace('_', ' ')}", fontsize=16)
            axis.set(ylim=(-420, -200) if spread else (0, 0.9), xlim=(0, None))
            axis.set_yticks((-400, -300, -200) if spread else (0, 0.25, 0.5, 0.75))
            axis.set_ylabel("test return" if spread else "test win rate")
            axis.grid(alpha=0.3)
            if k > 1:
                axis.set_xlabel("million steps")
        figure.legend(*axis.get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.69, 1.02), ncols=2,
                      frameon=False, fontsize=18)  # fmt: skip
        caption = "SMACv2 on the bundled simulator; mean of three seeds, band: 95 % interval"
        figure.text(0.69, 0.015, caption, ha="center", fontsize=14, color=INK)
        figure.savefig(path, dpi=100)
        plt.close(figure)


def main(folder: Path) -> None:
    for draw in (architecture, batch, teaser):
        path = folder / f"{draw.__name__}.png"
        draw(path)
        print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
