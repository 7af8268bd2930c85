"""plot.py: grouping, statistics by hand-computed numbers, the picture, and what is said of bad input."""

import itertools
import json
import sys
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
from PIL import Image

import plot


def write_run(folder, name, seed, win_rates, backend="sim", algorithm=None, place="zerg_5_vs_5", **options):
    """A finished run with an evaluation every 10,000 steps; without an algorithm, one from before it was written."""
    folder.mkdir(parents=True)
    config = {"args": {"exp_name": name, "map": place, "seed": seed, **options}, "backend": backend}
    config |= {"simulator_version": "1", **({"algorithm": algorithm} if algorithm else {})}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [f"{10_000 * i},{w},{10 * w},{60 * i}" for i, w in enumerate(win_rates)]
    (folder / "metrics.csv").write_text("\n".join(["step,win_rate,return_mean,seconds", *rows]))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Pictures go to the folder in which the command is called."""
    monkeypatch.chdir(tmp_path)


def run_plot(monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, options)])
    return plot.main(), capsys.readouterr()


def cells(printed):
    lines = [line for line in printed.out.splitlines() if line.startswith("| ") and "where" not in line]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


# --- Which runs belong together ---


def test_table_and_picture(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", "soft", 1, [0.0, 0.4, 0.5], alpha=0.03)
    write_run(tmp_path / "b", "soft", 2, [0.0, 0.6, 0.7], alpha=0.03, checkpoint_interval=5)
    write_run(tmp_path / "c", "soft", 1, [0.0, 0.0, 0.0], alpha=0.5)
    write_run(tmp_path / "d", "soft", 1, [1.0, 1.0, 1.0], backend="starcraft2", alpha=0.03)
    write_run(tmp_path / "f", "qmix", 1, [0.0, 0.0, 0.0])
    write_run(tmp_path / "g", "qmix", 2, [0.0, 0.0, 0.0], td_weight=1)
    write_run(tmp_path / "h", "qmix", 3, [0.0, 0.0, 0.0], td_weight=0.1)
    for name in ("True", "False"):  # another game
        write_run(tmp_path / name, "vdn", 1, [0.0, 0.0, 0.0], env_options={"enemy_wipe": name == "True"})
    options = ("--out", tmp_path / "x.png", "--final", 2, "--at", 20_000, 20_000)  # twice: one column
    code, printed = run_plot(monkeypatch, capsys, tmp_path, tmp_path / "a", *options)  # a, too: still one seed
    assert code == 0
    assert printed.err == ""
    assert printed.out.splitlines()[-1] == f"Picture: {tmp_path / 'x.png'}"
    rows = cells(printed)
    assert [row[:4] for row in rows] == [
        ["zerg_5_vs_5 (sim 1)", "qmix", "win_rate", "1 (few)"],  # does not know the option that the others have
        ["zerg_5_vs_5 (sim 1)", "qmix td_weight=0.1", "win_rate", "1 (few)"],
        ["zerg_5_vs_5 (sim 1)", "qmix td_weight=1", "win_rate", "1 (few)"],
        ["zerg_5_vs_5 (sim 1)", "soft alpha=0.03", "win_rate", "2 (few)"],
        ["zerg_5_vs_5 (sim 1)", "soft alpha=0.5", "win_rate", "1 (few)"],
        ["zerg_5_vs_5 (sim 1)", "vdn env_options={'enemy_wipe': False}", "win_rate", "1 (few)"],
        ["zerg_5_vs_5 (sim 1)", "vdn env_options={'enemy_wipe': True}", "win_rate", "1 (few)"],
        ["zerg_5_vs_5 (starcraft2 1)", "soft", "win_rate", "1 (few)"],  # never averaged with the simulator's
    ]
    # At 20,000 .3 and .4333, final .45 and .65, area .325 and .475; the standard deviation of two is |a - b| / sqrt 2
    assert rows[3][4:] == ["20,000", "0.367 +- 0.094", "0.55 +- 0.14", "0.4 +- 0.11", "0.45 to 0.65"]
    assert Image.open(tmp_path / "x.png").width > 800


def test_algorithms_under_one_name_are_never_averaged(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", "mine", 1, [0.5], algorithm="softqmix_smacv2", alpha=0.03)
    write_run(tmp_path / "b", "mine", 2, [0.5], algorithm="qmix_smacv2")
    write_run(tmp_path / "c", "mine", 3, [0.5], algorithm="qmix_smacv2", mixer="vdn")  # only this one knows it
    write_run(tmp_path / "d", "qmix_smacv2", 1, [0.5], algorithm="qmix_smacv2")
    write_run(tmp_path / "e", "qmix_smacv2", 2, [0.5])  # older
    write_run(tmp_path / "f", "mine", 2, [0.5])  # older: of either, who knows
    code, printed = run_plot(monkeypatch, capsys, tmp_path, "--out", tmp_path / "x.png")
    assert code == 0
    assert [(row[1], row[3]) for row in cells(printed)] == [
        ("mine", "1 (few)"), ("qmix_smacv2", "1 (few)"), ("qmix_smacv2 (older)", "1 (few)"),
        ("qmix_smacv2 mine", "1 (few)"),
        ("qmix_smacv2 mine mixer=vdn", "1 (few)"), ("softqmix_smacv2 mine", "1 (few)"),
    ]  # fmt: skip


def test_older_runs_did_what_their_later_options_say(tmp_path, monkeypatch, capsys):
    """Published runs of one experiment differ in which options their script knew."""
    later = {"fix_enemy_wipe": False, "prob_obs_enemy": 1.0, "action_mask": True}
    write_run(tmp_path / "a", "qmix", 1, [0.5])
    write_run(tmp_path / "b", "qmix", 2, [0.5], **later)
    write_run(tmp_path / "c", "qmix", 3, [0.5], **later | {"prob_obs_enemy": 0.5})
    _, printed = run_plot(monkeypatch, capsys, tmp_path, "--out", tmp_path / "x.png")
    assert [(row[1], row[3]) for row in cells(printed)] == [
        ("qmix prob_obs_enemy=0.5", "1 (few)"), ("qmix prob_obs_enemy=1.0", "2 (few)")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "row"),
    [
        ("smacv2_sim", "| zerg_5_vs_5 (sim 1) | softqmix_smacv2 | win_rate | 3 (few) | 500,000 | 0.146 +- 0.014 | "
         "0.298 +- 0.069 | 0.573 +- 0.024 | 0.563 +- 0.017 | 0.34 +- 0.024 |"),
        ("smacv2_sim_1M", "| protoss_5_vs_5 (sim 1) | qmix_smacv2 | win_rate | 3 (few) | 1,000,000 | 0.117 +- 0.031 | "
         "0.129 +- 0.052 | 0.221 +- 0.043 | 0.442 +- 0.064 | 0.438 +- 0.068 | 0.246 +- 0.03 |"),
        ("mpe", "| spread simple (batched) | qmix_mpe | return_mean | 3 (few) | 1,000,000 | -380 +- 69 | "
         "-295 +- 170 | -178 +- 7.1 | -166 +- 1.8 | -166 +- 0.97 | -221 +- 30 |"),
    ],
)  # fmt: skip
def test_published_runs_give_the_published_figures(tmp_path, monkeypatch, capsys, folder, row):
    code, printed = run_plot(monkeypatch, capsys, plot.Path(plot.__file__).parent / "results" / folder,
                             "--out", tmp_path / "x.png")  # fmt: skip
    assert (code, printed.err) == (0, "")
    assert sum(line.startswith(row) for line in printed.out.splitlines()) == 1
    assert len(cells(printed)) == (2 if folder.endswith("1M") else 6)


# --- Runs of unequal length ---


def test_a_stopped_run_counts_as_far_as_it_goes_and_is_named(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", "soft", 1, [0.0] * 6 + [0.5] * 5)  # 100,000 steps
    write_run(tmp_path / "b", "soft", 2, [0.0] * 6 + [0.5] * 2)  # 70,000
    write_run(tmp_path / "c", "soft", 3, [0.0] * 6 + [0.7] * 5)
    options = ("--out", tmp_path / "x.svg", "--final", 1, "--at", 70_000, 100_000)
    _, printed = run_plot(monkeypatch, capsys, tmp_path, *options)
    # At 70,000: (0 + 0 + 0 + .5 + .5) / 5 twice and .28; then .5 and .7 of two seeds; area: (.25 + 4 * .5) / 10, * 1.4
    assert cells(printed)[0][3:] == [
        "3 (few)", "70,000 to 100,000", "0.227 +- 0.046", "0.6 +- 0.14 (2 of 3)", "0.6 +- 0.14 (2 of 3)",
        "0.27 +- 0.064 (2 of 3)", "0.5 to 0.7",
    ]  # fmt: skip
    where = f"zerg_5_vs_5 (sim 1), soft: {tmp_path / 'b'}"
    assert printed.err == f"warning: {where} stops at 70,000 of 100,000 steps and counts as far as it goes.\n"
    text = (tmp_path / "x.svg").read_text()  # the caption, in a comment of the file
    assert "95 % bootstrap interval" in text
    assert "Cross: a run stopped early" in text


def curve(step, win_rate):
    columns = {"step": np.array(step, float), "win_rate": np.array(win_rate, float)}
    return plot.Run(plot.Path(), "", "", "", "", {}, 1, columns)


def band(strata, **settings):
    """Points, statistic, both ends of the interval, and where runs stop."""
    return plot.band(strata, "step", "win_rate", plot.Args([], **{"smooth": 1} | settings))


def test_a_curve_goes_as_far_as_the_longest_and_marks_where_seeds_stop():
    runs = [curve([0, 10, 20, 30], [0, 1, 2, 3]), curve([0, 10], [4, 5]), curve([0, 10, 20, 30], [2, 3, 4, 7])]
    points, middle, low, high, stops = band([runs])
    np.testing.assert_allclose(points, [0, 10, 20, 30])
    np.testing.assert_allclose(middle, [2, 3, 3, 5])
    np.testing.assert_allclose(low, [0, 1, 2, 3])
    np.testing.assert_allclose(high, [4, 5, 4, 7])
    assert stops.tolist() == [False, True, False, False]


def test_one_test_more_or_less_is_no_difference():
    points, middle, _, _, stops = band([[curve([0, 10, 20], [0, 1, 9]), curve([0, 10], [4, 5])]])
    assert points.tolist() == [0, 10]
    assert middle.tolist() == [2, 3]
    assert not stops.any()


# --- Statistics ---


@pytest.mark.parametrize(
    ("win_rates", "mean", "low", "high"),
    [
        ([[0.2, 0.6]], [0.2, 0.6], [np.nan] * 2, [np.nan] * 2),
        ([[0, 1], [1, 3]], [0.5, 2], [0, 1], [1, 3]),  # a quarter of all draws of two is twice the lower one
        ([[0, 0], [1, 5], [2, 10]], [1, 5], [0, 0], [2, 10]),  # and one in 27 of three, more than 2.5 %
    ],
    ids=["1 seed", "2 seeds", "3 seeds"],
)
def test_band_is_mean_and_bootstrap_interval_over_seeds(win_rates, mean, low, high):
    found = band([[curve([0, 10], values) for values in win_rates]])
    np.testing.assert_allclose(found[:4], [[0, 10], mean, low, high], atol=1e-12)


@pytest.mark.parametrize("kind", ["mean", "iqm"])
def test_intervals_are_those_of_all_draws_within_each_map(kind):
    """Every way to draw three seeds of one map and four of another with replacement, 27 * 256 of them."""
    one, other = [0.1, 0.2, 0.6], [0.5, 0.7, 0.8, 2.0]
    values = []
    for a in itertools.product(one, repeat=3):
        for b in itertools.product(other, repeat=4):
            both = sorted(a + b)
            values.append(np.mean(both if kind == "mean" else both[1:-1]))  # a quarter of seven: one at either end
    low, high = plot.interval([np.array(one), np.array(other)], plot.center, kind=kind)
    np.testing.assert_allclose([low, high], np.percentile(values, [2.5, 97.5]), atol=0.03)
    middle = plot.center(np.array(one), np.array(other), kind=kind)
    assert middle == pytest.approx(4.9 / 7 if kind == "mean" else 2.8 / 5)


def test_probability_of_improvement_is_counted_map_by_map():
    """On the first map 5 of 6 pairs are won, on the second half of one."""
    x1, x2, y1, y2 = (np.array(values, float) for values in ([3, 1], [2], [0, 2, 0], [2]))
    assert plot.improvement(x1, x2, y1, y2) == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert np.isnan(plot.interval([x1, x2, y1, y2], plot.improvement)).all()  # a single seed
    draws = [np.mean([(a > b) + (a == b) / 2 for a in x for b in y])
             for x in itertools.product([3, 1], repeat=2) for y in itertools.product([0, 2, 0], repeat=3)]  # fmt: skip
    np.testing.assert_allclose(plot.interval([x1, y1], plot.improvement), np.percentile(draws, [2.5, 97.5]), atol=0.01)


def test_band_smooths_and_interpolates():
    runs = [curve([0, 10, 20, 30], [0, 1, 2, 9]), curve([0, 5, 20, 30], [2, 4, 0, 0])]
    points, mean, *_ = band([runs], smooth=2)  # smoothed: 0, .5, 1.5, 5.5 and 2, 3, 2, 0
    np.testing.assert_allclose(points, [0, 5, 10, 20, 30])
    np.testing.assert_allclose(mean, [(0 + 2) / 2, (0.25 + 3) / 2, (0.5 + 3 - 1 / 3) / 2, (1.5 + 2) / 2, 5.5 / 2])


def write_maps(tmp_path):
    """Two algorithms on two maps, two seeds each; qmix has a third map."""
    for place, low in (("terran_5_vs_5", 0.2), ("zerg_5_vs_5", 0.6)):
        for seed in (1, 2):
            write_run(tmp_path / f"{place}{seed}s", "soft", seed, [0.0, low + seed / 10], place=place)
            write_run(tmp_path / f"{place}{seed}q", "qmix", seed, [0.0, low + (seed - 1) / 10], place=place)


def test_aggregate_adds_a_row_and_a_panel_over_all_maps(tmp_path, monkeypatch, capsys):
    write_maps(tmp_path)
    options = ("--out", tmp_path / "x.png", "--aggregate", "--final", 1, "--at", 10_000)
    code, printed = run_plot(monkeypatch, capsys, tmp_path, *options)
    assert (code, printed.err) == (0, "")
    rows = {tuple(row[:2]): row[3:] for row in cells(printed)}
    assert len(rows) == 6
    # Final .3, .4, .7, .8; of 16 draws one has both lower ones, and one both upper ones
    assert rows["SMACv2 (sim 1), 2 maps", "soft"] == ["4 (few)", "10,000", "0.275", "0.55", "0.275", "0.5 to 0.6"]
    assert rows["SMACv2 (sim 1), 2 maps", "qmix"][3] == "0.45"
    axes = draw(monkeypatch, capsys, tmp_path, "--aggregate", "--smooth", 1)[-1]
    assert axes.get_title() == "SMACv2 (sim 1), 2 maps"
    np.testing.assert_allclose(axes.lines[1].get_ydata(), [0, 0.55], atol=1e-12)
    write_run(tmp_path / "third", "qmix", 1, [0.0], place="protoss_5_vs_5")
    _, printed = run_plot(monkeypatch, capsys, tmp_path, *options)
    assert printed.err == (
        "warning: SMACv2 (sim 1), 3 maps: soft has runs on 2 of them: do not compare its figures with others'.\n"
    )


def test_compare_says_how_likely_one_is_better(tmp_path, monkeypatch, capsys):
    write_maps(tmp_path)
    options = ("--out", tmp_path / "x.png", "--final", 1, "--compare", "soft", "qmix")
    code, printed = run_plot(monkeypatch, capsys, tmp_path, *options)
    assert code == 0
    # Of .3, .4 against .2, .3: three of four pairs, and one is equal
    said = "soft ends better than qmix with probability 0.88 (95 %: 0.50 to 1.00), few seeds, at 10,000 steps"
    both = said.replace("0.50 to", "0.62 to")  # .5 twice: one draw in 256
    lines = [line for line in printed.out.splitlines() if "probability" in line]
    assert lines == [
        f"terran_5_vs_5 (sim 1): {said}", f"zerg_5_vs_5 (sim 1): {said}", f"SMACv2 (sim 1), 2 maps: {both}"
    ]  # fmt: skip
    code, printed = run_plot(monkeypatch, capsys, tmp_path, "--compare", "soft", "vdn")
    assert (code, printed.err) == (
        2,
        "error: --compare names 'vdn', which is not in the table: choose of qmix, soft.\n",
    )


def test_the_untrained_test_is_none_of_the_last(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", "soft", 1, [0.0, 0.4, 0.6])
    write_run(tmp_path / "b", "qmix", 1, [0.25])
    rows = cells(run_plot(monkeypatch, capsys, tmp_path, "--json", tmp_path / "x.json")[1])
    assert {row[1]: row[-3] for row in rows} == {"soft": "0.5", "qmix": "0.25"}
    tree = json.loads((tmp_path / "x.json").read_text())["SMACv2 (sim 1)"]["zerg_5_vs_5"]
    assert tree["soft"]["seed_1"]["absolute_metrics"]["win_rate"] == [0.5]


def test_compare_over_all_maps_takes_those_that_both_played(tmp_path, monkeypatch, capsys):
    write_maps(tmp_path)
    write_run(tmp_path / "third", "qmix", 1, [0.0], place="protoss_5_vs_5")
    options = (tmp_path, "--out", tmp_path / "pictures/of/x.png", "--final", 1, "--compare", "soft", "qmix")
    lines = [line for line in run_plot(monkeypatch, capsys, *options)[1].out.splitlines() if "probability" in line]
    assert [line.split(":")[0] for line in lines] == [
        "terran_5_vs_5 (sim 1)", "zerg_5_vs_5 (sim 1)", "SMACv2 (sim 1), 2 maps"
    ]  # fmt: skip
    assert (tmp_path / "pictures/of/x.png").exists()
    write_run(tmp_path / "apart/a", "vdn", 1, [0.0, 0.5], place="terran_5_vs_5")
    write_run(tmp_path / "apart/b", "soft", 1, [0.0, 0.5], place="zerg_5_vs_5")
    options = (tmp_path / "apart", "--out", tmp_path / "x.png", "--compare", "soft", "vdn")
    code, printed = run_plot(monkeypatch, capsys, *options)
    assert code == 0
    assert "There is no map with runs of both soft and vdn." in printed.out
    write_run(tmp_path / "apart/c", "vdn", 1, [0.0, 0.4], place="zerg_5_vs_5")
    lines = [line for line in run_plot(monkeypatch, capsys, *options)[1].out.splitlines() if "probability" in line]
    assert [line.split(":")[0] for line in lines] == ["zerg_5_vs_5 (sim 1)"]


def test_compare_takes_both_at_the_same_step(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", "soft", 1, [0.0, 0.4, 0.5, 0.9])
    write_run(tmp_path / "b", "qmix", 1, [0.0, 0.5])
    options = ("--out", tmp_path / "x.png", "--final", 1, "--compare", "soft", "qmix")
    _, printed = run_plot(monkeypatch, capsys, tmp_path, *options)
    assert "soft ends better than qmix with probability 0.00 (no interval: a single seed)" in printed.out
    assert "few seeds, at 10,000 steps" in printed.out


def test_json_is_what_marl_eval_reads(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", "soft", 1, [0.0, 0.25], alpha=0.1)
    write_run(tmp_path / "b", "soft", 1, [0.0, 0.5], alpha=0.1)  # the same seed again
    write_run(tmp_path / "c", "soft", 1, [0.0, 0.75], alpha=0.2)
    files = ("--out", tmp_path / "x.png", "--json", tmp_path / "x.json")
    code, printed = run_plot(monkeypatch, capsys, tmp_path, *files, "--final", 1)
    assert code == 0
    assert printed.out.splitlines()[-1] == f"Runs: {tmp_path / 'x.json'}"
    assert "a seed is there more than once and counts as several" in printed.err
    tree = json.loads((tmp_path / "x.json").read_text())
    assert list(tree) == ["SMACv2 (sim 1)"]
    (task,) = tree.values()
    assert list(task) == ["zerg_5_vs_5"]
    assert {name: list(runs) for name, runs in task["zerg_5_vs_5"].items()} == {
        "soft alpha=0.1": ["seed_1", "seed_1-2"], "soft alpha=0.2": ["seed_1"]
    }  # fmt: skip
    assert task["zerg_5_vs_5"]["soft alpha=0.1"]["seed_1"] == {
        "step_0": {"step_count": 0, "win_rate": [0.0], "return_mean": [0.0]},
        "step_1": {"step_count": 10_000, "win_rate": [0.25], "return_mean": [2.5]},
        "absolute_metrics": {"win_rate": [0.25], "return_mean": [2.5]},
    }


# --- Bad input ---


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
        ("metrics.csv", edit("10000,", "0,"), "steps that do not rise"),
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


def test_a_test_of_one_episode_which_has_no_deviation_is_drawn(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", "soft", 1, [0.0, 0.25])
    (tmp_path / "a/metrics.csv").write_text("step,win_rate,return_mean,return_std,seconds\n0,0,1,nan,0\n9,1,2,nan,1\n")
    code, printed = run_plot(monkeypatch, capsys, tmp_path)
    assert (code, printed.err.count("skipped")) == (0, 0)


@pytest.mark.parametrize(
    "options",
    [
        ("--smooth", 0), ("--final", 0), ("--final", -5), ("--at", -5), ("--out", ""), ("--out", "x"),
        ("--out", "/tmp"), ("--out", "x.docx"), ("missing",), ("--columns", 0), ("--size", 0, 3), ("--size", 3, 1000),
        ("--labels", "soft"), ("--labels", "sof=Soft"), ("--compare", "soft", "other"),
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


def legend(axes) -> list[str]:
    return [text.get_text() for text in axes.figure.legends[0].get_texts()]


@pytest.mark.parametrize("x", ["steps", "hours"])
@pytest.mark.parametrize(
    ("measure", "y", "scale"), [("win_rate", "test win rate", 1), ("return_mean", "test return", 10)]
)
def test_lines_and_bands_stand_where_steps_hours_and_seeds_put_them(
    tmp_path, monkeypatch, capsys, x, measure, y, scale
):
    write_run(tmp_path / "a", "soft", 1, [0.0, 0.4, 0.5])
    write_run(tmp_path / "b", "soft", 2, [0.0, 0.6, 0.5])
    write_run(tmp_path / "c", "qmix", 1, [0.25, 0.25])
    (axes,) = draw(monkeypatch, capsys, tmp_path, "--smooth", 1, "--x", x, "--measure", measure)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ({"steps": "million steps"}.get(x, x), y)
    unit = {"steps": 10_000 / 1e6, "hours": 60 / 3600}[x]
    qmix, soft = axes.lines
    np.testing.assert_allclose(qmix.get_xydata(), [(0, scale * 0.25), (unit, scale * 0.25)])
    means = [0.0, 0.5, 0.5]
    np.testing.assert_allclose(soft.get_xydata(), [(i * unit, scale * m) for i, m in enumerate(means)], atol=1e-12)
    assert legend(axes) == ["qmix (1 seed, few)", "soft (2 seeds, few)"]
    for edge, sign in zip(edges(axes, 1), (-1, 1), strict=True):
        expected = [scale * (m + sign * h) for m, h in zip(means, [0, 0.1, 0], strict=True)]  # from seed to seed
        np.testing.assert_allclose([edge[i * unit] for i in range(3)], expected, atol=1e-12)
    assert len({line.get_color() for line in axes.lines}) == 2


def test_lines_are_smoothed_by_what_came_before(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", "soft", 1, [0.0, 0.2, 0.7, 0.9])
    axes = draw(monkeypatch, capsys, tmp_path, "--smooth", 2)[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.0, 0.1, 0.45, 0.8])


def test_every_place_has_one_panel(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", "soft", 1, [0.0, 0.2])
    write_run(tmp_path / "b", "soft", 1, [0.0, 0.4], backend="starcraft2")
    panels = draw(monkeypatch, capsys, tmp_path, "--smooth", 1, "--title", "All of $it")
    shown = [(axes.get_title(), axes.lines[0].get_ydata()[-1]) for axes in panels]
    assert shown == [("zerg_5_vs_5 (sim 1)", 0.2), ("zerg_5_vs_5 (starcraft2 1)", 0.4)]
    assert panels[0].figure.get_suptitle() == "All of $it"
    assert [axes.get_ylim() for axes in panels] == [(0, pytest.approx(0.44))] * 2  # win rates have one scale


def test_limits_follow_the_curves_and_not_a_bands_outlier(tmp_path, monkeypatch, capsys):
    for seed in range(1, 10):
        write_run(tmp_path / f"{seed}", "soft", seed, [-30.0, -20.0, -10.0 if seed < 9 else -1000.0, -10.0])
    (axes,) = draw(monkeypatch, capsys, tmp_path, "--smooth", 1, "--measure", "return_mean", "--statistic", "iqm")
    assert axes.get_ylim() == (pytest.approx(-316), pytest.approx(-84))
    assert min(edges(axes)[0].values()) < -1000


def test_labels_may_hold_anything_and_can_be_renamed(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", "_hidden", 1, [0.0, 0.2])
    write_run(tmp_path / "b", "$x", 1, [0.0, 0.4])
    write_run(tmp_path / "c", "soft", 1, [0.0, 0.4], alpha=0.1)
    write_run(tmp_path / "d", "soft", 1, [0.0, 0.4], alpha=0.2)
    run_plot(monkeypatch, capsys, tmp_path, "--out", tmp_path / "x.pdf")  # drawn, too: $ is no mathematics
    assert (tmp_path / "x.pdf").stat().st_size > 1000
    axes = draw(monkeypatch, capsys, tmp_path, "--labels", "soft alpha=0.1=Soft, α = .1", "$x=_Q$")[0]
    names = ("Soft, α = .1", "_Q$", "_hidden", "soft alpha=0.2")  # renamed ones first, as they were given
    assert legend(axes) == [f"{name} (1 seed, few)" for name in names]
    assert [handle.get_color() for handle in axes.figure.legends[0].legend_handles] == ["C0", "C1", "C2", "C3"]


def test_more_than_ten_groups_can_be_told_apart(tmp_path, monkeypatch, capsys):
    for i in range(25):
        write_run(tmp_path / f"{i}", f"soft{i:02}", 1, [0.0, 0.2])
    (axes,) = draw(monkeypatch, capsys, tmp_path)
    styles = {(line.get_color(), str(line.get_linestyle()), str(line._dash_pattern)) for line in axes.lines}
    assert len(styles) == 25
    handles = axes.figure.legends[0].legend_handles
    assert len({(handle.get_color(), str(handle._dash_pattern)) for handle in handles}) == 25


@pytest.mark.parametrize(
    ("label", "columns"), [("a", 3), ("softqmix, alpha=", 2), ("softqmix_mpe, alpha=0.3, use_f=False, use_g=", 1)]
)
def test_legend_and_caption_fit_into_the_picture(label, columns, tmp_path, monkeypatch, capsys):
    for i in range(4):
        write_run(tmp_path / f"{i}", f"{label}{i}", 1, [0.0] * 8)
    write_run(tmp_path / "longer", f"{label}0", 2, [0.0] * 11)  # that the other stopped early makes a cross
    (axes,) = draw(monkeypatch, capsys, tmp_path, "--statistic", "iqm", "--smooth", 2, "--size", 5.2, 3)
    axes.figure.canvas.draw()
    (legend,) = axes.figure.legends
    assert "Cross" in legend.get_title().get_text()
    assert legend._ncols == columns
    box, picture = legend.get_window_extent(), axes.figure.bbox
    assert 0 <= box.x0 <= box.x1 <= picture.width
    assert box.y0 >= 0


@pytest.mark.parametrize("name", ["curves.png", "runs.json"])
def test_a_full_disk_leaves_the_older_file(name, tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "runs" / "a", "soft", 1, [0.3, 0.4])
    options = (tmp_path / "runs", "--out", tmp_path / "curves.png", "--json", tmp_path / "runs.json")
    assert run_plot(monkeypatch, capsys, *options)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    write_bytes = Path.write_bytes

    def half(path, data):
        if not path.name.startswith(name):
            return write_bytes(path, data)
        write_bytes(path, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_bytes", half)
    code, captured = run_plot(monkeypatch, capsys, *options)
    assert code == 2
    assert f"{name} cannot be written" in captured.err
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_single_test_is_drawn_as_a_point(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", "soft", 1, [0.3])
    write_run(tmp_path / "b", "qmix", 1, [0.1, 0.2])
    (axes,) = draw(monkeypatch, capsys, tmp_path)
    assert [line.get_marker() for line in axes.lines if len(line.get_xdata()) == 1] == ["o"]
    assert sum(len(line.get_xdata()) == 1 for line in axes.lines) == 1
    assert "Cross" not in axes.figure.legends[0].get_title().get_text()


def test_five_seeds_are_not_few(tmp_path, monkeypatch, capsys):
    for seed in range(5):
        write_run(tmp_path / f"{seed}", "soft", seed, [0.0, 0.2])
    assert legend(draw(monkeypatch, capsys, tmp_path)[0]) == ["soft (5 seeds)"]


def test_pictures_have_the_size_and_resolution_that_is_asked_for(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", "soft", 1, [0.0, 0.2])
    run_plot(monkeypatch, capsys, tmp_path, "--out", tmp_path / "x.png", "--size", 3, 2)
    picture = Image.open(tmp_path / "x.png")
    assert picture.size == (600, 400)
    assert picture.info["dpi"] == pytest.approx((200, 200), rel=0.01)


def test_values_on_the_way_end_at_their_step(tmp_path, monkeypatch, capsys):
    """In the middle of a run: what comes later does not count, nor what is 50,000 steps old."""
    write_run(tmp_path / "a", "soft", 1, [0.9] * 3 + [0.1] * 5 + [0.9] * 7)  # 140,000 steps; .1 from 30,000 to 70,000
    _, printed = run_plot(monkeypatch, capsys, tmp_path, "--out", tmp_path / "x.png", "--at", 70_000, 80_000, 20_000)
    # At 80,000: (4 * .1 + .9) / 5
    assert cells(printed)[0][5:8] == ["0.1", "0.26", "0.9"]


def test_the_columns_of_the_table_are_told(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", "soft", 1, [0.0, 0.2])
    said = {
        (): ("mean +- standard deviation over seeds", "of a run's last 10 tests after step 0;"),
        ("--final", 1, "--statistic", "iqm"): ("inter-quartile mean over seeds", "of the last test;"),
    }
    for options, words in said.items():
        _, printed = run_plot(monkeypatch, capsys, tmp_path, "--out", tmp_path / "x.png", *options)
        (line,) = [line for line in printed.out.splitlines() if line.startswith("Cells: ")]
        assert all(word in line for word in words)
