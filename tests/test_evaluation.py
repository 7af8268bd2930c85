"""Test episodes of all four scripts, in an environment whose lengths, wins and returns are known in advance."""

import math
import statistics

import numpy as np
import pytest
import torch
from common import MPE, SIZES, SMACV2, StandIn, evaluate, over

# The episodes of each environment, over and over: steps, whether it is won, return, whether a time limit cuts it off
BATTLES = (
    ((2, True, 5.0, False), (3, False, 1.0, True), (2, True, 9.0, False), (2, True, 9.0, False)),
    ((4, False, 2.0, False), (2, True, 7.0, False), (2, True, 9.0, False)),
    ((5, False, 3.0, True), (6, False, 4.0, False)),
)
SPREAD = (((4, False, -5.0, False),), ((4, False, -1.0, True),), ((4, False, -7.5, False),))  # all of one length


class Known:
    """Battles in which only action t mod A is available at time t, and agents see t.

    All of the return comes with the first step, but for 1 that is taken from winners and given to losers at the end.
    """

    num_agents, num_actions, obs_size, state_size = vars(SIZES).values()

    def __init__(self, battles):
        self.battles, self.num_envs, self.seeds = battles, len(battles), []
        self.episode_limit = max(steps for env in battles for steps, *_ in env)

    def look(self):
        E, N, A = self.num_envs, self.num_agents, self.num_actions
        mask = (np.arange(A) == np.array(self.time)[:, None, None] % A).repeat(N, 1)  # (E, N, A)
        obs = np.tile(np.array(self.time, np.float32)[:, None, None], (1, N, self.obs_size))
        # Execution knows no global state: nan would spoil what used it
        return obs, {"state": np.full((E, self.state_size), np.nan, np.float32), "action_mask": mask}

    def reset(self, seed=None):
        self.seeds.append(seed)
        self.time, self.number = [0] * self.num_envs, [0] * self.num_envs
        return self.look()

    def step(self, action):
        E = range(self.num_envs)
        assert (action == np.array(self.time)[:, None] % self.num_actions).all(), "an unavailable action"
        now = [self.battles[e][self.number[e] % len(self.battles[e])] for e in E]
        reward, ended, cut_off, won = (np.zeros(self.num_envs, kind) for kind in (float, bool, bool, bool))
        for e, (steps, is_won, total, limit) in enumerate(now):
            late = -1 if is_won else 1
            reward[e] += (total - late) * (self.time[e] == 0)
            self.time[e] += 1
            if self.time[e] == steps:
                reward[e] += late
                ended[e], cut_off[e], won[e] = not limit, limit, is_won
        final_obs, final_info = self.look()
        for e in np.flatnonzero(ended | cut_off):
            self.time[e], self.number[e] = 0, self.number[e] + 1
        obs, info = self.look()
        return obs, reward, ended, cut_off, info | {
            "final_obs": final_obs, "final_info": final_info | {"battle_won": won},
        }  # fmt: skip


def count(inputs):
    """An agent whose hidden state counts its steps, and to whom unavailable actions are dearest."""

    def step(obs, last_action, hidden):
        inputs.append((obs[:, 0, 0].clone(), last_action.clone(), hidden.clone()))
        values = torch.where(torch.arange(Known.num_actions) == obs[..., :1] % Known.num_actions, -1.0, 1.0)
        return values, hidden + 1

    return StandIn(step, hidden_size=1)


@over(SMACV2)
@pytest.mark.parametrize("quota", [1, 2, 4])
def test_every_environment_counts_its_first_battles_however_short(script, quota):
    """Short battles are won, and most environments end many of them while the last one is at its second."""
    counted = [env[i % len(env)] for env in BATTLES for i in range(quota)]
    returns = [total for _, _, total, _ in counted]
    assert evaluate(script, count([]), Known(BATTLES), 3 * quota) == {
        "return_mean": pytest.approx(statistics.mean(returns)),
        "return_std": pytest.approx(statistics.stdev(returns)),
        "win_rate": pytest.approx(sum(won for _, won, _, _ in counted) / len(counted)),
    }


@over(MPE)
def test_every_environment_plays_one_episode(script):
    assert evaluate(script, count([]), Known(SPREAD), 3) == {
        "return_mean": pytest.approx(-4.5),
        "return_std": pytest.approx(statistics.stdev([-5, -1, -7.5])),
        "return_se": pytest.approx(statistics.stdev([-5, -1, -7.5]) / 3**0.5),
    }


class Breaks(Known):
    """Environment 1 loses its first battle with the game after two steps, and begins it again."""

    broken = False

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        lost = (np.arange(self.num_envs) == 1) & (self.time[1] == 2 and not self.broken)
        if lost.any():
            self.broken, self.time[1] = True, 0
            obs, now = self.look()
            info |= now
        return obs, reward, terminated, truncated, info | {"invalid": lost}


@over(SMACV2)
def test_a_battle_that_was_lost_with_its_game_counts_for_nothing(script):
    inputs = []
    assert evaluate(script, count(inputs), Breaks(BATTLES), 6) == evaluate(script, count([]), Known(BATTLES), 6)
    for time, last_action, hidden in inputs:
        assert torch.equal(hidden[:, :, 0], time[:, None].expand(3, 3))
        assert torch.equal(last_action == -1, (time == 0)[:, None].expand(3, 3))


@over(SMACV2 + MPE)
def test_each_battle_begins_without_memory(script):
    """After a time limit, too. Within a battle, the last action is the one taken at the step before."""
    inputs, battles = [], SPREAD if script in MPE else BATTLES
    evaluate(script, count(inputs), Known(battles), 3 if script in MPE else 6)
    assert len(inputs) == (4 if script in MPE else 5 + 6)
    for time, last_action, hidden in inputs:
        assert torch.equal(hidden[:, :, 0], time[:, None].expand(3, 3))
        before = torch.where(time > 0, (time - 1) % Known.num_actions, -1).long()
        assert torch.equal(last_action, before[:, None].expand(3, 3))


@over(SMACV2 + MPE)
def test_the_seed_decides_the_battles(script):
    env = Known(SPREAD)
    for seed in (3, 8, 3):
        evaluate(script, count([]), env, 3, seed)
    one, other, again = env.seeds
    assert one == again != other


@over(SMACV2 + MPE)
def test_a_single_episode_has_no_deviation(script):
    result = evaluate(script, count([]), Known(SPREAD[:1]), 1)
    assert result["return_mean"] == -5
    assert math.isnan(result["return_std"])


@over(SMACV2)
def test_real_battles_follow_the_seed(script):
    env = script.make_env(script.Args(map="terran_3_vs_2", backend="sim"), 4, 0)
    torch.manual_seed(0)
    agent = script.Agent(env.obs_size, env.num_agents, env.num_actions)
    first, again, other = (evaluate(script, agent, env, 12, seed) for seed in (7, 7, 8))
    assert first == again
    assert first != other


@over(SMACV2)
@pytest.mark.parametrize(("episodes", "num_envs"), [(1, 1), (32, 32), (1000, 50), (97, 1), (128, 64)])
def test_evaluation_environments_divide_the_battles(script, episodes, num_envs):
    _, eval_env, _, _ = script.prepare(script.Args(map="terran_3_vs_2", backend="sim", eval_episodes=episodes))
    assert eval_env.num_envs == num_envs
