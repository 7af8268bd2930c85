"""The simulator's doors: pictures, the smacv2 package's interface, PettingZoo; PettingZoo environments as a batch."""

import copy
import multiprocessing
import re
import sys
import warnings
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete
from pettingzoo import ParallelEnv
from PIL import Image

import softqmix_smacv2
from envs import smacv2_render
from envs.pettingzoo_batch import PettingZooBatch
from envs.pettingzoo_smacv2 import env as turn_based_env
from envs.pettingzoo_smacv2 import parallel_env
from envs.smacv2_package import StarCraftCapabilityEnvWrapper
from envs.smacv2_render import ALLY, ENEMY, Film, record, save_film, watch
from envs.smacv2_sim import MARINE, SMACv2Sim, is_decided, nearest_attack_actions, random_actions

ROOT = Path(__file__).parent.parent


def play(env, steps, rng):
    """Random actions in any batch of our interface. Returns: what each step returned."""
    _, info = env.reset()
    results = []
    for _ in range(steps):
        results.append(env.step(random_actions(info["action_mask"], rng)))
        info = results[-1][-1]
    return results


def refused(sentence, function, *arguments, **options):
    """Is this a ValueError with one sentence that begins so?"""
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text is compared below
        function(*arguments, **options)
    text = str(error.value)
    assert text.startswith(sentence)
    assert text.endswith(".")
    assert "\n" not in text


# --- pictures ---


def count(picture, colour):
    return int((np.abs(picture.astype(int) - colour).max(-1) < 8).sum())


def test_units_are_drawn_where_they_are_in_true_size_with_what_they_have_left():
    env = SMACv2Sim("terran_1_vs_1", 1)
    env.load_battle(0, [("marauder", 8, 24, 125, 0, 0, 0)], [("medivac", 24, 8, 75, 0, 0, 50)])
    picture = env.render(0, size=1024)  # 32 pixels a cell, below a line of 64
    assert (picture.shape, picture.dtype) == ((1152, 1024, 3), np.uint8)
    field = picture[64:-64]
    for colour, x, y, radius in ((ALLY, 8, 24, 0.5625), (ENEMY, 24, 8, 0.75)):
        rows, columns = np.nonzero(np.abs(field.astype(int) - colour).max(-1) < 8)
        np.testing.assert_allclose([columns.mean() / 32, 32 - rows.mean() / 32], [x, y], atol=0.1)
        assert np.ptp(columns) / 64 == pytest.approx(radius, abs=0.08)
    full, half = count(field[:512], smacv2_render.HEALTH), count(field[512:], smacv2_render.HEALTH)
    assert half / 24 == pytest.approx(full / 36, rel=0.25)  # their bars are 36 and 48 pixels long
    env.load_battle(0, [("marauder", 8, 24, 0, 0, 0, 0)], [("medivac", 24, 8, 75, 0, 0, 50)])
    faded = env.render(0, size=1024)
    assert count(faded[64:-64], ALLY) == 0
    assert (faded[64:512, 200:300] != 250).any()


def test_an_agents_sight_is_shown_on_request_and_targets_are_joined():
    env = SMACv2Sim("terran_1_vs_1", 1)
    env.load_battle(0, [("marine", 10, 16, 45, 0, 0, 0)], [("marine", 14, 16, 45, 0, 0, 0)])
    plain, seen = env.render(), env.render(agent=0)
    changed = np.argwhere((plain != seen).any(-1))
    assert np.ptp(changed[:, 0]) / 16 == pytest.approx(2 * env._rules.table["sight"][MARINE], abs=0.3)
    env.step(np.array([[6]]))
    between = env.render()[32:-32, 12 * 16]
    assert (np.abs(between.astype(int) - 250).max(-1) > 20).any()


def test_pictures_that_cannot_be_are_refused(tmp_path):
    env = SMACv2Sim("terran_2_vs_2", 1)
    refused("agent is 2, expected None or an integer from 0 to 1", env.render, agent=2)
    refused("size is 10, expected an integer", env.render, size=10)
    with pytest.raises(IndexError):
        env.render(1)
    refused("The film's file is", record, env, None, tmp_path / "film.mov")
    refused("The film's file is", watch, tmp_path / "missing/film.gif", ["terran_2_vs_2"], {})
    refused("There is nothing to see", save_film, [], tmp_path / "film.gif")
    refused("Films are of the simulator's battles", Film, None)


@pytest.mark.parametrize(("map_name", "seed"), [("zerg_5_vs_5", 0), ("protoss_3_vs_2", 1), ("terran_3_vs_3", 3)])
def test_a_films_battles_end_as_the_simulator_says(map_name, seed):
    """What it plays again for the last picture is what was played: the same state as in final_info."""
    film, twin = Film(SMACv2Sim(map_name, 1, seed)), SMACv2Sim(map_name, 1, seed)
    _, info = film.reset()
    ended = 0
    for _ in range(230):
        *_, terminated, _, info = film.step(nearest_attack_actions(film, info["action_mask"]))
        if terminated[0]:
            ended += 1
            units, step, over = film.moments[-2]
            assert over
            result = info["final_info"]
            word = smacv2_render.outcome(units, step, film._rules)
            assert (word == "won") == result["battle_won"][0]
            assert (word != "time is up") == is_decided(film, result["state"][0])
            twin._world.units[0] = units
            size = -twin.num_agents * twin.num_actions  # the last actions, which the twin has not seen
            np.testing.assert_array_equal(twin.observe(0)[1][:size], result["state"][0][:size])
    assert ended


def test_record_films_what_a_scripts_evaluation_plays(tmp_path, capsys):
    env = SMACv2Sim("zerg_2_vs_2", 1, seed=1)
    agent = softqmix_smacv2.Agent(env.obs_size, env.num_agents, env.num_actions)
    path = tmp_path / "evaluation.gif"
    written = record(env, lambda film: softqmix_smacv2.evaluate(agent, film, 1, [1], "cpu"), path, size=160)
    with Image.open(written[0]) as film:
        assert film.size == (160, 180)
        assert film.n_frames > 5


def test_both_scripted_players_can_be_watched(tmp_path, monkeypatch, capsys):
    from envs import smacv2_sim

    monkeypatch.setattr("sys.argv", ["smacv2_sim", "zerg_1_vs_1", "--watch", str(tmp_path / "film.gif")])
    monkeypatch.setattr(smacv2_render, "FINE", 1)
    assert smacv2_sim.main() == 0
    assert (tmp_path / "film.gif").stat().st_size > 1000
    monkeypatch.setattr("sys.argv", ["smacv2_sim", "--watch", "film.txt"])
    assert smacv2_sim.main() == 2
    assert capsys.readouterr().err.startswith("error: The film's file is 'film.txt'")


# --- the smacv2 package ---


def package_options(race="terran", agents=5, enemies=5, **changes):
    """As in the configuration files that the package comes with."""
    types = {"protoss": ["stalker", "zealot", "colossus"], "terran": ["marine", "marauder", "medivac"]}
    team = {"dist_type": "weighted_teams", "unit_types": types.get(race), "weights": [0.45, 0.45, 0.1], "observe": True}
    if race == "zerg":
        team |= {"unit_types": ["zergling", "baneling", "hydralisk"], "weights": [0.45, 0.1, 0.45]}
    exception = {"terran": ["medivac"], "zerg": ["baneling"]}.get(race)
    team |= {"exception_unit_types": exception} if exception else {}
    start = {"dist_type": "surrounded_and_reflect", "p": 0.5, "map_x": 32, "map_y": 32}
    sizes = {"n_units": agents, "n_enemies": enemies}
    config = {"capability_config": {**sizes, "team_gen": team, "start_positions": start}, "map_name": f"10gen_{race}"}
    config |= {"difficulty": "7", "game_version": None, "obs_own_pos": True, "use_unit_ranges": True, "replay_dir": ""}
    config |= {"reward_scale": True, "reward_scale_rate": 20, "conic_fov": False, "num_fov_actions": 12, "step_mul": 8}
    return copy.deepcopy(config | changes)


@pytest.mark.parametrize(
    ("race", "agents", "enemies", "sizes"),
    [("protoss", 10, 11, (17, 191, 327)), ("terran", 5, 5, (11, 82, 120)), ("zerg", 20, 23, (29, 346, 858))],
)
def test_the_package_is_played_as_pymarl_does(race, agents, enemies, sizes):
    """Its runners read everything through getters after reset and step; numbers are the simulator's own."""
    env, rng = StarCraftCapabilityEnvWrapper(**package_options(race, agents, enemies, seed=3)), np.random.default_rng(0)
    info = env.get_env_info()
    assert (info["n_actions"], info["obs_shape"], info["state_shape"]) == sizes
    assert (info["n_agents"], info["cap_shape"], info["episode_limit"]) == (agents, 3, 200)
    assert len(info["agent_features"]) * agents + len(info["enemy_features"]) * enemies == sizes[2] - sizes[0] * agents
    assert env.get_stats()["win_rate"] == 0
    returns = []
    for battle in range(3):
        obs, state = env.reset()
        total, steps, terminated = 0.0, 0, False
        while not terminated:
            np.testing.assert_array_equal(obs, env.get_obs())
            assert (obs[0].shape, obs[0].dtype, len(obs)) == ((sizes[1],), np.float32, agents)
            assert (state.shape, state.dtype) == ((sizes[2],), np.float32)
            mask = np.array(env.get_avail_actions())
            assert mask[0].tolist() == env.get_avail_agent_actions(0)
            assert set(np.unique(mask)) <= {0, 1}
            reward, terminated, result = env.step(random_actions(mask > 0, rng)[:, None])
            assert (type(reward), type(terminated)) == (float, bool)
            obs, state, total, steps = env.get_obs(), env.get_state(), total + reward, steps + 1
        fallen = [not any(row) for row in obs]  # the getters show the end, the env's next battle waits for reset()
        assert result["dead_allies"] == sum(fallen)
        assert env._episode_steps == steps
        assert env.battles_game == battle + 1
        refused("No battle is being fought", env.step, [1] * agents)
        returns.append(total)
    assert 0 < np.mean(returns) < 20
    assert set(env.get_stats()) == {"battles_won", "battles_game", "battles_draw", "win_rate", "timeouts", "restarts"}
    env.save_replay()
    env.close()


def test_the_packages_seeds_fix_the_battles_and_workers_differ():
    states = [StarCraftCapabilityEnvWrapper(**package_options(seed=seed)).reset()[1] for seed in (1, 1, 2)]
    assert (states[0] == states[1]).all()
    assert (states[0] != states[2]).any()
    env = StarCraftCapabilityEnvWrapper(**package_options())
    assert env.seed(1) == env.seed() == 1
    assert (env.reset()[1] == states[0]).all()
    np.random.seed(5)  # noqa: NPY002 - as trainers do
    first = StarCraftCapabilityEnvWrapper(**package_options()).reset()[1]
    np.random.seed(5)  # noqa: NPY002
    assert (first == StarCraftCapabilityEnvWrapper(**package_options()).reset()[1]).all()
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as one, context.Pool(1) as other:
        workers = [pool.apply(first_state, (package_options(seed=1),)) for pool in (one, other)]
    assert (workers[0] != workers[1]).any()


def first_state(options):
    return StarCraftCapabilityEnvWrapper(**options).reset()[1]


def test_the_package_is_played_as_the_mappo_code_does():
    """It subclasses the wrapper, reads through .env, and leaves obs_own_pos and use_unit_ranges at False."""

    class SMACv2(StarCraftCapabilityEnvWrapper):
        def __init__(self, **options):
            super().__init__(obs_last_action=False, **options)
            self.sizes = self.env.n_agents, self.env.n_actions, self.env.get_obs_size(), self.env.get_state_size()

        def seed(self, seed=None):
            np.random.seed(seed)  # noqa: NPY002

        def step(self, actions):
            reward, terminated, _ = super().step(actions)
            e = self.env
            return reward, terminated, [e._episode_steps, e.episode_limit, e.battles_won, e.battles_game, e.timeouts]

    options = package_options()
    env = SMACv2(capability_config=options["capability_config"], map_name=options["map_name"])
    assert env.sizes == (5, 11, 80, 120)
    env.seed(1)
    obs, _ = env.reset()
    wide = env.sim.observe(0)[0]
    np.testing.assert_array_equal(np.array(obs), np.delete(wide, [-5, -4], axis=1))
    assert set(env.sim._rules.table["sight"]) == {9}
    assert set(env.sim._rules.table["mask_range"]) == {6}
    assert (env.env.force_restarts, env.env.win_counted) == (0, False)
    terminated = False
    while not terminated:
        _, terminated, numbers = env.step([mask.index(1) for mask in env.get_avail_actions()])
    assert numbers[1] == 200
    assert numbers[3] == 1


def test_a_time_out_of_the_package_is_counted_and_marked_on_request():
    env = StarCraftCapabilityEnvWrapper(**package_options(agents=1, enemies=1, continuing_episode=True, seed=0))
    env.reset()
    env.sim.load_battle(0, [("medivac", 1, 1, 150, 0, 0, 50)], [("marauder", 31, 31, 125, 0, 0, 0)])
    env.sim._rules = env.sim._rules._replace(is_terran=False)  # or else a medivac alone has lost
    env.sim.race = "zerg"
    for _ in range(200):
        reward, terminated, info = env.step([1])
    assert (reward, terminated, info["battle_won"], info["episode_limit"]) == (0, True, False, True)
    assert env.get_stats() | {"timeouts": 1, "battles_draw": 1, "battles_game": 1} == env.get_stats()


def test_what_the_simulator_does_not_play_is_refused_by_name():
    def make(**changes):
        team = {name[5:]: changes.pop(name) for name in list(changes) if name.startswith("team_")}
        start = {name[6:]: changes.pop(name) for name in list(changes) if name.startswith("start_")}
        options = package_options(**changes)
        options["capability_config"].get("team_gen", {}).update(team)
        options["capability_config"].get("start_positions", {}).update(start)
        return StarCraftCapabilityEnvWrapper(**options)

    refused("conic_fov is True, but the simulator plays False only.", make, conic_fov=True)
    refused("reward_sparse is True, but the simulator plays False only.", make, reward_sparse=True)
    refused("prob_obs_enemy is 0.0, but the simulator plays 1.0 only.", make, prob_obs_enemy=0.0)
    refused("step_mul is 4, but the simulator plays 8 only.", make, step_mul=4)
    refused("map_name is '3m', but the simulator plays 10gen_protoss", make, map_name="3m")
    refused("capability_config is ['n_units'], but", make, capability_config={"n_units": 5})
    refused(
        "team_gen.weights is [0.3, 0.3, 0.4], but the simulator plays {'marine'", make, team_weights=[0.3, 0.3, 0.4]
    )
    refused("team_gen.dist_type is 'all_teams', but", make, team_dist_type="all_teams")
    refused("team_gen.exception_unit_types is ['marine'], but", make, team_exception_unit_types=["marine"])
    refused("start_positions.p is 0, but the simulator plays 0.5 only.", make, start_p=0)
    refused("seed is -1, expected an integer", make, seed=-1)
    refused("obs_own_pos is 1, expected True or False.", make, obs_own_pos=1)
    refused("colour is 'red', but neither the package nor the simulator", make, colour="red")
    assert make(team_exception_unit_types=[]).sim._rules.exception == -1
    assert make(reward_scale=False)._factor == pytest.approx(make().max_reward / 20)


# --- the simulator in PettingZoo ---


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pettingzoo_passes_its_own_tests(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pettingzoo.test import api_test, parallel_api_test, parallel_seed_test

    parallel_api_test(parallel_env("protoss_3_vs_4"), num_cycles=300)
    parallel_seed_test(parallel_env)
    api_test(turn_based_env("terran_3_vs_3"), num_cycles=100)


def test_pettingzoo_plays_the_simulators_battles():
    env, sim, rng = parallel_env("zerg_4_vs_5", render_mode="rgb_array"), SMACv2Sim("zerg_4_vs_5", 1), None
    observations, infos = env.reset(seed=5)
    obs, info = sim.reset(seed=5)
    rng = np.random.default_rng(0)
    while env.agents:
        assert env.agents == env.possible_agents  # the fallen stay
        for i, agent in enumerate(env.agents):
            assert env.observation_space(agent).contains(observations[agent])
            np.testing.assert_array_equal(observations[agent]["observation"], obs[0, i])
        np.testing.assert_array_equal(env.state(), info["state"][0])
        actions = random_actions(info["action_mask"], rng)
        observations, rewards, terminations, truncations, infos = env.step(
            dict(zip(env.agents, actions[0], strict=True))
        )
        obs, reward, over, _, info = sim.step(actions)
        assert set(rewards.values()) == {float(reward[0])}
        assert not any(infos[agent]["illegal_action"] for agent in infos)
        if over[0]:
            obs, info = info["final_obs"], info["final_info"]
    assert all(terminations.values())
    assert not any(truncations.values())
    assert env.sim.moments[-1][2]
    assert env.render().shape == (576, 512, 3)


def test_pettingzoo_time_is_a_truncation_and_illegal_actions_are_told():
    env = parallel_env("terran_2_vs_1")
    env.reset(seed=0)
    env.sim.load_battle(
        0, [("marine", 1, 1, 45, 0, 0, 0), ("medivac", 2, 1, 150, 0, 0, 50)], [("marine", 31, 31, 45, 0, 0, 0)]
    )
    env.sim._world.battles["step"] = 199
    env._mask[:, 2] = 0
    _, _, terminations, truncations, infos = env.step({"agent_0": 2, "agent_1": 1})
    assert [infos[agent]["illegal_action"] for agent in ("agent_0", "agent_1")] == [True, False]
    assert all(truncations.values())
    assert not any(terminations.values())
    refused("There are actions of ['agent_0'], but the agents are []", env.step, {"agent_0": 1})
    refused("render_mode is 'human'", parallel_env, render_mode="human")
    refused("unknown map 'x'", parallel_env, "x")
    refused("The simulator has no option colour", parallel_env, colour=1)


def test_the_documents_example_runs(capsys):
    text = (ROOT / "docs/simulator.md").read_text()
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    assert 15 <= len(example.splitlines()) <= 45
    exec(example.replace("range(400)", "range(1)"), {})
    assert "return" in capsys.readouterr().out


# --- PettingZoo environments as a batch ---


class Leaving(ParallelEnv):
    """Agent b leaves at step 2 and a at step 4, if a then takes action 0; the rest at step 6, truncated."""

    metadata = {"name": "leaving, early"}  # noqa: RUF012
    possible_agents = ["a", "b"]  # noqa: RUF012

    def __init__(self, fails=False):
        self.spaces = {"a": Box(0, 9, (2, 2)), "b": Discrete(3)}
        self.actions = {"a": Discrete(2), "b": Discrete(4, start=-1)}
        self.fails = fails

    def observation_space(self, agent):
        return Dict({"observation": self.spaces["a"], "action_mask": Box(0, 1, (2,))}) if agent == "a" else Discrete(3)

    def action_space(self, agent):
        return self.actions[agent]

    def reset(self, seed=None, options=None):
        self.t, self.agents = 0, ["a", "b"]
        self.seed = seed if seed is not None else getattr(self, "seed", 0) + 1
        return self.look(), {"a": {}, "b": {"action_mask": [1, 1, 0, 1]}}

    def look(self):
        a = {"observation": np.full((2, 2), self.t, np.float32), "action_mask": np.array([1, self.t < 3], np.int8)}
        return {agent: {"a": a, "b": self.t % 3}[agent] for agent in self.agents}

    def step(self, actions):
        if self.fails:
            raise OSError("the engine stopped")
        assert actions.keys() == set(self.agents)
        assert actions.get("b", 0) in (-1, 0, 2)
        self.t += 1
        observations = self.look()
        dead = {agent: self.t == {"a": 4, "b": 2}[agent] and actions["a"] == 0 for agent in self.agents}
        late = {agent: self.t == 6 for agent in self.agents}
        rewards = {agent: 1.0 for agent in self.agents}
        self.agents = [agent for agent in self.agents if not dead[agent] and not late[agent]]
        return observations, rewards, dead, late, {agent: {"action_mask": [1, 1, 0, 1]} for agent in "b"}


def test_agents_that_differ_and_leave_are_padded():
    env = PettingZooBatch(Leaving, 2, seed=3)
    assert (env.num_agents, env.num_actions, env.obs_size, env.state_size) == (2, 4, 4, 8)
    assert (env.name, env.backend, env.episode_limit) == ("leaving_early", "pettingzoo", 1000)
    obs, info = env.reset()
    np.testing.assert_array_equal(obs[0], [[0, 0, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(info["action_mask"][0], [[1, 1, 0, 0], [1, 1, 0, 1]])
    refused("environment 1, agent 1: action 2 is not available", env.step, np.array([[0, 0], [0, 2]]))
    refused("environment 0, agent 0: action -1 is not available", env.step, np.array([[-1, 0], [0, 0]]))
    refused("actions are float64 (2, 2), expected integers (2, 2)", env.step, np.zeros((2, 2)))
    rewards = []
    for t in range(1, 5):
        obs, reward, terminated, truncated, info = env.step(np.array([[0, 0], [1 if t in (2,) else 0, 0]]))
        rewards.append(reward.tolist())
        if t in (2, 3):  # "b" has left in environment 0 only
            np.testing.assert_array_equal(obs[0, 1], 0)
            np.testing.assert_array_equal(info["action_mask"][0, 1], [1, 0, 0, 0])
            assert info["action_mask"][1, 1].sum() == 3
    assert rewards == [[2, 2], [2, 2], [1, 2], [1, 2]]
    assert (terminated.tolist(), truncated.tolist()) == ([True, False], [False, False])
    np.testing.assert_array_equal(info["final_obs"][0, 0], 4)
    np.testing.assert_array_equal(info["final_info"]["action_mask"][0], [[1, 0, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(obs[0, 0], 0)
    while not (ended := terminated | truncated)[1]:
        obs, _, terminated, truncated, info = env.step(np.zeros((2, 2), int))
    assert (ended[1], truncated[1], terminated[1]) == (True, True, False)
    np.testing.assert_array_equal(info["final_obs"][1], [[0, 0, 0, 0], [1, 0, 0, 0]])  # "a" had left at 4


def test_the_batch_refuses_what_cannot_be():
    make = "mpe2.simple_reference_v3"
    refused("The environment nosuch.thing cannot be imported", PettingZooBatch, "nosuch.thing", 1)
    refused("The module json has no function parallel_env.", PettingZooBatch, "json", 1)
    refused("The environment is 'a b', expected a function", PettingZooBatch, "a b", 1)
    refused("The environment is a OrderEnforcingWrapper", PettingZooBatch, make + ":env", 1)
    refused("agent_0's actions are Box", PettingZooBatch, make, 1, continuous_actions=True)
    refused("The environment cannot be made with the options {'x': 1}", PettingZooBatch, make, 1, x=1)
    refused("num_envs is 0", PettingZooBatch, make, 0)
    refused("team_reward is 'max', expected one of sum, mean.", PettingZooBatch, make, 1, team_reward="max")
    refused("The environment has no state()", PettingZooBatch, Leaving, 1, state="env")
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # or else the worker imports this whole file
    with pytest.raises(RuntimeError, match=r"(?s)worker process failed: OSError: the engine stopped.*, in step"):
        play(PettingZooBatch(lambda: Leaving(fails=True), 1, workers=1), 1, np.random.default_rng(0))


@pytest.mark.parametrize("what", ["reward", "view"])
def test_numbers_that_are_not_finite_are_told_where_they_come_from(what):
    class Broken(Leaving):
        def step(self, actions):
            observations, rewards, *rest = super().step(actions)
            if what == "reward":
                rewards["b"] = float("inf")
            else:
                observations["a"]["observation"][0, 0] = np.nan
            return observations, rewards, *rest

    env = PettingZooBatch(Broken, 1)
    _, info = env.reset()
    with pytest.raises(FloatingPointError, match="step 1 gives rewards or views that are not finite"):
        env.step(info["action_mask"].argmax(-1))


@pytest.mark.parametrize(
    ("make", "sizes"),  # N, A, O, S
    [("mpe2.simple_reference_v3", (2, 50, 21, 42)), ("mpe2.simple_speaker_listener_v4", (2, 5, 11, 14))],
)
def test_environments_of_others_keep_to_our_interface(make, sizes):
    env, again = (PettingZooBatch(make, 3, seed=7, max_cycles=6) for _ in range(2))
    assert (env.num_agents, env.num_actions, env.obs_size, env.state_size) == sizes
    assert (env.episode_limit, env.restarts, env.about["mpe2"]) == (6, 0, again.about["mpe2"])
    _, info = env.reset()
    assert info["action_mask"][0, 0].sum() == (50 if sizes[1] == 50 else 3)  # the speaker has three words
    results = play(env, 12, np.random.default_rng(0))
    for t, (obs, reward, terminated, truncated, info) in enumerate(results):
        assert (obs.shape, obs.dtype, reward.shape, reward.dtype) == ((3, 2, sizes[2]), np.float32, (3,), np.float32)
        assert (info["state"].shape, info["state"].dtype) == ((3, sizes[3]), np.float32)
        assert truncated.tolist() == [t % 6 == 5] * 3  # mpe2 truncates, and its last value is to be bootstrapped
        assert not terminated.any()
        assert ("final_obs" in info) == truncated.any()
    again.reset()
    for one, other in zip(results, play(again, 12, np.random.default_rng(0)), strict=True):
        np.testing.assert_array_equal(one[0], other[0])
    assert len(np.unique(results[0][0][:, 1].round(4), axis=0)) == 3  # each environment its own episode
    first = env.reset(seed=7)[0]
    np.testing.assert_array_equal(first, PettingZooBatch(make, 3, seed=7).reset()[0])
    assert (env.reset()[0] != first).any()
    mean = PettingZooBatch(make, 3, seed=7, max_cycles=6, team_reward="mean")
    mean.reset()
    np.testing.assert_allclose(play(mean, 1, np.random.default_rng(0))[0][1] * 2, results[0][1], rtol=1e-5)


def test_workers_play_the_same_and_a_checkpoint_begins_new_episodes():
    options = {"num_envs": 3, "seed": 1, "max_cycles": 4}
    one, many = (PettingZooBatch("mpe2.simple_reference_v3", workers=workers, **options) for workers in (0, 2))
    pairs = zip(*(play(env, 9, np.random.default_rng(0)) for env in (one, many)), strict=True)
    for left, right in pairs:
        for a, b in zip(left[:4], right[:4], strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(left[4]["state"], right[4]["state"])
    many.set_state(many.get_state())
    info = many.step(np.zeros((3, 2), int))[-1]
    assert info["invalid"].all()
    assert "invalid" not in many.step(np.zeros((3, 2), int))[-1]
    many.close()
    many.close()
