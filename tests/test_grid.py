"""The grid of docs/when_it_does_not_learn.md: its rules, and that the MPE scripts play it by name."""

import numpy as np
import pytest
import torch
from common import MPE, config_of, over, run_main
from grid import MOVES, make
from pettingzoo.test import parallel_api_test

from envs.pettingzoo_batch import PettingZooBatch


def towards(seen) -> int:
    """The move that brings an agent nearer to the goal, by what it sees."""
    gap = np.sign(seen[4:6] - seen[:2])
    return MOVES.index((gap[0], 0) if gap[0] else (0, gap[1]))


def test_walking_to_the_goal_ends_it_with_the_reward():
    env = make(reward=100)
    parallel_api_test(env, num_cycles=60)
    for seed in range(50):
        seen, _ = env.reset(seed=seed)
        far = max(np.abs(4 * (view[4:6] - view[:2])).sum() for view in seen.values())
        rewards, steps = [], 0
        while env.agents:
            seen, reward, terminated, truncated, _ = env.step({agent: towards(seen[agent]) for agent in env.agents})
            rewards.append(sum(reward.values()))
            steps += 1
        assert rewards == [0] * (steps - 1) + [100]
        assert (steps, all(terminated.values()), any(truncated.values())) == (round(far), True, False)
        assert steps > 0


@pytest.mark.parametrize("time_limit", ["cut", "end"])
def test_the_time_limit_is_what_was_asked_for(time_limit):
    env = PettingZooBatch("tests.grid:make", 3, max_cycles=6, time_limit=time_limit, show_time=True)
    obs, _ = env.reset(seed=1)
    assert obs.shape == (3, 2, 7)
    for t in range(6):
        assert (obs[..., -1] == np.float32(t / 6)).all()
        obs, reward, terminated, truncated, _ = env.step(np.zeros((3, 2), int))  # nobody moves
        assert not reward.any()
    assert (terminated.all(), truncated.all()) == (time_limit == "end", time_limit == "cut")
    assert not (terminated & truncated).any()


@over(MPE)
def test_the_scripts_play_it(script, tmp_path, capsys):
    words = "time_limit end size 3 max_cycles 6 episode_limit 6 reward 1.5 show_time True"  # of all kinds
    options = ["--env", "tests.grid:make", "--env-options", *words.split(), "--run-dir", tmp_path]
    options += ["--total-timesteps", 200, "--eval-episodes", 4, "--batch-size", 2, "--buffer-size", 8]
    code, output = run_main(script, capsys, *options)
    assert code == 0, output
    assert config_of(tmp_path, "summary")["updates"] > 0
    replay = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["replay"]
    assert replay["terminated"].any()
    expected = dict(time_limit="end", size=3, max_cycles=6, episode_limit=6, reward=1.5, show_time=True)
    assert config_of(tmp_path)["args"]["env_options"] == expected
