"""envs/: the interface that all games share, and what their constructors refuse. Each game has its own tests, too."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from envs.smacv2_sim import SMACv2Sim, random_actions
from envs.spread import Spread, SpreadMPE2
from envs.starcraft2 import StarCraft2

ROOT = Path(__file__).parent.parent
MAP = "terran_2_vs_2"
SMACV2, SPREAD = (SMACv2Sim, StarCraft2), (Spread, SpreadMPE2)


def arrays(result):
    """All arrays in what reset or step returned, those of the episodes that ended aside."""
    *values, info = result
    return [*values, *(value for name, value in info.items() if not name.startswith(("final", "_final")))]


@pytest.mark.parametrize(("game", "place"), [(SMACv2Sim, MAP), (Spread, "hard"), (SpreadMPE2, "hard")])
def test_games_keep_to_the_stated_interface(game, place):
    env, rng = game(place, 3, seed=1), np.random.default_rng(0)
    E, N, A, O, S = env.num_envs, env.num_agents, env.num_actions, env.obs_size, env.state_size
    view = {"obs": ((E, N, O), np.float32), "state": ((E, S), np.float32), "action_mask": ((E, N, A), np.bool_)}
    outcome = {"reward": ((E,), np.float32), "terminated": ((E,), np.bool_), "truncated": ((E,), np.bool_)}

    def check(expected, **found):
        for name, (shape, kind) in expected.items():
            assert (found[name].shape, found[name].dtype) == (shape, kind), name

    assert env.name == {"hard": "spread_hard"}.get(place, place)
    assert json.loads(json.dumps(env.about))["backend"] == env.backend
    assert env.restarts == 0
    assert "\n" not in env.title
    obs, info = result = env.reset()
    check(view, obs=obs, **info)
    given, length, ended = [], 0, 0
    while ended < 6:
        given.append((arrays(result), [array.copy() for array in arrays(result)]))
        actions = random_actions(info["action_mask"], rng)
        obs, reward, terminated, truncated, info = result = env.step(actions)
        check(view | outcome, obs=obs, reward=reward, terminated=terminated, truncated=truncated, **info)
        assert info["action_mask"].any(-1).all()
        assert "invalid" not in info
        assert terminated.any() == ("final_obs" in info) == ("final_info" in info)
        if terminated.any():
            check(view, obs=info["final_obs"], **info["final_info"])
            assert ("battle_won" in info["final_info"]) == (game in SMACV2)
        ended += terminated.sum()
        length += 1
    assert length > 2
    for kept, copies in given:  # nothing writes later into what was given out
        assert all(np.array_equal(one, other) for one, other in zip(kept, copies, strict=True))
    env.close()
    env.close()


def test_games_say_what_they_are():
    sim, batched, mpe2 = SMACv2Sim(MAP, 1), Spread("hard", 1), SpreadMPE2("simple", 1)
    assert [env.backend for env in (sim, batched, mpe2)] == ["sim", "batched", "mpe2"]
    assert "NOT StarCraft II" in sim.title
    assert sim.about == {"backend": "sim", "simulator_version": "2"}  # of terran
    assert batched.title == "MPE Spread (hard), batched"
    assert mpe2.title == f"MPE Spread (simple), mpe2 {mpe2.about['mpe2']}"


@pytest.mark.parametrize(
    ("game", "options", "sentence"),
    [
        (
            SMACv2Sim,
            {"prob_obs_enemy": 0},
            "The simulator has no option prob_obs_enemy; it has reward_scale, enemy_wipe and unit_table.",
        ),
        (
            StarCraft2,
            {"enemy_wipe": True},
            "StarCraft II has no option enemy_wipe; it has reward_scale, fix_enemy_wipe, prob_obs_enemy, action_mask, "
            "replay_folder and timeout.",
        ),
        *[(game, {"enemy_wipe": True}, "MPE Spread has no option enemy_wipe; it has none at all.") for game in SPREAD],
        *[(game, {"reward_scale": "none"}, "reward_scale is 'none', expected one of") for game in SMACV2],
        *[(game, {"reward_scale": 1}, "reward_scale is 1, expected one of") for game in SMACV2],
        *[(SMACv2Sim, {"enemy_wipe": x}, f"enemy_wipe is {x!r}, expected True or False.") for x in ("true", "1", 1)],
        (SMACv2Sim, {"unit_table": "hots"}, "unit_table is 'hots', expected one of wol, lotv."),
        (StarCraft2, {"fix_enemy_wipe": "true"}, "fix_enemy_wipe is 'true', expected True or False."),
        (StarCraft2, {"action_mask": 0}, "action_mask is 0, expected True or False."),
        *[(StarCraft2, {"prob_obs_enemy": x}, f"prob_obs_enemy is {x!r}, expected a") for x in (1.5, "0", True)],
        *[(StarCraft2, {"timeout": x}, f"timeout is {x!r}, expected a number") for x in (0, "60", float("nan"))],
        *[(game, {"num_envs": x}, f"num_envs is {x!r}") for game in (*SMACV2, *SPREAD) for x in (0, 1.0, "4", True)],
        *[(game, {"seed": x}, f"seed is {x!r}") for game in (*SMACV2, *SPREAD) for x in (-1, 2**63, 1.5, "1")],
        *[(game, {"map_name": x}, f"unknown map {x!r}: ") for game in SMACV2 for x in ("terran_0_vs_2", "terran", 5)],
        *[(game, {"level": "x"}, "MPE Spread has no level 'x'; it has simple, medium, hard.") for game in SPREAD],
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value)[:40],
)
def test_impossible_options_are_refused_in_one_sentence(game, options, sentence):
    settings = {"num_envs": 2} | ({"map_name": MAP} if game in SMACV2 else {"level": "hard"})
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the text is compared below
        game(**settings | options)
    assert str(refused.value).startswith(sentence)
    assert str(refused.value).endswith(".")
    assert "\n" not in str(refused.value)


# --- the simulator's kernels and copies ---


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copied_simulator_plays_on_and_keeps_its_scale_of_rewards(make_copy):
    env, rng = SMACv2Sim(MAP, 4, seed=2, reward_scale="first_episode"), np.random.default_rng(0)
    _, info = env.reset()
    twin = make_copy(env)
    twin.max_reward[:] *= 2
    total = np.zeros(2)
    for _ in range(60):
        actions = random_actions(info["action_mask"], rng)
        (obs, reward, *_, info), (same, half, *_) = env.step(actions), twin.step(actions)
        np.testing.assert_array_equal(obs, same)
        total += reward.sum(), half.sum()
    assert total[0] > 0
    assert total[0] == pytest.approx(2 * total[1])


def run(*arguments, cwd=ROOT, **variables):
    """Python in a process of its own, with no other settings of numba than these."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment | variables, capture_output=True, text=True, check=False)


BEGIN = ("-c", "import numpy; from envs.smacv2_sim import mix_bits; mix_bits(numpy.uint64(1))")  # compiles one kernel
COMPILING = "smacv2_sim: compiling battle kernels not needed before, up to 15 seconds, "


def test_simulator_refuses_to_do_without_the_compiler():
    done = run("-m", "envs.smacv2_sim", MAP, NUMBA_DISABLE_JIT="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: The simulator is nothing without numba's compiler: unset NUMBA_DISABLE_JIT.\n"


def test_simulator_works_where_no_compiled_kernel_can_be_kept(tmp_path):
    """Neither beside the source, where __pycache__ is no folder, nor at home."""
    shutil.copytree(ROOT / "envs", tmp_path / "envs", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "envs/__pycache__").touch()
    nowhere = {"HOME": os.devnull, "XDG_CACHE_HOME": os.devnull}
    helped = run("-m", "envs.smacv2_sim", "--help", cwd=tmp_path, **nowhere)
    assert (helped.returncode, helped.stderr) == (0, "")
    begun = run(*BEGIN, cwd=tmp_path, **nowhere)
    assert begun.returncode == 0
    assert begun.stderr == COMPILING + "for this run only, unless NUMBA_CACHE_DIR names a folder to keep them in\n"


def test_compilation_is_announced_when_there_is_any(tmp_path):
    first, second = (run(*BEGIN, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert (first.returncode, first.stderr) == (0, COMPILING + "once\n")
    assert (second.returncode, second.stderr) == (0, "")
