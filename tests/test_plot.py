"""plot.py: grouping, averages and intervals by hand-computed numbers, the picture, and what is said of bad input."""

import json
import sys

import matplotlib.figure
import numpy as np
import pytest
from PIL import Image

import plot


def write_run(folder, name, seed, win_rates, backend="sim", **options):
    """A finished run with an evaluation every 10,000 steps."""
    folder.mkdir(parents=True)
    args = {"exp_name": name, "map": "zerg_5_vs_5", "seed": seed, **options}
    (folder / "config.json").write_text(json.dumps({"args": args, "backend": backend, "simulator_version": "1"}))
    rows = [f"{10_000 * i},{w},{10 * w},{60 * i}" for i, w in enumerate(win_rates)]
    (folder / "metrics.csv").write_text("\n".join(["step,win_rate,return_mean,seconds", *rows]))


def run_plot(monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, options)])
    return plot.main(), capsys.readouterr()


def cells(printed):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.out.splitlines() if "zerg" in line]


def test_table_and_picture(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", "soft", 1, [0.0, 0.4, 0.5], alpha=0.03)
    write_run(tmp_path / "b", "soft", 2, [0.0, 0.6, 0.7], alpha=0.03, younger_option=True)
    write_run(tmp_path / "c", "soft", 1, [0.0, 0.0, 0.0], alpha=0.5)
    write_run(tmp_path / "d", "soft", 1, [1.0, 1.0, 1.0], backend="starcraft2", alpha=0.03)
    write_run(tmp_path / "f", "qmix", 1, [0.0, 0.0, 0.0])
    write_run(tmp_path / "g", "qmix", 2, [0.0, 0.0, 0.0], td_weight=1)
    write_run(tmp_path / "h", "qmix", 3, [0.0, 0.0, 0.0], td_weight=0.1)
    options = ("--out", tmp_path / "x.png", "--final", 2, "--at", 20_000, 20_000)  # twice: one column
    code, printed = run_plot(monkeypatch, capsys, tmp_path, tmp_path / "a", *options)  # a, too: still one seed
    assert code == 0
    assert printed.err == ""
    assert printed.out.splitlines()[-1] == f"Picture: {tmp_path / 'x.png'}"
    rows = cells(printed)
    assert [row[:4] for row in rows] == [
        ["zerg_5_vs_5 (sim 1)", "qmix", "win_rate", "1"],  # older than the option in which the others differ
        ["zerg_5_vs_5 (sim 1)", "qmix td_weight=0.1", "win_rate", "1"],
        ["zerg_5_vs_5 (sim 1)", "qmix td_weight=1", "win_rate", "1"],
        ["zerg_5_vs_5 (sim 1)", "soft alpha=0.03", "win_rate", "2"],
        ["zerg_5_vs_5 (sim 1)", "soft alpha=0.5", "win_rate", "1"],
        ["zerg_5_vs_5 (starcraft2 1)", "soft", "win_rate", "1"],  # never averaged with the simulator's
    ]
    # At 20,000 .3 and .4333, final .45 and .65, area .325 and .475; the standard deviation of two is |a - b| / sqrt 2
    assert rows[3][4:] == ["20,000", "0.367 +- 0.094", "0.55 +- 0.14", "0.4 +- 0.11"]
    assert Image.open(tmp_path / "x.png").width > 800


def test_table_averages_the_last_50000_steps_and_stops_with_the_shortest_run(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", "soft", 1, [0.0] * 6 + [0.5] * 5)  # 100,000 steps
    write_run(tmp_path / "b", "soft", 2, [0.0] * 6 + [0.5] * 2)  # 70,000
    options = ("--out", tmp_path / "x.svg", "--final", 1, "--at", 70_000, 100_000)
    _, printed = run_plot(monkeypatch, capsys, tmp_path, *options)
    # At 70,000: (0 + 0 + 0 + .5 + .5) / 5; 100,000: not all got there; area: (.25 + .5) / 7
    assert cells(printed)[0][3:] == ["2", "70,000", "0.2 +- 0", "", "0.5 +- 0", "0.107 +- 0"]
    assert "95 % t interval" in (tmp_path / "x.svg").read_text()  # the caption, in a comment of the file


def curve(step, win_rate):
    return plot.Run("", "", {}, 1, {"step": np.array(step, float), "win_rate": np.array(win_rate, float)})


@pytest.mark.parametrize(
    ("win_rates", "mean", "half"),
    [
        ([[0.2, 0.6]], [0.2, 0.6], [0, 0]),
        ([[0, 1], [1, 3]], [0.5, 2], [12.71 / 2, 12.71]),  # t(1) s / sqrt 2, s = |a - b| / sqrt 2
        ([[0, 0], [1, 5], [2, 10]], [1, 5], [4.30 / 3**0.5, 5 * 4.30 / 3**0.5]),  # t(2) s / sqrt 3, s = 1 and 5
    ],
    ids=["1 seed", "2 seeds", "3 seeds"],
)
def test_band_is_mean_and_t_interval_over_seeds(win_rates, mean, half):
    found = plot.band([curve([0, 10], values) for values in win_rates], "step", "win_rate", 1)
    np.testing.assert_allclose(found, [[0, 10], mean, half], atol=1e-12)


def test_band_smooths_and_interpolates_as_far_as_the_shortest_run_goes():
    runs = [curve([0, 10, 20, 30], [0, 1, 2, 9]), curve([0, 5, 20], [2, 4, 0])]
    points, mean, _ = plot.band(runs, "step", "win_rate", 2)  # smoothed: 0, .5, 1.5, 5.5 and 2, 3, 2
    np.testing.assert_allclose(points, [0, 5, 10, 20])
    np.testing.assert_allclose(mean, [(0 + 2) / 2, (0.25 + 3) / 2, (0.5 + 3 - 1 / 3) / 2, (1.5 + 2) / 2])


def test_nothing_to_plot_is_said_in_one_sentence(tmp_path, monkeypatch, capsys):
    for folders, sentence in (([tmp_path], "error: no metrics.csv below"), ([], "error: There is no folder")):
        code, printed = run_plot(monkeypatch, capsys, *folders)
        assert code == 2
        assert printed.err.startswith(sentence)
        assert len(printed.err.splitlines()) == 1


def edit(old, new):
    return lambda file: file.write_text(file.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("config.json", lambda file: file.unlink(), "no config.json"),
        ("config.json", lambda file: file.write_text("{"), "config.json is not one of"),
        ("config.json", lambda file: file.write_text("[]"), "config.json is not one of"),
        ("config.json", edit("backend", "payoff"), "config.json is not one of"),  # the matrix scripts' have none
        ("metrics.csv", lambda file: file.write_text(""), "before the first test"),
        ("metrics.csv", edit("0.25,2.5,60", "0.25,2."), "incomplete line"),
        ("metrics.csv", edit("0.25", "won"), "other than numbers"),
        ("metrics.csv", edit("0.25", "nan"), "other than numbers"),
        ("metrics.csv", edit("step", "time"), "no column step"),
        ("metrics.csv", edit("seconds", "sps"), "no column seconds"),
        ("metrics.csv", edit("win_rate", "won"), "no column win_rate"),
    ],
)
def test_a_damaged_folder_is_skipped_with_its_reason(tmp_path, monkeypatch, capsys, name, damage, reason):
    write_run(tmp_path / "a", "soft", 1, [0.0, 0.25])
    damage(tmp_path / "a" / name)
    code, printed = run_plot(monkeypatch, capsys, tmp_path)
    warning, error = printed.err.splitlines()
    assert code == 2
    assert warning.startswith(f"warning: {tmp_path / 'a'} is skipped: ")
    assert reason in warning
    assert error.startswith("error: none of these runs")


@pytest.mark.parametrize(
    "options",
    [
        ("--smooth", 0), ("--final", 0), ("--final", -5), ("--at", -5), ("--out", ""), ("--out", "x"),
        ("--out", "/tmp"), ("--out", "x.docx"), ("missing",),
    ],
    ids=lambda options: " ".join(map(str, options)),
)  # fmt: skip
def test_impossible_options_are_refused_in_one_sentence(tmp_path, monkeypatch, capsys, options):
    write_run(tmp_path / "a", "soft", 1, [0.0, 0.25])
    monkeypatch.chdir(tmp_path)
    code, printed = run_plot(monkeypatch, capsys, tmp_path, *options)
    assert code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert len(printed.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# --- The picture ---


def draw(monkeypatch, capsys, *options):
    """The panels with something in them, in order, of the picture that is written."""
    figures = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    assert run_plot(monkeypatch, capsys, *options)[0] == 0
    (figure,) = figures
    return [axes for axes in figure.axes if axes.lines]


def edges(axes, i=0) -> tuple[dict, dict]:
    """The i-th band's lower and upper edge, as {x: y}."""
    points = axes.collections[i].get_paths()[0].vertices
    return tuple({x: pick(y for there, y in points if there == x) for x in points[:, 0]} for pick in (min, max))


def test_lines_and_bands_stand_where_steps_hours_and_seeds_put_them(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", "soft", 1, [0.0, 0.4, 0.5])
    write_run(tmp_path / "b", "soft", 2, [0.0, 0.6, 0.5, 0.9])
    write_run(tmp_path / "c", "qmix", 1, [0.25, 0.25])
    panels = draw(monkeypatch, capsys, tmp_path, "--smooth", 1)
    labels = [(axes.get_xlabel(), axes.get_ylabel()) for axes in panels]
    measures = [(y, scale) for y, scale in (("test win rate", 1), ("test return", 10))]
    assert labels == [(x, y) for y, _ in measures for x in ("million steps", "hours")]
    for axes, (x, y) in zip(panels, labels, strict=True):
        scale, unit = dict(measures)[y], {"million steps": 10_000 / 1e6, "hours": 60 / 3600}[x]
        qmix, soft = axes.lines
        np.testing.assert_allclose(qmix.get_xydata(), [(0, scale * 0.25), (unit, scale * 0.25)])
        means = [0.0, 0.5, 0.5]  # as far as the shorter of the two runs goes
        np.testing.assert_allclose(soft.get_xydata(), [(i * unit, scale * m) for i, m in enumerate(means)], atol=1e-12)
        assert [line.get_label() for line in axes.lines] == ["qmix (1)", "soft (2)"]
        for edge, sign in zip(edges(axes, 1), (-1, 1), strict=True):
            halves = [0, 12.71 * 0.1, 0]  # t(1) s / sqrt 2, s = |a - b| / sqrt 2
            expected = [scale * (m + sign * h) for m, h in zip(means, halves, strict=True)]
            np.testing.assert_allclose([edge[i * unit] for i in range(3)], expected, atol=1e-12)
        assert len({line.get_color() for line in axes.lines}) == 2
        if scale == 1:
            assert axes.get_ylim() == (0, 1)


def test_lines_are_smoothed_by_what_came_before(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", "soft", 1, [0.0, 0.2, 0.7, 0.9])
    axes = draw(monkeypatch, capsys, tmp_path, "--smooth", 2)[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.0, 0.1, 0.45, 0.8])


def test_every_place_has_a_row_of_its_own(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", "soft", 1, [0.0, 0.2])
    write_run(tmp_path / "b", "soft", 1, [0.0, 0.4], backend="starcraft2")
    panels = draw(monkeypatch, capsys, tmp_path, "--smooth", 1)
    shown = [(axes.get_title(), axes.lines[0].get_ydata()[-1]) for axes in panels if axes.get_ylabel() != "test return"]
    assert shown == [("zerg_5_vs_5 (sim 1)", 0.2)] * 2 + [("zerg_5_vs_5 (starcraft2 1)", 0.4)] * 2


def test_values_on_the_way_end_at_their_step(tmp_path, monkeypatch, capsys):
    """In the middle of a run: what comes later does not count, nor what is 50,000 steps old."""
    write_run(tmp_path / "a", "soft", 1, [0.9] * 3 + [0.1] * 5 + [0.9] * 7)  # 140,000 steps; .1 from 30,000 to 70,000
    _, printed = run_plot(monkeypatch, capsys, tmp_path, "--out", tmp_path / "x.png", "--at", 70_000, 80_000, 20_000)
    # At 80,000: (4 * .1 + .9) / 5
    assert cells(printed)[0][5:8] == ["0.1", "0.26", "0.9"]
