"""MPE Spread: the numpy backend against mpe2, both against numbers worked out by hand, and the vector contract."""

import io
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from envs.spread import (
    AGENT_COLOURS,
    FORCES,
    HEADER,
    LANDMARK_COLOUR,
    LEVELS,
    SIZE,
    Spread,
    SpreadMPE2,
    distance,
    draw_episode,
)

ROOT = Path(__file__).parent.parent
BACKENDS = (Spread, SpreadMPE2)
FINAL = {"final_obs", "_final_obs", "final_info", "_final_info"}
CORNERS = np.array([[-1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])  # three places far from each other

# Both backends compute in float64 and differ by the order of additions only: around 1e-15 in a step, which contacts may
# amplify along an episode. What they return is float32, so it can differ by one unit in the last place, 2**-23.
EXACT = {"rtol": 0, "atol": 1e-12}
ROUNDED = {"rtol": 2**-23, "atol": 1e-12}


def make_state(position, landmark=CORNERS, velocity=((0, 0),) * 3, num_envs=1, t=0):
    """A state for `set_state`; the arrays are (3, 2), alike in all environments, or (E, 3, 2)."""
    arrays = {"position": position, "velocity": velocity, "landmark": landmark}
    state = {name: np.broadcast_to(np.array(array, float), (num_envs, 3, 2)) for name, array in arrays.items()}
    return state | {"clock": np.array([0, 0, t])}


def random_actions(steps, num_envs, seed=0):
    return np.random.default_rng(seed).integers(0, 5, (steps, num_envs, 3))


def flatten(result):
    """All arrays of what `reset` or `step` returned, by name."""
    *values, info = result
    names = ("obs", "reward", "terminated", "truncated")[: len(values)]
    final = {f"final {name}": value for name, value in info.get("final_info", {}).items()}
    return dict(zip(names, values, strict=True)) | {k: v for k, v in info.items() if k != "final_info"} | final


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        np.testing.assert_allclose(one[name], other[name], err_msg=name, **(tolerance or {"rtol": 0}))


# --- physics, reward and observation ---


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_backends_agree(level, crowded):
    num_envs, episodes, overlaps = 4, 20, 0
    rng = np.random.default_rng(1)
    envs = [backend(level, num_envs, seed=5) for backend in BACKENDS]
    assert_same(*(flatten(env.reset()) for env in envs))
    for actions in random_actions(25 * episodes, num_envs):
        if crowded and envs[0].t % 5 == 0:  # all near the middle, thrown at it
            position = rng.uniform(-0.35, 0.35, (num_envs, 3, 2))
            state = make_state(position, velocity=-5 * position, num_envs=num_envs, t=envs[0].t)
            assert_same(*(flatten(env.set_state(state)) for env in envs), **ROUNDED)
        assert_same(*(flatten(env.step(actions)) for env in envs), **ROUNDED)
        assert_same(*(env.get_state() for env in envs), **EXACT)
        gaps = envs[0].position[:, :, None] - envs[0].position[:, None]
        overlaps += ((distance(gaps) < 0.3).sum((1, 2)) > 3).sum()
    assert overlaps > (200 if crowded else 0), "the case lost its point: agents hardly met"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("action", "direction"), enumerate([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]))
def test_push_then_coast(backend, action, direction):
    env, direction = backend("simple", 1), np.array(direction)
    env.set_state(make_state(CORNERS))
    env.step(np.full((1, 3), action))  # v = 5 * 0.1; the position moves by the new velocity already
    np.testing.assert_allclose(env.velocity[0], np.tile(0.5 * direction, (3, 1)), **EXACT)
    np.testing.assert_allclose(env.position[0], CORNERS + 0.05 * direction, **EXACT)
    env.step(np.zeros((1, 3), int))  # v = 0.75 * 0.5
    np.testing.assert_allclose(env.position[0], CORNERS + (0.05 + 0.0375) * direction, **EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_contact_pushes_apart(backend):
    env = backend("simple", 1)
    env.set_state(make_state([(0, 0), (0.25, 0), (5, 5)]))
    _, reward, *_ = env.step(np.zeros((1, 3), int))
    # overlap 0.05 -> force 100 * 0.05 = 5 -> speed 0.5 and a shift of 0.05 each, after which they are 0.35 apart
    np.testing.assert_allclose(env.velocity[0], [(-0.5, 0), (0.5, 0), (0, 0)], **EXACT)
    nearest = np.hypot(-0.05 + 1, 1) + np.hypot(0.3 - 1, 1) + np.hypot(-0.05 + 1, 1)
    np.testing.assert_allclose(reward, [-3 * nearest - 3], rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("speed", "collisions"), [(0, 0), (1, 4), (2.2, 6)])
def test_both_sides_count_a_collision(backend, speed, collisions):
    env = backend("simple", 1)
    # Three in a row, the outer two fly inwards: by 0.075 * speed, less the 0.01 that contact holds them up. Their
    # distance to the middle one becomes 0.3 (touching is not enough), 0.225 or 0.135, to each other twice that.
    env.set_state(make_state([(-0.29, 0), (0, 0), (0.29, 0)], velocity=[(speed, 0), (0, 0), (-speed, 0)]))
    _, reward, *_ = env.step(np.zeros((1, 3), int))
    outer = 0.29 - 0.075 * speed + 0.01
    np.testing.assert_allclose(env.position[0], [(-outer, 0), (0, 0), (outer, 0)], atol=1e-6)
    nearest = 3 * np.hypot(1 - outer, 1)
    np.testing.assert_allclose(reward, [-3 * nearest - 3 - collisions], rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_perfect_episode_returns_minus_75(backend):
    env = backend("simple", 1)
    env.set_state(make_state(CORNERS))
    assert sum(env.step(np.zeros((1, 3), int))[1].item() for _ in range(25)) == -75


@pytest.mark.parametrize("backend", BACKENDS)
def test_observation_by_hand(backend):
    agents, landmarks = np.array([(0, 0), (1, 2), (-3, 0)]), np.array([(0, 1), (2, 0), (-1, -1)])
    velocity = [(0.5, 0), (0, -0.5), (0.25, 0.25)]
    obs, info = backend("simple", 1).set_state(make_state(agents, landmarks, velocity))
    expected = [
        [0.5, 0, 0, 0, 0, 1, 2, 0, -1, -1, 1, 2, -3, 0, 0, 0, 0, 0],
        [0, -0.5, 1, 2, -1, -1, 1, -2, -2, -3, -1, -2, -4, -2, 0, 0, 0, 0],
        [0.25, 0.25, -3, 0, 3, 1, 5, 0, 2, -1, 3, 0, 4, 2, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(obs, [expected])
    np.testing.assert_array_equal(info["state"], [np.ravel(expected)])
    assert info["action_mask"].shape == (1, 3, 5)
    assert info["action_mask"].dtype == bool
    assert info["action_mask"].all()


# --- known scores ---


def random_policy(obs, memory, rng):
    return rng.integers(0, 5, obs.shape[:2])


def stand_still(obs, memory, rng):
    return np.zeros(obs.shape[:2], int)


def scripted(obs, memory, rng):
    """Assign landmarks at the start by the least sum of distances; steer so as to coast closest to one's own."""
    velocity, to_landmark = obs[..., :2], obs[..., 4:10].reshape(-1, 3, 3, 2)  # (E, N, landmarks, 2)
    if "own" not in memory:
        assignments = np.array(list(itertools.permutations(range(3))))  # (6, N)
        cost = distance(to_landmark)[:, np.arange(3), assignments].sum(2)  # (E, 6)
        memory["own"] = assignments[cost.argmin(1)]
    goal = np.take_along_axis(to_landmark, memory["own"][..., None, None], 2)  # (E, N, 1, 2)
    # After the action the velocities are v, 0.75 v, 0.75^2 v, ...: a way of 0.1 * 4 v until it comes to rest.
    rest = 0.4 * (0.75 * velocity[:, :, None] + 0.1 * FORCES)  # (E, N, A, 2)
    return distance(goal - rest).argmin(2)


# Mean returns over 2,000 episodes each, measured with a separate implementation.
ANCHORS = {
    random_policy: {"simple": -218.4, "medium": -278.7, "hard": -341.8},
    stand_still: {"simple": -204.2, "medium": -269.6, "hard": -335.1},
    scripted: {"simple": -118.5, "medium": -139.8, "hard": -170.3},
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("policy", ANCHORS)
def test_known_scores(policy, level):
    num_envs, memory, returns = 8000, {}, 0
    rng = np.random.default_rng(3)
    env = Spread(level, num_envs, seed=11)
    obs, _ = env.reset()
    for _ in range(25):
        obs, reward, *_ = env.step(policy(obs, memory, rng))
        returns = returns + reward.astype(float)
    standard_error = returns.std() * np.sqrt(1 / num_envs + 1 / 2000)  # of the difference to the anchor
    assert abs(returns.mean() - ANCHORS[policy][level]) < 4 * standard_error


# --- start states ---


@pytest.mark.parametrize(("level", "k"), [("simple", 1), ("medium", 1.5), ("hard", 2)])
def test_start_states_are_uniform_in_their_squares(level, k):
    num_envs = 5000
    env = Spread(level, num_envs, seed=2)
    env.reset()
    assert not env.velocity.any()
    points = np.concatenate([env.position, env.landmark], 1).reshape(num_envs, 12)
    points /= np.repeat([k, 0.8 * k], 6)
    assert abs(points).max() <= 1
    for column in points.T:  # chi-squared over 20 bins: 19 degrees of freedom, 52 is the 0.9999 quantile
        counts = np.histogram(column, 20, (-1, 1))[0]
        assert ((counts - num_envs / 20) ** 2).sum() / (num_envs / 20) < 52
    correlation = np.corrcoef(points.T) - np.eye(12)
    assert abs(correlation).max() < 4.5 / np.sqrt(num_envs)  # 66 pairs


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_seed_environment_and_episode_starts_elsewhere(backend):
    starts = []
    for seed in (0, 1, 2):
        env = backend("simple", 3, seed)
        starts += [env.reset()[1]["state"] for _ in range(3)]
    assert len(np.unique(np.concatenate(starts), axis=0)) == 27
    env.reset(seed=1)
    assert_same(flatten(env.reset()), flatten((starts[4].reshape(3, 3, 18), env.observe()[1])))


# --- the contract of a vector environment ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_25_is_terminal_and_starts_anew(backend):
    env, unending, starts = (backend("hard", 2, seed=4) for _ in range(3))
    for each in (env, unending, starts):
        each.reset()
    for step, actions in enumerate(random_actions(75, 2), 1):
        last = step % 25 == 0
        unending.set_state(env.get_state() | {"clock": np.zeros(3, int)})  # the same place, its clock at 0
        obs, reward, terminated, truncated, info = env.step(actions)
        same_obs, same_reward, *_, same_info = unending.step(actions)
        assert terminated.tolist() == [last] * 2
        assert not truncated.any()
        np.testing.assert_array_equal(reward, same_reward)  # of the episode that ended
        if last:
            assert info.keys() > FINAL
            final = {name: info.pop(name) for name in FINAL}
            assert final["_final_obs"].tolist() == final["_final_info"].tolist() == [True, True]
            assert_same(flatten((final["final_obs"], final["final_info"])), flatten((same_obs, same_info)))
            assert_same(flatten((obs, info)), flatten(starts.reset()))
        else:
            assert not FINAL & info.keys()
            assert_same(flatten((obs, info)), flatten((same_obs, same_info)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_types(backend):
    env = backend("simple", 2)
    env.reset()
    env.set_state(env.get_state() | {"clock": np.array([0, 0, 24])})
    result = flatten(env.step(np.zeros((2, 3), int)))
    forms = {name: (array.shape, array.dtype) for name, array in result.items()}
    obs, state, mask, flag = ((2, 3, 18), "f4"), ((2, 54), "f4"), ((2, 3, 5), "?"), ((2,), "?")
    expected = {"obs": obs, "reward": ((2,), "f4"), "terminated": flag, "truncated": flag, "state": state}
    expected |= {"action_mask": mask, "final_obs": obs, "_final_obs": flag, "_final_info": flag}
    assert forms == expected | {"final state": state, "final action_mask": mask}
    sizes = (env.num_envs, env.num_agents, env.num_actions, env.obs_size, env.state_size, env.episode_limit)
    assert sizes == (2, 3, 5, 18, 54, 25)


def test_results_do_not_depend_on_the_number_of_environments():
    envs = [Spread("medium", num_envs, seed=9) for num_envs in (65, 4, 1)]
    results = [flatten(env.reset()) for env in envs]
    for actions in random_actions(60, 65):
        for env, result in zip(envs[1:], results[1:], strict=True):
            assert_same({name: array[: env.num_envs] for name, array in results[0].items()}, result)
        results = [flatten(env.step(actions[: env.num_envs])) for env in envs]


@pytest.mark.parametrize("resumed", BACKENDS)
@pytest.mark.parametrize("saved", BACKENDS)
def test_save_and_restore(saved, resumed):
    env, other = saved("hard", 3, seed=6), resumed("hard", 3, seed=0)
    env.reset()
    actions = random_actions(70, 3)
    for each in actions[:40]:
        result = env.step(each)
    file = io.BytesIO()
    torch.save({name: torch.from_numpy(array) for name, array in env.get_state().items()}, file)
    file.seek(0)
    now = other.set_state(torch.load(file, weights_only=True))
    tolerance = {} if saved is resumed else ROUNDED
    assert_same(flatten((result[0], result[-1])), flatten(now), **tolerance)
    for each in actions[40:]:  # through the end of this episode into the next one
        assert_same(flatten(env.step(each)), flatten(other.step(each)), **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_returned_arrays_are_the_callers(backend):
    env, undisturbed = (backend("simple", 2, seed=8) for _ in range(2))
    results = [flatten(env.reset()) | env.get_state()]
    undisturbed.reset()
    for actions in random_actions(30, 2):
        kept = {name: array.copy() for name, array in results[-1].items()}
        results.append(flatten(env.step(actions)) | env.get_state())
        assert_same(results[-2], kept)  # not written to by the step
        assert_same(flatten(undisturbed.step(actions)) | undisturbed.get_state(), results[-1])
        for name, array in results[-1].items():  # and writing to one disturbs neither the others nor the environment
            others = {key: value for key, value in results[-1].items() if key != name}
            before = {key: value.copy() for key, value in others.items()}
            array[...] = array == 0  # changes every element, of whatever type
            assert_same(others, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([[0, 1, 2], [3, 4, 5]], "environment 1, agent 2: action 5 "),
        ([[0, -1, 2], [3, 4, 9]], "environment 0, agent 1: action -1 "),
        ([[0, 1, 2]], r"\(1, 3\)"),
        ([[0, 1], [2, 3]], r"\(2, 2\)"),
        ([[0.0, 1, 2], [3, 4, 0]], "float64"),
    ],
)
def test_bad_actions(backend, actions, message):
    env = backend("simple", 2)
    env.reset()
    before = env.get_state()
    with pytest.raises(ValueError, match=message):
        env.step(np.array(actions))
    assert_same(env.get_state(), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_of_another_size_is_refused(backend):
    env = backend("simple", 2)
    with pytest.raises(ValueError, match=r"position has shape \(1, 3, 2\)"):
        env.set_state(make_state(CORNERS))


def test_mpe2_for_a_whole_evaluation_takes_little_memory():
    """A surface to draw on takes 2 MB in each environment: 600 in 300 of them."""
    program = """
import resource
from envs.spread import SpreadMPE2
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
env = SpreadMPE2("hard", 300)
env.reset()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(run.stdout.split()[-1]) < 60


# --- pictures ---


def near(frame, colour, tolerance=30):
    """Which pixels of the field, below the line of text, have about this colour."""
    return (abs(frame[HEADER:].astype(int) - colour) <= tolerance).all(2)


def disc_colour(i):
    """Agent i's colour, mixed with white."""
    return np.array(AGENT_COLOURS[i]) * 150 / 255 + 105


@pytest.mark.parametrize("size", [0.5, 1, 3])
def test_agents_are_drawn_to_scale_in_one_view_of_the_whole_episode(size):
    """The first agent goes from the lower left to the lower right, the others stand in the other corners."""
    stay = size * np.array([[-1.0, 1.0], [1.0, 1.0]])
    way = [np.array([[size * x, -size], *stay]) for x in np.linspace(-1, 1, 11)]
    frames = draw_episode(np.stack(way), [[0, 0]] * 3, np.full(10, -2.0))
    assert len(frames) == 11 + 9
    assert all(frame.shape == (SIZE + HEADER, SIZE, 3) and frame.dtype == np.uint8 for frame in frames)
    assert all((frame == frames[10]).all() for frame in frames[11:])
    scale = SIZE / (2 * size + 3 * 0.15)  # half a radius beyond the outermost discs
    for t in (0, 5, 10):
        for i in range(3):
            y, x = np.nonzero(near(frames[t], disc_colour(i), 8))
            low, high = np.array([x.min(), y.min()]), np.array([x.max(), y.max()]) + 1
            np.testing.assert_allclose(high - low, 2 * 0.15 * scale - 2, atol=2)  # less the outline
            place = ((low + high) / 2 - SIZE / 2) * [1, -1] / scale
            np.testing.assert_allclose(place, way[t][i], atol=1.5 / scale)
    rows = {frame[:HEADER].tobytes() for frame in frames}
    assert len(rows) == 11  # step and return


def test_a_covered_landmark_is_seen():
    covered, free = (draw_episode(CORNERS[None], CORNERS * place, [])[0] for place in (1, 0.5))
    crosses = near(covered, LANDMARK_COLOUR).sum()
    assert crosses > 300
    assert crosses == pytest.approx(near(free, LANDMARK_COLOUR).sum(), rel=0.05)


def test_gif_of_the_episode_that_has_ended(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    env = Spread("simple", 1, seed=3)
    env.reset()
    positions, rewards, landmarks = [env.position[0].copy()], [], env.landmark[0].copy()
    for actions in random_actions(25, 1):
        _, reward, *_, info = env.step(actions)
        rewards.append(reward[0])
        positions.append(info["final_obs"][0, :, 2:4] if "final_obs" in info else env.position[0].copy())
    frames = draw_episode(positions, landmarks, rewards)
    assert len(np.unique(np.stack(frames)[:, ::5, ::5].reshape(35, -1), axis=0)) == 26  # it moves in every frame
    env.step(np.zeros((1, 3), np.int64))  # of the next episode
    np.testing.assert_allclose(np.stack(env.draw(0)), np.stack(frames), atol=2)  # the last view is float32
    assert env.save_film(tmp_path) == [tmp_path / "evaluation.gif"]
    assert list(tmp_path.iterdir()) == [tmp_path / "evaluation.gif"]  # and no TensorBoard outside a run's folder
    with Image.open(tmp_path / "evaluation.gif") as gif:
        assert (gif.n_frames, gif.info["duration"], gif.info["loop"], gif.size) == (26, 100, 0, (SIZE, SIZE + HEADER))
        for index in (0, 12, 25):
            gif.seek(index)
            assert abs(np.array(gif.convert("RGB")).astype(int) - frames[index]).mean() < 1  # palette of 256 colours
        assert gif.info["duration"] == 1000  # to see the end
