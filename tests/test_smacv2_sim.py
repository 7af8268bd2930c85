"""envs/smacv2_sim.py: the package's interface against slow re-computations, and each rule of the battle alone."""

import io
import itertools

import numpy as np
import pytest
import torch

from envs import smacv2_sim as sim
from envs.smacv2_sim import EAST, FIRST_TARGET, NO_OP, NORTH, SOUTH, STOP, WEST, SMACv2Sim, random_actions

TYPES = {unit.name: unit for unit in sim.WOL_UNITS}
SMALL_MAPS = ["protoss_5_vs_5", "terran_5_vs_5", "zerg_5_vs_5"]
SIZES = {  # agents, enemies, actions, protoss observation and state, terran and zerg observation and state
    "5_vs_5": (5, 5, 11, 92, 130, 82, 120),
    "10_vs_10": (10, 10, 16, 182, 310, 162, 290),
    "10_vs_11": (10, 11, 17, 191, 327, 170, 306),
    "20_vs_20": (20, 20, 26, 362, 820, 322, 780),
    "20_vs_23": (20, 23, 29, 389, 901, 346, 858),
}


def unit(name, x, y, health=None, shield=None, cooldown=0, energy=0):
    """A tuple for load_battle, in full health unless told otherwise."""
    full = TYPES[name]
    return (
        name,
        x,
        y,
        full.health if health is None else health,
        full.shield if shield is None else shield,
        cooldown,
        energy,
    )


def battle(allies, enemies, race=None, **options):
    """A simulator with one battle of these units."""
    race = race or next(race for race, team in sim.RACES.items() if allies[0][0] in team.types)
    env = SMACv2Sim(f"{race}_{len(allies)}_vs_{len(enemies)}", 1, **options)
    env.load_battle(0, allies, enemies)
    return env


def units(env):
    """The units of battle 0, to read or change (U,)."""
    return env._world.units[0]


def loops(env, count):
    """Advance battle 0 by single loops without new actions."""
    for _ in range(count):
        sim.play_loop(units(env), env._rules.table, env._world.battles[0], env.num_agents)


def act(env, *actions):
    """Give battle 0 a step's orders without playing it."""
    for i, action in enumerate(actions):
        sim.give_order(units(env), i, action, env._rules)


def order(unit_row, target):
    unit_row["order"], unit_row["target"] = sim.TARGET, target


def rollout(env, steps, rng, every_step=None):
    """Play random actions; returns the list of step results. `every_step(result)` may look at each."""
    _, info = env.reset()
    results = []
    for _ in range(steps):
        results.append(env.step(random_actions(info["action_mask"], rng)))
        info = results[-1][4]
        if every_step:
            every_step(results[-1])
    return results


def equal(a, b):
    """Are two nested dicts, tuples or arrays the same, bit for bit?"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return np.array_equal(a, b)


# --- Names, sizes, arguments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("race", sim.RACES)
def test_sizes(race, size):
    n_agents, n_enemies, n_actions, *sizes = SIZES[size]
    obs_size, state_size = sizes[:2] if race == "protoss" else sizes[2:]
    env = SMACv2Sim(f"{race}_{size}", 2)
    obs, info = env.reset()
    assert (env.race, env.num_agents, env.num_enemies, env.episode_limit) == (race, n_agents, n_enemies, 200)
    assert (env.num_actions, env.obs_size, env.state_size) == (n_actions, obs_size, state_size)
    assert obs.shape == (2, n_agents, obs_size)
    assert info["state"].shape == (2, state_size)
    assert info["action_mask"].shape == (2, n_agents, n_actions)
    assert obs.dtype == info["state"].dtype == np.float32


@pytest.mark.parametrize("name", ["orc_5_vs_5", "zerg_0_vs_5", "zerg_5_vs_0", "zerg-5", "zerg_5_vs_5 ", "", None, 5])
def test_unknown_map(name):
    with pytest.raises(ValueError, match="unknown map"):
        SMACv2Sim(name, 1)


@pytest.mark.parametrize(
    "options",
    [{"num_envs": 0}, {"num_envs": 1.5}, {"seed": -1}, {"seed": 2**63}, {"unit_table": "hots"}, {"reward_scale": "x"}],
)
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is .*, expected "):
        SMACv2Sim("zerg_5_vs_5", **({"num_envs": 1} | options))


def test_parse_map_name():
    assert sim.parse_map_name("terran_10_vs_11") == ("terran", 10, 11)


def test_terran_with_more_agents_than_enemies_keeps_an_action_per_ally():
    assert SMACv2Sim("terran_4_vs_2", 1).num_actions == 10
    assert SMACv2Sim("zerg_4_vs_2", 1).num_actions == 8


# --- Observation, state, mask -----------------------------------------------------------------------------------------

GOLDEN_ALLIES = [
    unit("colossus", 8, 16, 150, 0, 12),
    unit("stalker", 10, 18, 80, 40),
    unit("stalker", 3.5, 31.2, 60, 80, 23),
    unit("zealot", 12, 16, 100, 50),
    unit("zealot", 20, 5, 0, 0),
]
GOLDEN_ENEMIES = [
    unit("stalker", 13.5, 16),
    unit("zealot", 15, 16, 50, 0),
    unit("colossus", 17, 20),
    unit("zealot", 13, 17, 0, 0),
    unit("stalker", 31, 2, 80, 20),
]


def numbers(text):
    return [float(word) for word in text.split()]


def test_golden_example():
    """What the real class returned for these units."""
    env = SMACv2Sim("protoss_5_vs_5", 1)
    env.load_battle(0, GOLDEN_ALLIES, GOLDEN_ENEMIES, last_actions=[6, 7, 3, 6, 0])
    obs, state, mask = env.observe(0)
    masks = ["01111111000", "01111111000", "01011100000", "01111110000", "10000000000"]
    assert ["".join(map(str, row.astype(int))) for row in mask] == masks
    empty = "0 " * 9
    expected_obs = {
        0: "1 1 1 1  1 .55 .55 0 1 1 1 0 0  1 .7 .7 0 .5 0 0 1 0  0 .9849 .9 .4 1 1 0 0 1 "
        + 2 * empty
        + "1 .2828 .2 .2 1 .5 1 0 0 "
        + empty
        + "1 .4 .4 0 1 1 0 1 0 "
        + empty
        + ".75 0 .25 .5 0 0 1",
        1: "1 1 1 1  1 .4031 .35 -.2 1 1 1 0 0  1 .5385 .5 -.2 .5 0 0 1 0  0 .728 .7 .2 1 1 0 0 1 "
        + 2 * empty
        + "1 .2828 -.2 -.2 .75 0 0 0 1 "
        + empty
        + "1 .2828 .2 -.2 1 1 0 1 0 "
        + empty
        + "1 .5 .3125 .5625 1 0 0",
        2: "0 1 1 1 " + 9 * empty + ".75 1 .1094 .975 1 0 0",
        4: "0 " * 92,
    }
    for agent, text in expected_obs.items():
        np.testing.assert_allclose(obs[agent], numbers(text), atol=6e-5)
    expected_state = numbers(
        ".75 .5 -.25 0 0 0 0 1  1 0 -.1875 .0625 .5 1 0 0  .75 .6571 -.3906 .475 1 1 0 0  1 0 -.125 0 1 0 1 0 "
        "0 0 0 0 0 0 0 0  1 -.0781 0 1 1 0 0  .5 -.0312 0 0 0 1 0  1 .0312 .125 1 0 0 1  0 0 0 0 0 0 0 "
        "1 .4688 -.4375 .25 1 0 0"
    )
    np.testing.assert_allclose(state[:75], expected_state, atol=6e-5)
    assert np.flatnonzero(state[75:]).tolist() == [6, 18, 25, 39, 44]
    assert state.shape == (130,)


def slow_views(env, e, last_actions):
    """Observation, state and mask of battle e from its raw units, written as the package's rules read."""
    rows = env._world.units[e]
    n, shields = env.num_agents, env.race == "protoss"
    names = [sim.UNIT_NAMES[kind] for kind in rows["type"]]
    bits = [[float(name == other) for other in sim.RACES[env.race].types] for name in names]
    x, y, alive, health = rows["x"], rows["y"], rows["alive"] > 0, rows["health"]

    def far(i, k):
        return float(np.hypot(x[i] - x[k], y[i] - y[k]))

    def body(k):
        return [float(rows["shield"][k] / TYPES[names[k]].shield)] + bits[k] if shields else bits[k]

    mask = np.zeros((n, env.num_actions), bool)
    for i in range(n):
        mask[i, NO_OP] = not alive[i]
        if alive[i]:
            mask[i, [STOP, SOUTH, WEST]] = True
            mask[i, NORTH], mask[i, EAST] = y[i] < 31, x[i] < 31
            reach = max(TYPES[names[i]].mask_range, 2)
            if names[i] == "medivac":
                targets = {j: j for j in range(n) if names[j] != "medivac"}
            else:
                targets = {j: n + j for j in range(env.num_enemies)}
            for j, k in targets.items():
                mask[i, FIRST_TARGET + j] = alive[k] and far(i, k) <= reach
    obs = []
    for i in range(n):
        if not alive[i]:
            obs.append([0.0] * env.obs_size)
            continue
        sight = TYPES[names[i]].sight
        row = [float(mask[i, a]) for a in (NORTH, SOUTH, EAST, WEST)]
        for k in [*range(n, len(rows)), *range(n)]:
            if k == i:
                continue
            first = float(mask[i, FIRST_TARGET + k - n]) if k >= n else 1.0
            features = [
                far(i, k) / sight,
                (x[k] - x[i]) / sight,
                (y[k] - y[i]) / sight,
                health[k] / TYPES[names[k]].health,
            ]
            filled = [first, *features, *body(k)]
            row += filled if alive[k] and far(i, k) < sight else [0.0] * len(filled)
        row += [health[i] / TYPES[names[i]].health, *body(i)[:shields], x[i] / 32, y[i] / 32, *bits[i]]
        obs.append(row)
    state = []
    for k in range(len(rows)):
        ready = rows["energy"][k] / 200 if names[k] == "medivac" else max(rows["cooldown"][k], 0)
        ready = ready if names[k] == "medivac" else ready / TYPES[names[k]].cooldown_divisor
        row = [health[k] / TYPES[names[k]].health, *[ready] * (k < n), (x[k] - 16) / 32, (y[k] - 16) / 32, *body(k)]
        state += row if alive[k] else [0.0] * len(row)
    for action in last_actions:
        state += [float(action == a) for a in range(env.num_actions)]
    return np.array(obs), np.array(state), mask


@pytest.mark.parametrize("map_name", [*SMALL_MAPS, "terran_10_vs_11", "terran_6_vs_3"])
def test_views_equal_a_slow_recomputation(map_name):
    env = SMACv2Sim(map_name, 3, seed=4)
    rng = np.random.default_rng(1)
    obs, info = env.reset()
    actions = np.full((3, env.num_agents), -1)
    for step in range(60):
        for e in range(3) if step % 5 == 0 else ():
            expected = slow_views(env, e, actions[e])
            np.testing.assert_allclose(obs[e], expected[0], atol=1e-6)
            np.testing.assert_allclose(info["state"][e], expected[1], atol=1e-6)
            assert (info["action_mask"][e] == expected[2]).all()
            assert equal(env.observe(e), (obs[e], info["state"][e], info["action_mask"][e]))
        actions = random_actions(info["action_mask"], rng)
        obs, _, terminated, _, info = env.step(actions)
        actions[terminated] = -1  # a new battle has no last actions


def test_sight_ends_before_its_radius():
    """An enemy exactly 10 away stays unseen by a stalker, while a range includes its end (6)."""
    for away, seen, attackable in ((10, 0, False), (9.99, 1, False), (6, 1, True)):
        obs, _, mask = battle([unit("stalker", 10, 16)], [unit("stalker", 10 + away, 16)]).observe(0)
        assert obs[0, 4 + 4] == seen
        assert mask[0, FIRST_TARGET] == attackable


@pytest.mark.parametrize("place", [31, 30.999, 1, 0.5])
def test_north_and_east_close_at_31_and_south_and_west_never(place):
    """The package looks one cell ahead: at 31 that is the border itself, 0.5 - 1 it rounds to 0."""
    env = battle([unit("marine", place, 16), unit("marine", 16, place)], [unit("marine", 4, 4)] * 2)
    for row, closed in zip(env.observe(0)[2], (EAST, NORTH), strict=True):
        expected = [action != closed or place < 31 for action in (NORTH, SOUTH, EAST, WEST)]
        assert row[[NORTH, SOUTH, EAST, WEST]].tolist() == expected


def test_medivac_reads_its_heal_mask_in_the_enemy_rows():
    allies = [unit("marine", 10 + i, 16) for i in range(4)] + [unit("medivac", 13, 17)]
    env = battle(allies, [unit("marine", 15 + i, 16) for i in range(5)])
    obs, _, mask = env.observe(0)
    column = obs[4, 4 : 4 + 5 * 8 : 8]
    assert column.tolist() == [1, 1, 1, 1, 0] == mask[4, FIRST_TARGET:].tolist()
    assert (obs[4, 4 + 1 : 4 + 5 * 8 : 8] > 0).all()  # though all five enemies are in sight


# --- Teams and starts -------------------------------------------------------------------------------------------------


def draw(map_name, count, seed=0):
    """Types (count, U) and asked-for points (count, U, 2) before unpacking."""
    env = SMACv2Sim(map_name, 1, seed=seed)
    num_units = env.num_agents + env.num_enemies
    types, points = np.empty((count, num_units), np.int64), np.empty((count, num_units, 2))
    for k in range(count):
        sim.draw_battle(env._world.battles[0], env._rules, types[k], points[k])
    return env, types, points


@pytest.mark.parametrize("race", sim.RACES)
def test_team_distribution(race):
    env, types, _ = draw(f"{race}_10_vs_11", 4000)
    n = env.num_agents
    assert (types[:, :n] == types[:, n : 2 * n]).all()  # the same list on both sides
    names = sim.RACES[race].types
    shares = [(types[:, :n] == sim.UNIT_NAMES.index(name)).mean() for name in names]
    np.testing.assert_allclose(shares, [0.45, 0.45, 0.10], atol=0.01)
    surplus = [(types[:, 2 * n] == sim.UNIT_NAMES.index(name)).mean() for name in names]
    expected = [0.45, 0.45, 0.10] if race == "protoss" else [0.5, 0.5, 0]
    np.testing.assert_allclose(surplus, expected, atol=0.03)
    assert race == "protoss" or surplus[2] == 0


@pytest.mark.parametrize("race", ["terran", "zerg"])
def test_no_team_is_all_exception(race):
    _, types, _ = draw(f"{race}_1_vs_1", 2000)
    assert (types != sim.UNIT_NAMES.index(sim.RACES[race].exception)).all()
    _, types, _ = draw(f"{race}_2_vs_2", 4000)
    rare = types[:, :2] == sim.UNIT_NAMES.index(sim.RACES[race].exception)
    assert not rare.all(1).any()
    assert rare.any(1).mean() == pytest.approx(0.18 / 0.99, abs=0.02)


@pytest.mark.parametrize(
    ("map_name", "median", "anyone", "share"),
    [
        ("protoss_5_vs_5", 7.3, 0.66, 0.31),
        ("terran_5_vs_5", 7.1, 0.70, 0.34),
        ("zerg_5_vs_5", 7.1, 0.61, 0.27),
        ("protoss_10_vs_11", 5.4, 0.80, 0.34),
        ("terran_20_vs_23", 4.4, 0.84, 0.39),
        ("zerg_20_vs_23", 4.5, 0.77, 0.29),
    ],
)
def test_start_geometry(map_name, median, anyone, share):
    """Nearest pair, and who is in sight at the start: figures of 3,000 starts by the package's generators."""
    env, types, points = draw(map_name, 4000)
    n = env.num_agents
    away = np.hypot(*np.moveaxis(points[:, :n, None] - points[:, None, n:], -1, 0))
    sees = away < env._rules.table["sight"][types[:, :n, None]]
    assert np.median(away.min((1, 2))) == pytest.approx(median, abs=0.4)
    assert sees.any((1, 2)).mean() == pytest.approx(anyone, abs=0.04)
    assert sees.any(1).mean() == pytest.approx(share, abs=0.02)


def test_start_kinds():
    env, _, points = draw("terran_10_vs_11", 4000)
    n = env.num_agents
    surrounded = (points[:, :n] == 16).all((1, 2))
    assert surrounded.mean() == pytest.approx(0.5, abs=0.03)
    mirror = points[~surrounded]
    assert (mirror[:, :n, 0] < 15).all()
    np.testing.assert_allclose(mirror[:, n : 2 * n, 0], 32 - mirror[:, :n, 0])
    assert (mirror[:, n : 2 * n, 1] == mirror[:, :n, 1]).all()
    assert (mirror[:, 2 * n, 0] >= 16).all()
    enemies = points[surrounded][:, n:]
    dx, dy = np.abs(np.moveaxis(enemies - 16, -1, 0))
    np.testing.assert_allclose(dx, dy, atol=1e-9)  # on a diagonal, 2 to 16 from the centre along each axis
    assert dx.min() >= 2
    assert dx.max() <= 16
    groups = np.array([len(np.unique(rows, axis=0)) for rows in enemies])
    assert groups.min() == 1
    assert groups.max() == 4
    diagonals = [len(np.unique(np.sign(rows - 16), axis=0)) for rows in enemies]
    assert (groups == diagonals).all()  # no two groups on one diagonal
    # With g equally likely to be 1..4 and 11 enemies, few groups stay empty: one group has probability 0.2502.
    assert (groups == 1).mean() == pytest.approx(0.25, abs=0.03)


def test_units_take_the_free_places_nearest_to_their_points():
    """Rings a quarter cell apart with 8, 16, ... places; marines need 0.75 between them, a medivac flies over them.

    Of 0.45 from another, the first free place is on the second ring: 0.75^2 <= 0.45^2 + 0.5^2 - 0.45 cos(angle) from
    104 degrees on, and the places are 22.5 apart.
    """
    types = np.array([sim.MARINE, sim.MEDIVAC, sim.MARINE, sim.MARINE])
    points = np.array([[16, 16], [16, 16], [15.55, 16], [0, 0]])
    sim.unpack_points(sim.compile_unit_table(sim.WOL_UNITS), types, points)
    angle = np.deg2rad(112.5)
    third = [15.55 + 0.5 * np.cos(angle), 16 + 0.5 * np.sin(angle)]
    np.testing.assert_allclose(points, [[16, 16], [16, 16], third, [0.375, 0.375]])


@pytest.mark.parametrize("map_name", ["protoss_20_vs_23", "terran_20_vs_23", "zerg_20_vs_23"])
def test_spawned_units_stand_apart_and_agents_are_sorted(map_name):
    env = SMACv2Sim(map_name, 40)
    rows, table = env._world.units, env._rules.table
    for row in rows:
        body = table[row["type"]]
        away = np.hypot(row["x"][:, None] - row["x"], row["y"][:, None] - row["y"])
        gap = np.where(body["plane"][:, None] == body["plane"], body["separation"][:, None] + body["separation"], 0)
        np.fill_diagonal(gap, 0)
        assert (away >= gap - 1e-9).all()
        for axis in ("x", "y"):
            assert (row[axis] >= body["radius"]).all()
            assert (row[axis] <= 32 - body["radius"]).all()
        agents = [tuple(agent) for agent in row[["type", "x", "y"]][: env.num_agents].tolist()]
        assert agents == sorted(agents)
        for name in ("health", "shield"):
            assert (row[name] == body[name]).all()
        assert (row["cooldown"] == 0).all()
        assert (row["energy"] == np.where(row["type"] == sim.MEDIVAC, 50, 0)).all()
    assert set(env._world.battles["phase"]) == set(range(8))


# --- Reward and endings -----------------------------------------------------------------------------------------------


def raw_reward(before, after, won=False):
    """The package's reward before scaling. Enemies as (health + shield, or None once dead)."""
    lost = kills = 0
    for old, new in zip(before, after, strict=True):
        if old is not None:
            lost += old - (new or 0)
            kills += new is None
    return max(lost + 10 * kills, 0) + 200 * won


def enemy_pools(env, state):
    """Each enemy's health + shield from a state vector, None for the dead."""
    shields = env.race == "protoss"
    first, width = env.num_agents * (7 + shields), 6 + shields
    types = sim.RACES[env.race].types
    pools = []
    for row in state[first : first + env.num_enemies * width].reshape(-1, width):
        if row[-3:].sum() == 0:
            pools.append(None)
        else:
            full = TYPES[types[int(row[-3:].argmax())]]
            pools.append(row[0] * full.health + (row[3] * full.shield if shields else 0))
    return pools


def test_golden_reward():
    assert raw_reward([160, 50, 350, None, 100], [110, None, 350, None, 101]) == 109
    assert raw_reward([160, 50], [161, 50.5]) == 0


@pytest.mark.parametrize("map_name", SMALL_MAPS)
def test_reward_equals_a_slow_recomputation(map_name):
    env = SMACv2Sim(map_name, 64, seed=2)
    _, info = env.reset()
    raw, clamped, wins = [], 0, 0
    for _ in range(90):
        before = info["state"]
        _, reward, terminated, _, info = env.step(sim.nearest_attack_actions(env, info["action_mask"]))
        for e in range(64):
            state = info["final_info"]["state"][e] if terminated[e] else info["state"][e]
            old, new = enemy_pools(env, before[e]), enemy_pools(env, state)
            expected = raw_reward(old, new, info["battle_won"][e])
            assert reward[e] == pytest.approx(expected / (env.max_reward[e] / 20), abs=2e-4)
            raw.append(expected)
            wins += info["battle_won"][e]
            clamped += expected == 0 and sum(b or 0 for b in new) > sum(a or 0 for a in old) + 0.01
    assert wins > 0
    assert map_name == "terran_5_vs_5" or clamped > 0  # regeneration alone would have been negative


@pytest.mark.parametrize(
    ("map_name", "expected", "tolerance"),
    [
        ("protoss_5_vs_5", 1117, 8),
        ("terran_5_vs_5", 707, 4),
        ("zerg_5_vs_5", 524, 2),
        ("protoss_10_vs_11", 2228, 12),
        ("terran_10_vs_11", 1310, 8),
        ("zerg_10_vs_11", 914, 4),
        ("protoss_20_vs_23", 4440, 20),
        ("terran_20_vs_23", 2533, 12),
        ("zerg_20_vs_23", 1685, 6),
    ],
)
def test_max_reward(map_name, expected, tolerance):
    """The package's mean constants, and ours against the mean over drawn teams."""
    env = SMACv2Sim(map_name, 3000, reward_scale="first_episode")
    exact = sim.expected_max_reward(*sim.parse_map_name(map_name))
    assert exact == pytest.approx(expected, abs=tolerance)
    assert env.max_reward.mean() == pytest.approx(exact, abs=4 * env.max_reward.std() / 3000**0.5)
    assert (SMACv2Sim(map_name, 2).max_reward == exact).all()


def test_expected_max_reward_is_exact_for_rejected_teams():
    # Teams of two: the pair (medivac, medivac) is drawn again.
    weights, health = {"a": 0.45, "b": 0.45, "m": 0.10}, {"a": 45, "b": 125, "m": 150}
    pairs = {(p, q): weights[p] * weights[q] for p in weights for q in weights if (p, q) != ("m", "m")}
    mean = sum(chance * (health[p] + health[q]) for (p, q), chance in pairs.items()) / sum(pairs.values())
    assert sim.expected_max_reward("terran", 2, 2) == pytest.approx(220 + mean)
    assert sim.expected_max_reward("terran", 2, 1) == pytest.approx(210 + mean / 2)
    assert sim.expected_max_reward("terran", 2, 3) == pytest.approx(230 + mean + 85)


def test_first_episode_scale_is_frozen():
    env = SMACv2Sim("protoss_5_vs_5", 8, seed=3, reward_scale="first_episode")
    body = env._rules.table[env._world.units["type"][:, 5:]]
    first = 250 + (body["health"] + body["shield"]).sum(1)
    assert (env.max_reward == first).all()
    results = rollout(env, 120, np.random.default_rng(0))
    assert sum(result[2].sum() for result in results) >= 8
    env.reset()
    assert (env.max_reward == first).all()


@pytest.mark.parametrize(
    ("race", "allies", "enemies", "over", "won"),
    [
        ("protoss", "zealot zealot", "zealot zealot", False, False),
        ("protoss", "- -", "zealot -", True, False),
        ("protoss", "zealot -", "- -", True, True),
        ("protoss", "- -", "- -", True, False),
        ("zerg", "- -", "- -", True, False),
        ("terran", "marine medivac", "medivac marine", False, False),
        ("terran", "medivac medivac", "marine marine", True, False),
        ("terran", "medivac -", "- -", True, False),
        ("terran", "marine -", "medivac medivac", True, True),
        ("terran", "medivac -", "- medivac", True, False),
        ("terran", "- -", "- -", True, False),
        ("terran", "- -", "medivac -", True, False),
    ],
)
def test_endings(race, allies, enemies, over, won):
    some = sim.RACES[race].types[0]

    def side(text, x):
        return [
            unit(some if name == "-" else name, x, 8 + 16 * k, 0 if name == "-" else None)
            for k, name in enumerate(text.split())
        ]

    env = battle(side(allies, 4), side(enemies, 28), race)
    actions = [[NO_OP if name == "-" else STOP for name in allies.split()]]
    _, reward, terminated, truncated, info = env.step(np.array(actions))
    assert (terminated[0], info["battle_won"][0], truncated[0]) == (over, won, False)
    assert info["dead_allies"][0] == allies.count("-")
    assert info["dead_enemies"][0] == enemies.count("-")
    assert reward[0] == pytest.approx(won * 200 / (env.max_reward[0] / 20))


def test_time_out_is_a_terminal_without_win():
    env = battle([unit("marine", 4, 4), unit("marine", 4, 6)], [unit("medivac", 28, 28), unit("marauder", 28, 30)])
    env._world.battles["step"] = 198
    stop = np.full((1, 2), STOP)
    assert not env.step(stop)[2][0]
    _, _, terminated, truncated, info = env.step(stop)
    assert terminated[0]
    assert not truncated[0]
    assert not info["battle_won"][0]


# --- The battle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attacker", "target", "shield", "lost"),
    [
        ("marine", "marine", 0, (6, 0)),
        ("marine", "marauder", 0, (5, 0)),  # armour
        ("marauder", "marauder", 0, (19, 0)),  # bonus against armored, then armour
        ("marauder", "marine", 0, (10, 0)),
        ("marine", "medivac", 0, (5, 0)),  # armour
        ("stalker", "stalker", 0, (13, 0)),  # bonus against armored, then armour
        ("stalker", "colossus", 0, (13, 0)),
        ("stalker", "zealot", 50, (0, 10)),  # shields first, without armour
        ("zealot", "stalker", 5, (2, 5)),  # what the shield leaves meets the armour
        ("zealot", "stalker", 7.9, (0.5, 7.9)),  # a hit takes at least half a point
        ("baneling", "zergling", 0, (35, 0)),
        ("baneling", "baneling", 0, (20, 0)),
        ("hydralisk", "zergling", 0, (12, 0)),
    ],
)
def test_damage_of_a_hit(attacker, target, shield, lost):
    env = battle([unit(target, 5, 5, shield=shield)], [unit(target, 9, 9)])
    row = units(env)[0]
    sim.hit(env._rules.table, sim.UNIT_NAMES.index(attacker), row)
    assert TYPES[target].health - row["health"] == pytest.approx(lost[0])
    assert shield - row["shield"] == pytest.approx(lost[1])


@pytest.mark.parametrize(
    ("name", "way", "radius", "separation", "sight", "reach", "divisor"),
    [
        ("marine", 1.125, 0.375, 0.375, 9, 5, 15),
        ("marauder", 1.125, 0.5625, 0.5, 10, 6, 25),
        ("medivac", 1.375, 0.75, 0.75, 11, 4, 200),
        ("stalker", 1.47655, 0.625, 0.625, 10, 6, 35),
        ("zealot", 1.125, 0.5, 0.375, 9, 2, 22),
        ("colossus", 1.125, 1, 0.75, 10, 7, 24),
        ("zergling", 1.47655, 0.375, 0.375, 8, 2, 11),
        ("hydralisk", 1.125, 0.625, 0.5, 9, 5, 10),
        ("baneling", 1.25, 0.375, 0.375, 8, 2, 1),
    ],
)
def test_figures_of_the_unit_types(name, way, radius, separation, sight, reach, divisor):
    """What the other tests take from the table: cells in a step at full speed, bodies, and the package's own tables."""
    row = sim.compile_unit_table(sim.WOL_UNITS)[sim.UNIT_NAMES.index(name)]
    assert row["speed"] * 8 == pytest.approx(way)
    assert (row["radius"], row["separation"], row["sight"]) == (radius, separation, sight)
    assert (row["mask_range"], row["cooldown_divisor"]) == (reach, divisor)


def test_ladder_table():
    wol, lotv = (sim.compile_unit_table(sim.UNIT_TABLES[name]) for name in ("wol", "lotv"))
    units = {unit.name: unit for unit in sim.UNIT_TABLES["lotv"]}
    colossus, hydralisk, medivac, stalker = (units[name] for name in ("colossus", "hydralisk", "medivac", "stalker"))
    assert (colossus.damage, colossus.bonus, colossus.bonus_against, colossus.period, colossus.reach) == (
        10, 5, "light", 1.5, 7
    )  # fmt: skip
    assert (hydralisk.health, hydralisk.period, medivac.speed, medivac.acceleration) == (90, 0.825, 2.5, 2.25)
    assert (stalker.damage, stalker.bonus, stalker.period) == (13, 5, 1.87)
    changed = {sim.UNIT_NAMES[k] for k in range(9) if wol[k] != lotv[k]}
    assert changed == {"colossus", "hydralisk", "medivac", "stalker"}
    full = sim.expected_max_reward("zerg", 5, 5, "lotv") - sim.expected_max_reward("zerg", 5, 5)
    assert full == pytest.approx(5 * 4.5, abs=0.01)
    assert SMACv2Sim("zerg_5_vs_5", 1, unit_table="lotv").max_reward[0] == pytest.approx(523.75 + 22.5, abs=0.01)


@pytest.mark.parametrize(
    ("attacker", "target", "per_step"),
    [
        ("marine", "marine", 3.4),
        ("marauder", "marine", 3.3),
        ("stalker", "zealot", 3.4),
        ("zealot", "zealot", 6.5),
        ("colossus", "zealot", 9.0),
        ("zergling", "hydralisk", 3.4),
        ("hydralisk", "zergling", 7.0),
    ],
)
def test_damage_per_step(attacker, target, per_step):
    """An enemy shoots at a passive ally that is restored each step: its average damage, random delays included."""
    env = battle([unit(target, 10, 10)], [unit(attacker, 11.3, 10)])
    row, lost = units(env)[0], 0.0
    for _ in range(600):
        loops(env, 8)
        lost += TYPES[target].health + TYPES[target].shield - row["health"] - row["shield"]
        row["health"], row["shield"] = TYPES[target].health, TYPES[target].shield
    assert lost / 600 == pytest.approx(per_step, rel=0.03)


def test_weapon_delay_is_uniform_between_minus_one_and_two_loops():
    env = battle([unit("marine", 10, 10)], [unit("marine", 13, 10)])
    target, shooter = units(env)
    delays = []
    for _ in range(3000):
        carried = max(shooter["cooldown"] - 1, -1) if shooter["cooldown"] > 0 else 0
        loops(env, 1)
        if shooter["cooldown"] > 12:
            delays.append(shooter["cooldown"] - carried - 0.8608 * 16)
            shooter["cooldown"], shooter["attack"] = 0, sim.READY
        target["health"] = 45
    assert -1 <= min(delays) < -0.95
    assert 1.95 < max(delays) < 2
    assert np.mean(delays) == pytest.approx(0.5, abs=0.08)


def test_a_weapon_fires_in_the_loop_in_which_it_is_ready_and_carries_the_fraction_to_its_next_attack():
    next_cooldowns = []
    for cooldown in (3, 2.25):
        env = battle([unit("marine", 10, 10, cooldown=cooldown)], [unit("marine", 13, 10, cooldown=99)])
        act(env, FIRST_TARGET)
        loops(env, 2)
        assert units(env)["attack"][0] == sim.READY
        loops(env, 1)
        assert units(env)["attack"][0] == sim.WIND_UP
        next_cooldowns.append(units(env)["cooldown"][0])
    assert next_cooldowns[0] - next_cooldowns[1] == pytest.approx(0.75)  # the random delay is the same


@pytest.mark.parametrize(
    ("attacker", "away", "expected"),
    [
        ("zealot", 1.0, 1),  # no wind-up
        ("zergling", 0.8, 1 + 3),  # 2.67 loops
        ("marine", 5.0, 1 + 1),
        ("marauder", 6.0, 1 + 5),  # a missile of 1.25 cells a loop
        ("hydralisk", 5.0, 1 + 4 + 2),  # 3.33 loops, then 2.5 cells a loop
        ("hydralisk", 3.75, 1 + 4 + 2),  # 3.33 and 1.5 loops: each stage rounds up by itself, 4.83 would be 5
        ("stalker", 6.0, 1 + 3 + 6),  # 2.67 loops, then 1.17 cells a loop
        ("colossus", 6.0, 1 + 2 + 6),
    ],
)
def test_loops_from_the_order_to_the_hit(attacker, away, expected):
    env = battle([unit(attacker, 10, 10)], [unit(attacker, 10 + away, 10)])
    order(units(env)[0], 1)
    units(env)["cooldown"][1] = 99
    full, count = TYPES[attacker].health + TYPES[attacker].shield, 0
    while count < 20 and units(env)["health"][1] + units(env)["shield"][1] == full:
        loops(env, 1)
        count += 1
    assert count == expected


def test_a_zealot_hits_again_five_loops_after_its_first_hit():
    """0.28 s are 4.48 loops, rounded up."""
    env = battle([unit("zealot", 10, 10)], [unit("zealot", 11, 10)])
    units(env)["cooldown"][1] = 99
    act(env, FIRST_TARGET)
    shields = []
    for _ in range(8):
        loops(env, 1)
        shields.append(units(env)["shield"][1])
    assert shields == [42] * 5 + [34] * 3


def test_a_unit_stands_still_during_wind_up():
    """Also when its target, half a cell further off, is out of the weapon's range by then."""
    env = battle([unit("hydralisk", 10, 10)], [unit("hydralisk", 16.25, 10)])
    units(env)["cooldown"][1] = 99
    act(env, FIRST_TARGET)
    for left in (3.328, 2.328, 1.328, 0.328):
        loops(env, 1)
        assert units(env)["attack_timer"][0] == pytest.approx(left)
        assert units(env)["x"][0] == 10
        units(env)["x"][1] = 16.75
    loops(env, 1)
    assert units(env)["attack"][0] == sim.FLIGHT
    assert units(env)["x"][0] == pytest.approx(10 + 2.25 / 16)


@pytest.mark.parametrize("away", [7.24, 7.26])
def test_reach_is_edge_to_edge(away):
    """A stalker shoots another from 6 + 2 radii without walking, and has to walk from further off."""
    env = battle([unit("stalker", 10, 10)], [unit("stalker", 10 + away, 10)])
    loops(env, 1)
    assert (units(env)["attack"][1] == sim.WIND_UP) == (away < 7.25)
    assert (units(env)["x"][1] == 10 + away) == (away < 7.25)


@pytest.mark.parametrize(("after", "hits"), [(2, False), (3, True)])
def test_a_move_order_stops_a_shot_only_during_wind_up(after, hits):
    env = battle([unit("stalker", 10, 10)], [unit("stalker", 15, 10)])
    units(env)["cooldown"][1] = 99
    act(env, FIRST_TARGET)
    loops(env, after + 1)  # the attack starts in the first loop, the missile flies after 3 more
    act(env, WEST)
    assert (units(env)["cooldown"][0] > 0) == hits  # a shot broken off leaves the weapon ready
    loops(env, 12)
    assert (units(env)["shield"][1] < 80) == hits
    assert units(env)["x"][0] < 9


def test_the_same_attack_order_again_does_not_restart_the_wind_up():
    env = battle([unit("stalker", 10, 10)], [unit("stalker", 15, 10)])
    for _ in range(5):
        act(env, FIRST_TARGET)
        loops(env, 1)
    assert units(env)["attack"][0] == sim.FLIGHT


def test_a_missile_outlives_its_shooter_and_a_wind_up_does_not():
    for after, hits in ((2, False), (5, True)):
        env = battle([unit("stalker", 10, 10)], [unit("stalker", 15, 10)])
        units(env)["cooldown"][1] = 99
        act(env, FIRST_TARGET)
        loops(env, after)
        units(env)["health"][0] = 0
        loops(env, 10)
        assert (units(env)["shield"][1] < 80) == hits


def test_another_target_during_wind_up_starts_a_new_attack():
    env = battle([unit("stalker", 10, 10)] * 2, [unit("stalker", 15, 10), unit("stalker", 15, 12)])
    units(env)["cooldown"][2:] = 99
    act(env, FIRST_TARGET)
    loops(env, 2)
    act(env, FIRST_TARGET + 1)
    assert units(env)["cooldown"][0] == 0
    loops(env, 1)
    assert units(env)["attack_target"][0] == 3
    assert units(env)["attack_timer"][0] == pytest.approx(0.167 * 16)


def test_a_target_that_dies_during_wind_up_leaves_the_weapon_ready():
    env = battle([unit("stalker", 10, 10)], [unit("stalker", 15, 10)])
    units(env)["cooldown"][1] = 99
    act(env, FIRST_TARGET)
    loops(env, 1)
    units(env)["health"][1] = 0
    loops(env, 2)
    row = units(env)[0]
    assert (row["attack"], row["order"], row["cooldown"]) == (sim.READY, sim.NO_ORDER, 0)


@pytest.mark.parametrize(("name", "away", "stage"), [("zealot", 1, sim.SECOND_HIT), ("colossus", 6, sim.BEAM)])
@pytest.mark.parametrize("dies", [False, True])
def test_a_second_hit_and_a_beam_end_with_their_owner(name, away, stage, dies):
    env = battle([unit(name, 10, 10)], [unit("zealot", 10 + away, 10)])
    units(env)["cooldown"][1] = 99
    act(env, FIRST_TARGET)
    while units(env)["attack"][0] != stage:
        loops(env, 1)
    before = units(env)["shield"][1]
    if dies:
        units(env)["health"][0] = 0
    loops(env, 7)
    assert (units(env)["shield"][1] == before) == dies


def test_a_beam_sweeps_on_when_its_target_dies():
    env = battle([unit("colossus", 8, 16)], [unit("zealot", 14, 16), unit("zealot", 14, 17.5)])
    units(env)["cooldown"][1:] = 99
    act(env, FIRST_TARGET)
    while units(env)["attack"][0] != sim.BEAM:
        loops(env, 1)
    units(env)["health"][1] = 0
    loops(env, 7)
    assert units(env)["shield"][2] == 10


@pytest.mark.parametrize(("name", "reach", "slop"), [("zergling", 0.85, 1), ("stalker", 7.25, 1), ("colossus", 8, 0)])
def test_a_target_escapes_by_leaving_the_reach_during_wind_up_by_one_or_from_a_colossus_at_all(name, reach, slop):
    for beyond, hits in ((slop - 0.01, True), (slop + 0.01, False)):
        env = battle([unit(name, 10, 10)], [unit(name, 10 + reach - 0.01, 10)])
        units(env)["cooldown"][1] = 99
        act(env, FIRST_TARGET)
        loops(env, 1)
        for _ in range(12):  # the colossus needs 1 + 2 + 6 loops, the stalker 1 + 3 + 7
            units(env)["x"][1] = units(env)["x"][0] + reach + beyond
            loops(env, 1)
        lost = TYPES[name].health + TYPES[name].shield - units(env)["health"][1] - units(env)["shield"][1]
        assert (lost > 0) == hits


@pytest.mark.parametrize(("loops_calm", "gained"), [(160, 0.0), (168, 1.0), (176, 2.0)])
def test_shields_regenerate_after_ten_seconds(loops_calm, gained):
    env = battle([unit("zealot", 4, 4, shield=10)], [unit("zealot", 28, 28, 1, 0)])
    sim.hit(env._rules.table, sim.ZEALOT, units(env)[0])
    units(env)["alive"][1] = 0
    loops(env, loops_calm)
    assert units(env)["shield"][0] == pytest.approx(2 + gained)
    assert units(env)["health"][0] == 100


def test_a_loaded_battle_has_seen_no_damage_yet():
    env = battle([unit("zealot", 4, 4, shield=10)], [unit("zealot", 28, 28, 0, 0)])
    loops(env, 8)
    assert units(env)["shield"][0] == 11


def test_nothing_regenerates_beyond_its_maximum():
    for name in ("zealot", "hydralisk", "medivac"):
        env = battle([unit(name, 4, 4, energy=200)], [unit(name, 28, 28, 0)])
        loops(env, 8)
        row = units(env)[0]
        assert (row["health"], row["shield"], row["energy"]) == (TYPES[name].health, TYPES[name].shield, 200)


def test_only_zerg_health_regenerates():
    zerg = [(name, 0.1367) for name in ("baneling", "hydralisk", "zergling")]
    for name, gained in (*zerg, ("marine", 0), ("stalker", 0)):
        env = battle([unit(name, 4, 4, 20)], [unit(name, 28, 28, 0)])
        loops(env, 8)
        assert units(env)["health"][0] == pytest.approx(20 + gained, abs=1e-3)


def test_dead_units_do_not_regenerate():
    env = battle([unit("hydralisk", 10, 10)], [unit("zergling", 11, 10, 5)])
    act(env, FIRST_TARGET)
    loops(env, 12)
    assert units(env)["alive"].tolist() == [1, 0]
    assert units(env)["health"][1] == 0


@pytest.mark.parametrize("name", ["zergling", "hydralisk", "marine", "marauder", "zealot", "stalker"])
def test_equal_units_with_equal_orders_win_equally_often(name):
    won = []
    for seed in range(120):
        env = battle([unit(name, 12, 16)], [unit(name, 20, 16)], seed=seed)
        act_row = units(env)[0]
        order(act_row, 1)
        for _ in range(80):
            loops(env, 8)
            if not units(env)["alive"].all():
                break
        won.append(units(env)["alive"][0] - units(env)["alive"][1])
    assert abs(np.mean(won)) < 0.3  # more than three standard errors of a coin


def test_colossus_line():
    """Along the line across the fire everybody on the ground is hit twice, behind it nobody."""
    spots = {"target": (14, 16), "beside": (14, 17.6), "edge": (14, 14.3), "far": (14, 18), "behind": (14.8, 16.0)}
    enemies = [unit("zealot", *spot) for spot in spots.values()]
    env = battle([unit("colossus", 8, 16), unit("zealot", 14.3, 15.4)], enemies)
    units(env)["cooldown"][1:] = 99
    order(units(env)[0], 2)
    sim_row = units(env)[0]
    sim_row["attack_target"], sim_row["attack"], sim_row["attack_timer"] = 2, sim.BEAM, 0.0
    sim.continue_attack(units(env), 0, env._rules.table, 2)
    lost = 50 - units(env)["shield"]
    assert lost.tolist() == [-100, 0, 40, 40, 40, 0, 0]  # zealots: radius .5, so 1.75 across and .65 along


@pytest.mark.parametrize(
    ("name", "half_length", "half_width"),
    [("zealot", 1.25 + 0.5, 0.15 + 0.5), ("stalker", 1.25 + 0.625, 0.15 + 0.625), ("colossus", 1.25 + 1, 0.15 + 1)],
)
def test_bodies_meet_the_colossus_line_with_their_edge(name, half_length, half_width):
    """From the target the line reaches 1.25 both ways across the fire and 0.15 along it; touching is enough."""
    touched = [(half_length, 0), (-half_length, 0), (0, half_width - 0.001), (0, 0.001 - half_width)]  # (across, along)
    missed = [(half_length + 0.001, 0), (-half_length - 0.001, 0), (0, half_width + 0.001), (0, -half_width - 0.001)]
    for north in (False, True):
        spots = [(across, along) if north else (along, across) for across, along in ((0, 0), *touched, *missed)]
        shooter = unit("colossus", 14, 8) if north else unit("colossus", 8, 16)
        env = battle([shooter], [unit(name, 14 + dx, 16 + dy) for dx, dy in spots])
        row = units(env)[0]
        row["attack"], row["attack_target"], row["attack_timer"] = sim.BEAM, 1, 0.0
        sim.continue_attack(units(env), 0, env._rules.table, 1)
        lost = TYPES[name].shield - units(env)["shield"][1:]
        assert lost.tolist() == [40] * 5 + [0] * 4


def test_colossus_armour_counts_per_hit():
    env = battle([unit("colossus", 8, 16)], [unit("zealot", 13, 16, shield=0)])
    units(env)["calm"] = 0  # no shields meanwhile
    order(units(env)[0], 1)
    loops(env, 12)
    assert units(env)["health"][1] == 100 - 2 * 19


@pytest.mark.parametrize("killed", [False, True])
def test_baneling_disc(killed):
    """It blows up on attack and on death, hits enemies within 2.2 of their edges, and spares its own side."""
    allies = [unit("baneling", 10, 10), unit("zergling", 10.8, 10)]
    away = [0.9, 2.57, 2.58]
    enemies = [unit("zergling", 10 - d, 10) for d in away] + [unit("hydralisk", 10, 12.8), unit("baneling", 10, 8)]
    env = battle(allies, enemies)
    units(env)["cooldown"] = 99
    units(env)["cooldown"][0] = 0
    if killed:
        units(env)["health"][0] = 0
        sim.bury_dead(units(env), env._rules.table, 2)
    else:
        # The first enemy's edge is 0.15 from the baneling's: within its range of 0.25.
        order(units(env)[0], 2)
        sim.obey(units(env), 0, env._rules.table, env._world.battles[0], 2, np.empty(7, np.int64))
        sim.bury_dead(units(env), env._rules.table, 2)
    assert units(env)["alive"].tolist() == [0, 1, 0, 0, 1, 1, 1]
    assert units(env)["health"].tolist() == [0, 35, 0, 0, 35, 80 - 35, 30 - 20]


def test_baneling_deaths_chain():
    row = [unit("baneling", 10 + 2 * k, 10, 20) for k in range(3)]
    env = battle(row, [unit("baneling", 11 + 2 * k, 10, 20) for k in range(3)])
    units(env)["health"][0] = 0
    sim.bury_dead(units(env), env._rules.table, 3)
    assert not units(env)["alive"].any()


def test_heal_and_energy():
    env = battle(
        [unit("marauder", 10, 10, 50), unit("medivac", 13, 10, energy=50)],
        [unit("medivac", 28, 28), unit("marine", 1, 31, 0)],
    )
    act(env, STOP, FIRST_TARGET)
    loops(env, 8)
    assert units(env)["health"][0] == pytest.approx(54.5)
    assert units(env)["energy"][1] == pytest.approx(50 - 4.5 * 0.33 + 0.28125)
    units(env)["energy"][1] = 0
    loops(env, 8)
    assert units(env)["health"][0] - 54.5 == pytest.approx(0.28125 / 0.33)
    units(env)["energy"][1], units(env)["health"][0] = 50, 124
    loops(env, 8)
    assert units(env)["health"][0] == 125


@pytest.mark.parametrize(("patient", "reach"), [("marine", 4 + 0.75 + 0.375), ("marauder", 4 + 0.75 + 0.5625)])
def test_a_medivac_heals_from_four_cells_edge_to_edge_and_flies_there_from_further_off(patient, reach):
    for beyond in (0, 0.01):
        allies = [unit(patient, 10, 10, 20), unit("medivac", 10 + reach + beyond, 10, energy=50)]
        env = battle(allies, [unit("marine", 30, 30, 0)] * 2)
        act(env, STOP, FIRST_TARGET)
        loops(env, 1)
        assert (units(env)["health"][0] > 20) == (beyond == 0)
        assert (units(env)["x"][1] == 10 + reach + beyond) == (beyond == 0)
        loops(env, 4)
        assert units(env)["health"][0] > 20
        assert units(env)["x"][1] == pytest.approx(10 + reach)


def test_a_medivac_cannot_raise_the_dead():
    env = battle([unit("marine", 10, 10), unit("medivac", 13, 10, energy=50)], [unit("marine", 30, 30, 0)] * 2)
    act(env, STOP, FIRST_TARGET)
    units(env)["health"][0] = 0  # killed in this loop, and buried at its end
    loops(env, 1)
    assert not units(env)["alive"][0]


def test_an_ally_medivac_follows_its_patient_at_full_health():
    env = battle([unit("marine", 10, 10), unit("medivac", 13, 10, energy=50)], [unit("marine", 30, 30, 0)] * 2)
    act(env, STOP, FIRST_TARGET)
    loops(env, 2)
    units(env)["x"][0] = 4
    loops(env, 32)
    assert units(env)["x"][1] == pytest.approx(4 + 4 + 0.75 + 0.375)
    assert units(env)["energy"][1] > 50


def test_one_healer_per_patient():
    allies = [unit("marauder", 10, 10, 50), unit("medivac", 13, 10, energy=50), unit("medivac", 10, 13, energy=50)]
    env = battle(allies, [unit("marine", 30, 30, 0)] * 3)
    act(env, STOP, FIRST_TARGET, FIRST_TARGET)
    loops(env, 8)
    assert units(env)["health"][0] == pytest.approx(54.5)


def test_enemy_medivac_heals_the_weakest_friend_in_range_by_itself():
    enemies = [
        unit("medivac", 20, 20, energy=50),
        unit("marine", 22, 20, 40),
        unit("marauder", 20, 23, 50),
        unit("marine", 20, 30, 1),
    ]
    env = battle([unit("marine", 1, 1)] * 4, enemies)
    units(env)["alive"][:4] = 0
    loops(env, 8)
    assert units(env)["health"][4:].tolist() == [150, 40, 54.5, 1]
    units(env)["energy"][4], units(env)["order"][4] = 4, sim.NO_ORDER
    loops(env, 1)
    assert units(env)["order"][4] == sim.NO_ORDER  # five energy are needed to begin


@pytest.mark.parametrize(("patient", "reach"), [("marine", 6 + 0.75 + 0.375), ("marauder", 6 + 0.75 + 0.5625)])
@pytest.mark.parametrize("beyond", [0, 0.01])
def test_an_enemy_medivac_looks_for_patients_up_to_six_cells_edge_to_edge(patient, reach, beyond):
    enemies = [unit("medivac", 20, 10, energy=50), unit(patient, 20, 10 + reach + beyond, 20)]
    env = battle([unit("marine", 1, 1, 0)], enemies)
    loops(env, 1)
    assert (units(env)["order"][1] == sim.TARGET) == (beyond == 0)


def test_medivacs_and_the_dead_are_no_patients():
    enemies = [unit("medivac", 20, 20, energy=50), unit("medivac", 22, 20, 50), unit("marine", 20, 22, 0)]
    env = battle([unit("marine", 1, 1, 0)], [*enemies, unit("marine", 20, 24, 40)])
    loops(env, 1)
    assert units(env)["target"][1] == 4


def test_an_enemy_medivac_leaves_a_dead_patient_for_the_next_at_once():
    env = battle(
        [unit("marine", 1, 1, 0)],
        [unit("medivac", 20, 20, energy=50), unit("marine", 21, 20, 10), unit("marine", 20, 22, 20)],
    )
    loops(env, 1)
    units(env)["health"][2] = 0
    loops(env, 2)  # buried at the end of the first
    assert units(env)["health"][3] == 20.5625


@pytest.mark.parametrize(("energy", "begins"), [(4.9, False), (5, True)])
def test_an_enemy_medivac_needs_five_energy_to_begin(energy, begins):
    env = battle([unit("marine", 1, 1, 0)], [unit("medivac", 20, 20, energy=energy), unit("marine", 21, 20, 10)])
    loops(env, 1)
    assert (units(env)["order"][1] == sim.TARGET) == begins


@pytest.mark.parametrize("away", [(3, 2), (2, 3)])
def test_an_enemy_medivac_takes_the_nearest_of_equally_hurt_friends(away):
    friends = [unit("marine", 20 + dx, 20, 20) for dx in away]
    env = battle([unit("marine", 1, 1, 0)], [unit("medivac", 20, 20, energy=50), *friends])
    loops(env, 1)
    assert units(env)["target"][1] == 2 + away.index(2)


def test_enemy_medivacs_never_share_a_patient():
    medivacs = [unit("medivac", 20, 20, energy=50), unit("medivac", 22, 20, energy=50)]
    env = battle([unit("marine", 1, 1, 0)], [*medivacs, unit("marine", 21, 22, 10), unit("marine", 21, 18, 20)])
    loops(env, 1)
    assert units(env)["target"][1:3].tolist() == [3, 4]  # the weakest is taken
    units(env)["health"][3] = 45
    loops(env, 1)
    assert units(env)["order"][1:3].tolist() == [sim.NO_ORDER, sim.TARGET]  # and so is the other one
    units(env)["order"][2] = sim.NO_ORDER
    loops(env, 1)
    assert units(env)["target"][1] == 4  # free again, and the first medivac comes first
    assert units(env)["order"][2] == sim.NO_ORDER


def test_an_enemy_medivac_lets_go_of_a_healed_patient_and_looks_for_the_next():
    """A loop heals up to 0.5625."""
    enemies = [unit("medivac", 20, 20, energy=50), unit("marine", 21, 20, 44.5), unit("marauder", 20, 22, 124.5)]
    env = battle([unit("marine", 1, 1, 0)], enemies)
    for target, hurt in ((2, [0, 0.5]), (3, [0, 0])):
        loops(env, 1)
        assert units(env)["target"][1] == target
        assert (units(env)["health"][2:] == [45 - hurt[0], 125 - hurt[1]]).all()
    loops(env, 1)
    assert units(env)["order"][1] == sim.NO_ORDER


def test_an_enemy_medivac_flies_towards_the_nearest_ally_whenever_the_script_looks():
    """Not before, not without anybody to fly to, and on from where the ally was to where it is."""
    allies = [unit("marauder", 10, 10), unit("marauder", 10, 29)]
    env = battle(allies, [unit("medivac", 20, 10), unit("medivac", 28, 28)])
    phase = env._world.battles[0]["phase"]
    for loop in range(sim.LOOPS_PER_STEP):
        assert (units(env)["order"][2:] == (sim.MOVE if loop > phase else sim.NO_ORDER)).all()
        loops(env, 1)
    assert units(env)["order_x"][2:].tolist() == [10, 10]
    assert units(env)["order_y"][2:].tolist() == [10, 29]
    units(env)["y"][0] = 14
    loops(env, 200)
    assert (units(env)["x"][2], units(env)["y"][2]) == pytest.approx((10, 14), abs=0.5)
    units(env)["alive"][:2] = 0
    loops(env, 100)
    assert units(env)["order"][2:].tolist() == [sim.NO_ORDER] * 2


def test_an_enemy_medivac_on_its_way_turns_to_a_patient_and_goes_on_when_it_is_healed():
    env = battle([unit("marauder", 4, 10), unit("marauder", 4, 29)], [unit("medivac", 24, 10), unit("marine", 24, 30)])
    units(env)["attack"][:2], units(env)["energy"][2] = 99, 50  # these never shoot
    loops(env, 16)
    assert units(env)["order"][2] == sim.MOVE
    units(env)["x"][3], units(env)["y"][3], units(env)["health"][3] = 22, 12, 44
    units(env)["order"][3] = sim.NO_ORDER
    loops(env, 1)
    assert (units(env)["order"][2], units(env)["target"][2]) == (sim.TARGET, 3)
    loops(env, 3 + sim.LOOPS_PER_STEP)
    assert units(env)["health"][3] == 45
    assert units(env)["order"][2] == sim.MOVE
    units(env)["health"][3], units(env)["energy"][2] = 40, 4  # less than it needs to begin
    loops(env, 8)
    assert units(env)["order"][2] == sim.MOVE


def test_ally_medivac_does_not_heal_by_itself():
    env = battle([unit("marine", 10, 10, 5), unit("medivac", 11, 10, energy=50)], [unit("medivac", 28, 28)] * 2)
    act(env, STOP, STOP)
    loops(env, 16)
    assert units(env)["health"][0] == 5
    assert units(env)["energy"][1] > 50


def test_medivac_speeds_up():
    env = battle([unit("medivac", 10, 10), unit("marine", 1, 1)], [unit("medivac", 30, 30)] * 2)
    ways = []
    for _ in range(4):
        before = units(env)["x"][0]
        act(env, EAST, STOP)
        loops(env, 8)
        ways.append(units(env)["x"][0] - before)
    assert ways[0] == pytest.approx(2.3125 / 256 * 36)  # 1 + 2 + ... + 8
    assert ways[0] < ways[1] < ways[2] < ways[3] == pytest.approx(1.375)


@pytest.mark.parametrize("pause", ["stop", "heal"])
def test_a_medivac_that_stands_has_to_speed_up_again(pause):
    env = battle([unit("medivac", 10, 10, energy=50), unit("marine", 12, 10)], [unit("marine", 30, 30, 0)] * 2)
    for action in (EAST, STOP if pause == "stop" else FIRST_TARGET + 1):
        act(env, action, STOP)
        loops(env, 8)
    before = units(env)["x"][0]
    act(env, EAST, STOP)
    loops(env, 8)
    assert units(env)["x"][0] - before == pytest.approx(2.3125 / 256 * 36)


def test_a_medivac_that_arrives_has_to_speed_up_again():
    env = battle([unit("medivac", 30.95, 10), unit("marine", 1, 1)], [unit("marine", 30, 30, 0)] * 2)
    act(env, EAST, STOP)
    loops(env, 8)
    assert units(env)["x"][0] == 31.25  # a radius from the border, in the eighth loop: seven cover 0.253
    act(env, WEST, STOP)
    loops(env, 8)
    assert units(env)["x"][0] == pytest.approx(31.25 - 2.3125 / 256 * 36)


@pytest.mark.parametrize(
    ("action", "dx", "dy"), [(NORTH, 0, 1), (SOUTH, 0, -1), (EAST, 1, 0), (WEST, -1, 0), (STOP, 0, 0)]
)
def test_move_orders(action, dx, dy):
    """A step covers 8 loops of the way; the order lasts until its point two cells away is reached."""
    env = battle([unit("stalker", 16, 16)], [unit("stalker", 30, 30, 0)])
    act(env, action)
    for loops_so_far, way in ((8, 2.9531 / 2), (16, 2.0 * (action != STOP)), (24, 2.0)):
        loops(env, 8)
        assert units(env)["x"][0] == pytest.approx(16 + way * dx), loops_so_far
        assert units(env)["y"][0] == pytest.approx(16 + way * dy)
    assert units(env)["order"][0] == sim.NO_ORDER


def test_an_attack_order_follows_its_target():
    env = battle([unit("zealot", 10, 10)], [unit("zealot", 12, 10)])
    units(env)["cooldown"][1] = 99
    act(env, FIRST_TARGET)
    for _ in range(3):
        units(env)["x"][1] += 3
        loops(env, 32)
    assert units(env)["x"][0] > 14


def test_an_attacker_stands_still_when_its_target_is_dead():
    env = battle([unit("zealot", 10, 10)], [unit("zealot", 12, 10, 0)])
    order(units(env)[0], 1)
    loops(env, 2)
    assert units(env)["x"][0] == 10
    assert units(env)["order"][0] == sim.NO_ORDER


def test_a_refused_attack_leaves_the_order_as_it_was():
    """A marauder may choose to attack a medivac, which its weapon cannot reach: it walks on."""
    env = battle([unit("marauder", 10, 10)] * 2, [unit("medivac", 12, 13), unit("marine", 30, 30, 0)])
    mask = env.observe(0)[2]
    assert mask[0, FIRST_TARGET]
    act(env, EAST)
    loops(env, 8)
    act(env, FIRST_TARGET)
    loops(env, 8)
    assert units(env)["x"][0] == pytest.approx(12, abs=0.01)
    assert units(env)["health"][2] == 150


def test_allies_are_passive():
    env = battle([unit("stalker", 10, 10)], [unit("zealot", 11, 10)])
    for _ in range(10):
        env.step(np.array([[STOP]]))
    assert units(env)["health"][1] + units(env)["shield"][1] == 150
    assert units(env)["shield"][0] < 80


def test_enemies_start_at_the_nearest_ally_and_stay_on_it():
    env = battle([unit("zealot", 4, 16), unit("zealot", 16, 4)], [unit("zealot", 14, 16), unit("zealot", 30, 30, 0)])
    loops(env, 1)
    assert units(env)["target"][2] == 0  # 10 away, the other 12.2
    units(env)["x"][1], units(env)["y"][1] = 14, 15
    loops(env, 16)
    assert units(env)["target"][2] == 0
    assert units(env)["x"][2] < 12.5
    units(env)["health"][0] = 0
    loops(env, 2)
    assert units(env)["target"][2] == 1  # by reflex, it is near
    units(env)["x"][1] = 28
    loops(env, 16)
    assert units(env)["x"][2] > 13.5


@pytest.mark.parametrize("phase", [0, 3])
def test_the_script_looks_for_idle_enemies_every_eight_loops(phase):
    env = battle([unit("zealot", 4, 16)], [unit("zealot", 24, 16)])
    env._world.battles["phase"] = phase
    loops(env, phase)
    assert units(env)["order"][1] == sim.NO_ORDER
    loops(env, 1)
    assert units(env)["order"][1] == sim.TARGET


def test_an_idle_enemy_marauder_ignores_a_nearest_medivac_but_notices_a_marine_in_its_range():
    env = battle(
        [unit("medivac", 10, 10), unit("marine", 10, 1)], [unit("marauder", 12, 10), unit("marine", 30, 30, 0)]
    )
    loops(env, 16)
    assert units(env)["order"][2] == sim.NO_ORDER
    units(env)["y"][1] = 8
    loops(env, 1)
    assert units(env)["target"][2] == 1


@pytest.mark.parametrize(
    ("name", "ally", "reach"),
    [
        ("zealot", "stalker", 5 + 0.5 + 0.625),
        ("hydralisk", "zergling", 5 + 0.625 + 0.375),
        ("marauder", "marine", 6 + 0.5625 + 0.375),
        ("stalker", "colossus", 6 + 0.625 + 1),
    ],
)
@pytest.mark.parametrize("beyond", [0, 0.01])
def test_an_idle_enemy_notices_allies_within_five_cells_or_its_longer_weapon_range_edge_to_edge(
    name, ally, reach, beyond
):
    env = battle([unit(ally, 10, 10)], [unit(name, 10 + reach + beyond, 10)])
    env._world.battles["phase"] = 3  # the script does not look in the first loop
    loops(env, 1)
    assert (units(env)["order"][1] == sim.TARGET) == (beyond == 0)


@pytest.mark.parametrize("places", itertools.permutations([("medivac", 12), ("marine", 10), ("marine", 9)]))
def test_the_reflex_takes_the_nearest_armed_ally_in_whatever_order_they_stand(places):
    env = battle([unit(name, x, 10) for name, x in places], [unit("marine", 13, 10)] + [unit("marine", 30, 30, 0)] * 2)
    env._world.battles["phase"] = 3  # the script does not look in the first loop
    loops(env, 1)
    assert units(env)["target"][3] == places.index(("marine", 10))


def test_the_reflex_prefers_armed_allies_and_the_script_the_nearest():
    for phase, chosen in ((3, 1), (0, 0)):
        allies = [unit("medivac", 10, 10), unit("marine", 8, 10)]
        env = battle(allies, [unit("marine", 13, 10), unit("marine", 30, 30, 0)])
        env._world.battles["phase"] = phase
        loops(env, 1)
        assert units(env)["target"][2] == chosen


@pytest.mark.parametrize(
    ("first", "second", "gap"),
    [
        ("zealot", "zealot", 0.75),
        ("zealot", "stalker", 1.0),
        ("colossus", "colossus", 1.5),
        ("colossus", "zealot", 0.2),
        ("medivac", "medivac", 1.5),
        ("medivac", "marine", 0.2),
        ("marine", "marauder", 0.875),
    ],
)
def test_bodies_push_apart_within_their_plane(first, second, gap):
    env = battle([unit(first, 10, 10), unit(second, 10.2, 10)], [unit(first, 30, 30, 0)])
    loops(env, 1)
    assert units(env)["x"][1] - units(env)["x"][0] == pytest.approx(gap)
    assert units(env)["x"][:2].mean() == pytest.approx(10.1)  # two friends without orders share the way


@pytest.mark.parametrize("healths", [(100, 0), (0, 100)])
def test_the_dead_push_nobody(healths):
    env = battle(
        [unit("zealot", 10 + 0.2 * k, 10, health) for k, health in enumerate(healths)], [unit("zealot", 30, 30)]
    )
    loops(env, 1)
    assert units(env)["x"][:2].tolist() == [10, 10.2]


def test_bodies_on_one_point_part():
    env = battle([unit("zealot", 10, 10)] * 2, [unit("zealot", 30, 30)])
    loops(env, 1)
    assert units(env)["x"][:2] == pytest.approx([10 - 0.375, 10 + 0.375])


def test_a_walker_cannot_shove_an_enemy_aside():
    env = battle([unit("zealot", 10, 10)], [unit("zealot", 11, 10)])
    units(env)["cooldown"][1] = 99
    loops(env, 1)
    act(env, EAST)
    for _ in range(8):
        loops(env, 1)
        first, second = units(env)
        assert (second["x"], second["y"]) == (11, 10)
        assert np.hypot(first["x"] - 11, first["y"] - 10) >= 0.75 - 1e-9
    assert abs(first["y"] - 10) > 0.3  # it passes round instead


@pytest.mark.parametrize("walker", [0, 1])
@pytest.mark.parametrize("fights", [False, True])
def test_a_walker_shoves_a_friend_only_if_it_has_no_order(fights, walker):
    allies, actions = [unit("zealot", 10.8, 10)], [FIRST_TARGET if fights else STOP]
    allies.insert(walker, unit("zealot", 10, 10))
    actions.insert(walker, EAST)
    env = battle(allies, [unit("zealot", 11.9, 10), unit("zealot", 9, 9, 0)])
    units(env)["cooldown"][:3] = 99
    act(env, *actions)
    loops(env, 4)
    assert (units(env)["x"][1 - walker] == 10.8) == fights


def test_flyers_shove_each_other_whatever_they_do():
    allies = [unit("medivac", 10, 10), unit("medivac", 11.4, 10), unit("marine", 10, 12)]
    env = battle(allies, [unit("marine", 30, 30, 0)] * 3)
    act(env, FIRST_TARGET + 2, WEST, STOP)
    loops(env, 1)
    way = 2.3125 / 256
    overlap = 0.75 + 0.75 - (1.4 - way)
    assert units(env)["x"][:2] == pytest.approx([10 - overlap / 2, 11.4 - way + overlap / 2])


def walk_east(bodies, side=0, away=0.76, moving=0):
    """One loop of a zealot at (10, 10) that has bumped into zealots this far away in these directions (degrees).

    Returns: its direction of movement in degrees, None if it stood still, and the side to which it keeps.
    """
    angles = np.deg2rad(bodies)
    others = [unit("zealot", 10 + away * np.cos(angle), 10 + away * np.sin(angle)) for angle in angles]
    env = battle([unit("zealot", 10, 10)], others)
    act(env, EAST)
    row = units(env)[0]
    row["bumped"], row["side"] = 1, side
    units(env)["moving"][1:] = moving
    sim.obey(units(env), 0, env._rules.table, env._world.battles[0], 1, np.empty(len(bodies) + 1, np.int64))
    dx, dy = row["x"] - 10, row["y"] - 10
    assert np.hypot(dx, dy) == pytest.approx(2.25 / 16) or dx == dy == 0
    assert row["bumped"] == 0
    return round(np.rad2deg(np.arctan2(dy, dx))) if dx or dy else None, row["side"]


@pytest.mark.parametrize(
    ("bodies", "side", "expected"),
    [
        ([180], 1, (0, 0)),  # the straight way is free
        ([0], 0, (90, 1)),  # both sides are as short
        ([0], -1, (-90, -1)),  # it keeps to its side
        ([30], 0, (-60, -1)),  # the shorter way
        ([30], 1, (120, 1)),
        ([30.5, -30.5], 0, (120, 1)),
        ([0, 90], 0, (-90, -1)),
        ([0, 90], 1, (None, 0)),  # no way on its side: it may choose again
        ([0, 60, 120, 180, 240, 300], 0, (None, 0)),
    ],
)
def test_a_blocked_unit_turns_by_as_little_as_it_must_and_keeps_to_its_side(bodies, side, expected):
    assert walk_east(bodies, side) == expected


def test_what_a_unit_does_not_turn_aside_for():
    assert walk_east([0], moving=1) == (0, 0)  # who walks, too
    assert walk_east([180], away=0.5) == (0, 0)  # whom it is already in, on the way out


@pytest.mark.parametrize(("name", "target"), [("zergling", "hydralisk"), ("zealot", "zealot")])
def test_melee_units_in_a_column_pass_around_the_first_to_surround_their_target(name, target):
    column = [unit(name, 14 + k, 16) for k in range(5)]
    env = battle([unit(target, 10, 16)], column)
    struck = np.zeros(6, bool)
    for _ in range(200):
        loops(env, 1)
        units(env)["health"][0] = TYPES[target].health
        struck |= units(env)["cooldown"] > 0
    assert struck[1:].all()


@pytest.mark.parametrize("name", ["colossus", "zealot", "stalker"])
def test_the_border_holds_units_a_radius_inside(name):
    env = battle([unit(name, 30, 2)], [unit(name, 2, 30)])
    units(env)["alive"][1] = 0
    radius = TYPES[name].radius
    for action, axis, end in ((EAST, "x", 32 - radius), (SOUTH, "y", radius)):
        for _ in range(4):
            act(env, action)
            loops(env, 8)
        assert units(env)[axis][0] == pytest.approx(end)
    mask = env.observe(0)[2][0]
    assert mask[[STOP, NORTH, SOUTH, EAST, WEST]].tolist() == [True, True, True, 32 - radius < 31, True]


@pytest.mark.parametrize(
    ("action", "x", "y"), [(EAST, 31.625, 30.5), (NORTH, 30.5, 31.625), (WEST, 0.375, 1.5), (SOUTH, 1.5, 0.375)]
)
def test_a_move_order_at_the_border_ends_there(action, x, y):
    start = 30.5 if action in (EAST, NORTH) else 1.5
    env = battle([unit("marine", start, start)], [unit("marine", 16, 16, 0)])
    act(env, action)
    loops(env, 8)  # 1.125 cells, to a radius from the border
    assert (units(env)["x"][0], units(env)["y"][0]) == pytest.approx((x, y))
    loops(env, 1)
    assert units(env)["order"][0] == sim.NO_ORDER


# --- The wipe option --------------------------------------------------------------------------------------------------


def test_wipe_example():
    """An enemy that nobody has seen empties the rows before it; once seen, all appear."""
    allies = [unit("marine", 10 + k, 16) for k in range(4)] + [unit("medivac", 14, 17)]
    for last, rows in (((31, 31), 0), ((18, 17), 5)):
        enemies = [unit("marine", 15 + 0.5 * k, 16) for k in range(4)] + [unit("marine", *last)]
        seen = battle(allies, enemies, enemy_wipe=True).observe(0)[0][0, 4 : 4 + 40].reshape(5, 8)
        assert (seen[:, 4] > 0).sum() == rows
        clean = battle(allies, enemies).observe(0)[0][0, 4 : 4 + 40].reshape(5, 8)
        assert (clean[:, 4] > 0).sum() == max(rows, 4)


@pytest.mark.parametrize("map_name", ["protoss_5_vs_5", "terran_10_vs_11", "zerg_20_vs_20"])
def test_wipe_at_the_start(map_name):
    """On the package's own starting points 54 to 61 % of the enemy rows in sight survive."""
    env = SMACv2Sim(map_name, 1, seed=5, enemy_wipe=True)
    world, n = env._world, env.num_agents
    _, types, points = draw(map_name, 2500, seed=6)
    kept = total = 0
    for kinds, spots in zip(types, points, strict=True):
        world.units[0]["type"], world.units[0]["x"], world.units[0]["y"] = kinds, spots[:, 0], spots[:, 1]
        world.seen[:], world.owner[:] = 0, -1
        sim.update_wipe(0, world, env._rules)
        away = np.hypot(*np.moveaxis(spots[:n, None] - spots[None, n:], -1, 0))
        visible = away < env._rules.table["sight"][kinds[:n], None]
        total += visible.sum()
        kept += (visible & (np.arange(env.num_enemies) >= world.first_row[0][:, None])).sum()
    assert 0.52 <= kept / total <= 0.63


@pytest.mark.parametrize(("corpse", "rows"), [((31, 31), 0), ((18, 17), 1)])
def test_wipe_by_a_dead_enemy(corpse, rows):
    """A corpse out of everybody's sight hides the enemies before it."""
    env = battle([unit("marine", 10, 16)], [unit("marine", 15, 16), unit("marine", *corpse, 0)], enemy_wipe=True)
    assert (env.observe(0)[0][0, 4 : 4 + 16].reshape(2, 8)[:, 4] > 0).sum() == rows


def test_wipe_ends_once_anybody_has_seen_the_enemy_and_begins_again_when_that_ally_dies():
    """The second agent sees enemy 0; its row is wiped as long as enemy 1 is unseen, which stands before the first."""
    first_looks = set()
    for seed in range(20):
        allies, enemies = [unit("marine", 30, 30), unit("marine", 2, 2)], [unit("marine", 3, 2), unit("marine", 31, 30)]
        env = battle(allies, enemies, enemy_wipe=True, seed=seed)
        first_looks.add(bool(env.observe(0)[0][1, 4:20].any()))
        stop = np.full((1, 2), STOP)
        assert env.step(stop)[0][0, 1, 4:20].any()
        units(env)["health"][0] = 0
        obs, *_, info = env.step(stop)
        assert info["dead_allies"][0] == 1
        assert not obs[0, 1, 4:20].any()
    assert first_looks == {False, True}  # the agents look in random order


@pytest.mark.parametrize("away", [9, 8.99])
def test_wipe_takes_sight_without_its_end(away):
    env = battle([unit("marine", 10, 16)], [unit("marine", 12, 16), unit("marine", 10 + away, 16)], enemy_wipe=True)
    assert env.observe(0)[0][0, 4:12].any() == (away < 9)


@pytest.mark.parametrize("new_battle", [False, True])
def test_wipe_remembers_neither_the_dead_nor_the_battle_before(new_battle):
    near = [unit("marine", 12, 16), unit("marine", 14, 16)]
    env = battle([unit("marine", 10, 16)], near, enemy_wipe=True)
    assert env.observe(0)[0][0, 4:12].any()  # both have been seen
    if new_battle:
        env.load_battle(0, [unit("marine", 10, 16)], [near[0], unit("marine", 30, 16)])
    else:
        units(env)["health"][2], units(env)["x"][2] = 0, 30
        env.step(np.array([[STOP]]))
    assert not env.observe(0)[0][0, 4:12].any()


def test_wipe_changes_enemy_rows_only():
    clean, wiped = SMACv2Sim("terran_5_vs_5", 64, seed=8), SMACv2Sim("terran_5_vs_5", 64, seed=8, enemy_wipe=True)
    (obs, info), (obs_wiped, info_wiped) = clean.reset(), wiped.reset()
    assert equal(info, info_wiped)
    assert (obs[:, :, 44:] == obs_wiped[:, :, 44:]).all()
    assert (obs != obs_wiped).any()
    assert ((obs == obs_wiped) | (obs_wiped == 0)).all()


# --- The batched environment ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("few", "threads"), [(4, 3), (40, 1)])
def test_battles_do_not_depend_on_their_number_or_on_threads(few, threads, monkeypatch):
    """Battle i of 64 on three threads equals battle i of a few."""
    options = {"seed": 2**63 - 1, "enemy_wipe": True, "reward_scale": "first_episode"}
    many, some = SMACv2Sim("protoss_5_vs_5", 64, **options), SMACv2Sim("protoss_5_vs_5", few, **options)
    _, info = many.reset()
    some.reset()
    rng = np.random.default_rng(0)
    for _ in range(120):
        actions = random_actions(info["action_mask"], rng)
        monkeypatch.setattr(sim, "NUM_THREADS", 3)
        obs, reward, terminated, _, info = many.step(actions)
        monkeypatch.setattr(sim, "NUM_THREADS", threads)
        other = some.step(actions[:few])
        assert equal(other[:3], (obs[:few], reward[:few], terminated[:few]))
        assert equal(other[4]["state"], info["state"][:few])


def test_seeds():
    first = [SMACv2Sim("zerg_5_vs_5", 4, seed=seed).reset()[0] for seed in (0, 0, 1)]
    assert equal(first[0], first[1])
    assert not equal(first[0], first[2])
    assert len({row.tobytes() for row in first[0]}) == 4  # battles differ from each other
    env = SMACv2Sim("zerg_5_vs_5", 4, seed=9)
    assert not equal(env.reset()[0], env.reset()[0])
    assert equal(env.reset(seed=0)[0], first[0])
    rows = [row.tobytes() for seed in range(4) for row in SMACv2Sim("zerg_5_vs_5", 4, seed).reset()[0]]
    assert len(set(rows)) == 16  # no two seeds share a battle


def test_save_and_restore():
    """A checkpoint through torch's safe loader continues bit for bit, in another object with another past."""
    options = {"enemy_wipe": True, "reward_scale": "first_episode"}
    env, rng = SMACv2Sim("terran_10_vs_11", 20, seed=1, **options), np.random.default_rng(0)
    rollout(env, 30, rng)
    file = io.BytesIO()
    torch.save({name: torch.from_numpy(array) for name, array in env.get_state().items()}, file)
    file.seek(0)
    copy = SMACv2Sim("terran_10_vs_11", 20, seed=5, **options)
    copy.set_state(torch.load(file, weights_only=True))
    assert equal(env.observe(), copy.observe())
    for _ in range(60):
        actions = random_actions(env.observe()[2], rng)
        assert equal(env.step(actions), copy.step(actions))


def test_reset_finds_the_battles_begun_at_the_start_until_something_has_happened_to_them():
    """Which a saved state remembers; afterwards it begins others."""
    begun, env, fresh = (SMACv2Sim("protoss_5_vs_5", 3, seed) for seed in (9, 1, 9))
    obs, saved = begun.observe()[0], begun.get_state()

    def play():
        env.step(random_actions(env.observe()[2], np.random.default_rng(0)))

    play()
    env.set_state(saved)
    assert equal(env.reset()[0], obs)
    fresh.set_state(env.get_state())  # of battles that have been reset
    assert not equal(fresh.reset()[0], obs)
    for happen in (play, lambda: env.load_battle(0, GOLDEN_ALLIES, GOLDEN_ENEMIES)):
        env.set_state(saved)
        happen()
        there = env.observe()[0]
        assert not equal(env.reset()[0], there)


def test_restoring_something_else_is_refused():
    saved = SMACv2Sim("terran_5_vs_5", 3).get_state()
    with pytest.raises(ValueError, match="does not fit"):
        SMACv2Sim("terran_5_vs_5", 4).set_state(saved)
    with pytest.raises(ValueError, match="another simulator"):
        SMACv2Sim("terran_5_vs_5", 3, unit_table="lotv").set_state(saved)


@pytest.mark.parametrize("num_envs", [3, 32])
def test_same_step_autoreset(num_envs):
    """The finished battle's last views are in info; the returned ones are the next battle's first."""
    env = SMACv2Sim("zerg_5_vs_5", num_envs, seed=3)
    _, info = env.reset()
    rng, ended = np.random.default_rng(0), 0
    keys = {"state", "action_mask", "battle_won", "dead_allies", "dead_enemies"}
    finals = {"final_obs", "_final_obs", "final_info", "_final_info"}
    while ended < 40:
        before = info
        actions = random_actions(info["action_mask"], rng)
        obs, reward, terminated, truncated, info = env.step(actions)
        assert reward.dtype == obs.dtype == np.float32
        assert terminated.dtype == truncated.dtype == bool
        assert not truncated.any()
        assert info.keys() == (keys | finals if terminated.any() else keys)
        one_hots = info["state"][:, -55:].reshape(num_envs, 5, 11)
        assert (one_hots[~terminated].argmax(-1) == actions[~terminated]).all()
        if not terminated.any():
            continue
        ended += terminated.sum()
        final = info["final_info"]
        assert final.keys() == keys
        assert (info["_final_obs"] == terminated).all()
        assert (info["_final_info"] == terminated).all()
        for values in (info["final_obs"], *final.values()):
            assert not values[~terminated].any()
        assert not one_hots[terminated].any()
        assert (info["state"][terminated][:, 0] == 1).all()  # everybody in full health
        assert (obs[terminated][:, :, :4].sum(-1) >= 2).all()
        final_hots = final["state"][terminated][:, -55:].reshape(-1, 5, 11)
        assert (final_hots.argmax(-1) == actions[terminated]).all()
        dead = (~final["action_mask"][terminated][:, :, STOP]).sum(1)
        assert (dead == final["dead_allies"][terminated]).all()
        assert (final["dead_allies"][terminated] == info["dead_allies"][terminated]).all()
        assert ((final["dead_enemies"] == 5) | (final["dead_allies"] == 5) | ~terminated).all()
        assert (before["dead_allies"][terminated] <= info["dead_allies"][terminated]).all()
        assert (final["battle_won"] == info["battle_won"] & terminated).all()


def test_returned_arrays_are_the_callers():
    env, rng = SMACv2Sim("zerg_5_vs_5", 32, seed=3), np.random.default_rng(0)
    copies = []

    def copy(value):
        return {k: copy(v) for k, v in value.items()} if isinstance(value, dict) else value.copy()

    results = rollout(env, 60, rng, lambda result: copies.append([copy(part) for part in result]))
    assert any("final_obs" in result[4] for result in results)
    assert all(equal(list(result), saved) for result, saved in zip(results, copies, strict=True))
    env.observe()[0][:] = 7  # nor can the caller reach into the battle
    results[-1][4]["action_mask"][:] = True
    results[-1][4]["final_obs"] = None
    with pytest.raises(ValueError, match="is not available"):
        env.step(np.full((32, 5), FIRST_TARGET + 4))


@pytest.mark.parametrize("wrong", [NO_OP, FIRST_TARGET + 3, 11, -1])
def test_unavailable_action(wrong):
    env = SMACv2Sim("protoss_5_vs_5", 2)
    env.load_battle(1, GOLDEN_ALLIES, GOLDEN_ENEMIES)
    before = env.get_state()
    actions = np.array([[STOP] * 5, [STOP, wrong, STOP, STOP, NO_OP]])
    with pytest.raises(ValueError, match=f"environment 1, agent 1: action {wrong} is not available, allowed are"):
        env.step(actions)
    assert equal(before, env.get_state())


@pytest.mark.parametrize("actions", [np.ones((2, 5)), np.ones((1, 5), int), np.ones(10, int)])
def test_actions_of_another_shape_or_type(actions):
    with pytest.raises(ValueError, match="actions are"):
        SMACv2Sim("protoss_5_vs_5", 2).step(actions)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"env_index": 1}, IndexError, "expected 0 to 0"),
        ({"allies": GOLDEN_ALLIES[:4]}, ValueError, "4 allies"),
        ({"enemies": [unit("marine", 5, 5)] * 5}, ValueError, "unit type is 'marine'"),
        ({"enemies": [unit("zealot", 33, 5)] * 5}, ValueError, "out of range"),
        ({"enemies": [unit("zealot", 3, 5, 101)] * 5}, ValueError, "out of range"),
        ({"last_actions": [11] * 5}, ValueError, "last_actions"),
    ],
)
def test_load_battle_errors(changes, error, message):
    arguments = {"env_index": 0, "allies": GOLDEN_ALLIES, "enemies": GOLDEN_ENEMIES}
    with pytest.raises(error, match=message):
        SMACv2Sim("protoss_5_vs_5", 1).load_battle(**(arguments | changes))


@pytest.mark.parametrize(
    ("map_name", "battles"),
    [
        ("protoss_5_vs_5", 600),
        ("terran_5_vs_5", 500),
        ("zerg_10_vs_11", 500),
        ("terran_20_vs_23", 200),
        ("zerg_3_vs_2", 200),
    ],
)
def test_two_thousand_random_battles(map_name, battles):
    """No exception, no NaN, nobody outside the map, nothing out of its range; random play hardly wins."""
    env = SMACv2Sim(map_name, 100, seed=11)
    ended, won = 0, 0
    radius = env._rules.table["radius"]
    _, info = env.reset()
    rng = np.random.default_rng(2)
    while ended < battles:
        obs, reward, terminated, _, info = env.step(random_actions(info["action_mask"], rng))
        ended += terminated.sum()
        won += info["battle_won"].sum()
        assert np.isfinite(obs).all()
        assert np.isfinite(info["state"]).all()
        assert (np.abs(obs) <= 1).all()
        assert (reward >= 0).all()
        assert info["action_mask"].any(-1).all()
        rows = env._world.units
        edge = radius[rows["type"]]
        for axis in ("x", "y"):
            assert ((rows[axis] >= edge) & (rows[axis] <= 32 - edge)).all()
    assert won / ended < 0.05 or map_name == "zerg_3_vs_2"
