"""The StarCraft II backend: real smacv2 package and worker processes against the stand-in of fake_sc2.py.

What needs no smacv2 always runs. For the rest: an environment of requirements-smacv2.txt, then
`pytest tests/test_starcraft2.py` (four minutes).
"""

import functools
import importlib.util
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import common
import numpy as np
import pytest

import softqmix_smacv2 as script
from envs import starcraft2
from envs.smacv2_sim import (
    BATTLE,
    GOLDEN,
    RACES,
    WOL_UNITS,
    SMACv2Sim,
    expected_max_reward,
    parse_map_name,
    random_actions,
    uniform,
)

sys.path.insert(0, str(Path(__file__).parent))
import fake_sc2

needs_smacv2 = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("smacv2", "websockets")),
    reason="smacv2 is not installed: run this file in a virtual environment made from requirements-smacv2.txt",
)


# ---------------------------------------------------------------------------------------------------------------------
# Without smacv2
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A complete installation, as far as check_starcraft2 looks."""
    monkeypatch.setenv("SC2PATH", str(fake_sc2.install(tmp_path / "StarCraftII")))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1")
    return tmp_path / "StarCraftII"


def test_check_finds_the_game(installed):
    found = starcraft2.check_starcraft2("protoss_5_vs_5")
    assert found["game"] == str(installed / "Versions/Base75689/SC2_x64")
    assert found["smacv2"] == found["protobuf"] == "1"


def test_check_knows_the_default_folder(installed, monkeypatch):
    monkeypatch.delenv("SC2PATH")
    monkeypatch.setenv("HOME", str(installed.parent))
    assert starcraft2.check_starcraft2("protoss_5_vs_5")["game"].startswith(str(installed))


def test_check_names_the_missing_package(installed, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "smacv2" else name)
    with pytest.raises(ValueError, match=r"packages are missing: smacv2: install as docs/starcraft2\.md"):
        starcraft2.check_starcraft2("protoss_5_vs_5")


def test_check_names_the_missing_folder(installed, monkeypatch):
    monkeypatch.setenv("SC2PATH", str(installed / "elsewhere"))
    with pytest.raises(ValueError, match=r"No StarCraft II in .*elsewhere: .*SC2PATH"):
        starcraft2.check_starcraft2("protoss_5_vs_5")


@pytest.mark.parametrize("damage", [Path.unlink, lambda game: game.chmod(0o644)], ids=["missing", "not executable"])
def test_check_names_the_missing_binary(installed, damage):
    damage(installed / "Versions/Base75689/SC2_x64")
    if os.geteuid() == 0 and (installed / "Versions/Base75689/SC2_x64").exists():
        assert not os.access(installed / "Versions/Base75689/SC2_x64", os.X_OK)  # holds for root, too
    with pytest.raises(ValueError, match=r"No executable Versions/Base.*unpack the Linux package"):
        starcraft2.check_starcraft2("protoss_5_vs_5")


def test_check_names_the_missing_map(installed):
    (installed / "Maps/SMAC_Maps/32x32_flat.SC2Map").unlink()
    with pytest.raises(ValueError, match=r"No map .*32x32_flat\.SC2Map: copy the smacv2 repository's SMAC_Maps"):
        starcraft2.check_starcraft2("protoss_5_vs_5")


def test_check_refuses_an_unknown_map(installed):
    with pytest.raises(ValueError, match="unknown map"):
        starcraft2.check_starcraft2("protoss_5")


def test_each_configuration_is_new():
    config = starcraft2.sc2_config("terran_10_vs_11", prob_obs_enemy=0.0)
    assert (config["map_name"], config["prob_obs_enemy"]) == ("10gen_terran", 0.0)
    capabilities = config["capability_config"]
    assert (capabilities["n_units"], capabilities["n_enemies"]) == (10, 11)
    assert capabilities["team_gen"]["exception_unit_types"] == ["medivac"]
    capabilities["team_gen"]["unit_types"].clear()  # as the package might
    assert starcraft2.sc2_config("terran_10_vs_11")["capability_config"]["team_gen"]["unit_types"] == list(
        RACES["terran"].types
    )


def test_constructor_starts_nothing(installed):
    env = starcraft2.StarCraft2("zerg_5_vs_5", 2)
    assert (env.name, env.backend, env.restarts) == ("zerg_5_vs_5", "starcraft2", 0)
    assert env.about["simulator_version"] is None
    assert env.about["game"] == str(installed / "Versions/Base75689/SC2_x64")
    json.dumps(env.about)
    env.set_state(env.get_state())
    assert multiprocessing.active_children() == []
    env.close()
    env.close()


# ---------------------------------------------------------------------------------------------------------------------
# With smacv2: the environment
# ---------------------------------------------------------------------------------------------------------------------


class Games:
    """The stand-ins started during a test."""

    def __init__(self, folder: Path):
        self.log = folder / "games"

    def started(self) -> list[tuple[int, int]]:
        """(process id, port) of each."""
        return (
            [tuple(map(int, line.split())) for line in self.log.read_text().splitlines()] if self.log.exists() else []
        )

    def running(self) -> list[int]:
        return [pid for pid, _ in self.started() if is_running(pid)]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def games(tmp_path, monkeypatch):
    monkeypatch.setenv("SC2PATH", str(fake_sc2.install(tmp_path / "StarCraftII")))
    monkeypatch.setenv("FAKE_SC2_LOG", str(tmp_path / "games"))
    games = Games(tmp_path)
    yield games
    left = games.running()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


@pytest.fixture
def make_env(games):
    """StarCraft2, closed at the end of the test."""
    envs = []

    def make(*args, **options):
        envs.append(starcraft2.StarCraft2(*args, **{"timeout": 60.0, **options}))
        return envs[-1]

    yield make
    for env in envs:
        env.close()


def play(env, steps: int, seed: int = 0):
    """Yield what each step with random actions returns, and the info before it."""
    rng = np.random.default_rng(seed)
    _, info = env.reset()
    for _ in range(steps):
        before = info
        obs, reward, terminated, truncated, info = env.step(random_actions(info["action_mask"], rng))
        yield before, obs, reward, terminated, truncated, info


def last_actions(env, state: np.ndarray) -> np.ndarray:
    """The state's last part, all zeros at a battle's start: (E, N A)."""
    return state[:, -env.num_agents * env.num_actions :]


@needs_smacv2
def test_interface_is_the_simulators(make_env):
    env, sim = make_env("terran_5_vs_5", 2, seed=1), SMACv2Sim("terran_5_vs_5", 2, seed=1)
    sizes = ("num_envs", "num_agents", "num_enemies", "num_actions", "obs_size", "state_size")
    for name in ("map_name", "episode_limit", *sizes):
        assert getattr(env, name) == getattr(sim, name)
    ended = {}

    def shapes(value):
        return {key: shapes(v) for key, v in value.items()} if isinstance(value, dict) else (value.shape, value.dtype)

    for name, batch in (("game", env), ("simulator", sim)):
        for _, obs, reward, terminated, truncated, info in play(batch, 400):
            assert not truncated.any()
            assert not info.pop("invalid", np.zeros(1)).any()
            if terminated.any():
                assert not last_actions(env, info["state"])[terminated].any()
                assert last_actions(env, info["final_info"]["state"])[terminated].any()
                assert not info["final_obs"][~terminated].any()
                ended[name] = shapes({"obs": obs, "reward": reward, "terminated": terminated, **info})
                break
    assert ended["game"] == ended["simulator"]


@needs_smacv2
def test_forbidden_action_is_refused_before_the_package_dies_of_it(make_env):
    env = make_env("protoss_5_vs_5", 1)
    env.reset()
    with pytest.raises(ValueError, match="mask forbids"):
        env.step(np.zeros((1, 5), np.int64))  # no-op is for the dead
    for wrong in (np.full((1, 5), -1), np.full((1, 5), env.num_actions)):
        with pytest.raises(ValueError, match="the actions are not all from 0 to"):
            env.step(wrong)
    for wrong in (np.ones((1, 5)), np.ones((1, 4), np.int64), np.ones(5, np.int64)):
        with pytest.raises(ValueError, match="expected integers"):
            env.step(wrong)
    env.step(np.ones((1, 5), np.int64))
    assert env.restarts == 0


@needs_smacv2
def test_seeds_fix_teams_and_positions(make_env):
    env = make_env("zerg_5_vs_5", 2, seed=7)
    env.reset()
    state = env.reset(seed=7)[1]["state"]
    again = env.reset(seed=7)[1]["state"]
    other = env.reset(seed=8)[1]["state"]
    assert np.array_equal(state, again)
    assert np.array_equal(make_env("zerg_5_vs_5", 2, seed=7).reset()[1]["state"], state)
    assert not np.array_equal(state, other)
    assert not np.array_equal(state[0], state[1])
    assert not np.array_equal(env.reset()[1]["state"], other)


@needs_smacv2
@pytest.mark.parametrize("reward_scale", ["expected", "first_episode"])
def test_reset_before_the_first_end_launches_no_other_game(make_env, games, reward_scale):
    """Nor does it change the reward's scale: the same battle, begun again, gives the same rewards."""
    env = make_env("zerg_5_vs_5", 1, seed=7, reward_scale=reward_scale)
    env.reset()
    rewards = []
    for _ in range(2):
        rng, total = np.random.default_rng(0), 0.0
        _, info = env.reset(seed=7)
        for _ in range(20):
            _, reward, *_, info = env.step(random_actions(info["action_mask"], rng))
            total += float(reward[0])
        rewards.append(total)
    assert rewards[0] > 0
    assert rewards[0] == pytest.approx(rewards[1])
    assert len(games.started()) == 1


@needs_smacv2
def test_every_game_has_its_own_port(make_env, games):
    training, evaluation = make_env("protoss_5_vs_5", 2), make_env("protoss_5_vs_5", 2)
    training.reset()
    evaluation.reset()
    started = games.started()
    assert len(started) == 4
    assert len({port for _, port in started}) == 4


@needs_smacv2
@pytest.mark.parametrize("reward_scale", ["expected", "first_episode"])
def test_reward_scale_is_the_simulators_also_after_a_crash(make_env, monkeypatch, tmp_path, reward_scale):
    """Rewards follow from the enemies in two states in a row; the scale must not depend on teams or crashes."""
    if reward_scale == "expected":  # the package's own way starts anew with a new game
        monkeypatch.setenv("FAKE_SC2_FAULT", "crash@40")
        monkeypatch.setenv("FAKE_SC2_FAULT_FILE", str(tmp_path / "once"))
    env = make_env("protoss_5_vs_5", 1, reward_scale=reward_scale)
    bodies = {unit.name: unit for unit in WOL_UNITS}
    health, shield = (
        np.array([getattr(bodies[t], key) for t in RACES["protoss"].types]) for key in ("health", "shield")
    )

    def enemies(state):
        """Type bits (M, 3) and HP + shield (M,)."""
        rows = state[0, 5 * 8 : 5 * 8 + 5 * 7].reshape(5, 7).astype(float)  # HP, x, y, shield, type bits
        return rows[:, 4:], rows[:, 0] * (rows[:, 4:] @ health) + rows[:, 3] * (rows[:, 4:] @ shield)

    scale = expected_max_reward("protoss", 5, 5) if reward_scale == "expected" else None
    compared = battles = 0
    for before, _, reward, terminated, _, info in play(env, 300):
        bits, pool = enemies(before["state"])
        if scale is None:  # of the first battle's enemies
            scale = 250 + (bits @ (health + shield)).sum()
        if info["invalid"][0]:
            assert reward[0] == 0
            continue
        after = info["final_info"] if terminated[0] else info
        new_bits, new_pool = enemies(after["state"])
        raw = max(pool.sum() - new_pool.sum() + 10 * (bits.sum() - new_bits.sum()), 0) + 200 * after["battle_won"][0]
        assert reward[0] == pytest.approx(raw * 20 / scale, abs=2e-5)
        compared += raw > 0
        battles += terminated[0]
    assert compared > 10
    assert battles > 1
    assert env.restarts == (reward_scale == "expected")


# ---------------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------------


@needs_smacv2
@pytest.mark.parametrize("fault", ["crash@40", "error@40", "kill@40", "hang@40", "spawn@3", "crash@1", "start@3"])
def test_lost_battles_are_replaced_and_never_taken_for_real_ones(make_env, games, monkeypatch, tmp_path, fault):
    """One game fails once: its row is marked, shows a new battle, and neither it nor its neighbour mixes up battles."""
    monkeypatch.setenv("FAKE_SC2_FAULT", fault)
    monkeypatch.setenv("FAKE_SC2_FAULT_FILE", str(tmp_path / "once"))
    env = make_env("protoss_5_vs_5", 2, timeout=20.0)
    invalid, ended, length = 0, 0, np.zeros(2, int)
    for _, obs, reward, terminated, _, info in play(env, 130):
        length += 1
        lost = info["invalid"]
        invalid += lost.sum()
        assert not terminated[lost].any()
        assert not reward[lost].any()
        assert not last_actions(env, info["state"])[lost | terminated].any()
        assert last_actions(env, info["state"])[~lost & ~terminated].any(1).all()
        assert info["action_mask"].any(-1).all()
        assert np.isfinite(obs).all()
        for e in np.flatnonzero(terminated):
            assert 5 in (info["dead_allies"][e], info["dead_enemies"][e]) or length[e] == 200
            assert info["final_obs"][e].any() or info["dead_allies"][e] == 5
            ended += 1
        length[lost | terminated] = 0
    assert ended > 0
    if fault == "start@3":  # slow, not lost
        assert (invalid, env.restarts) == (0, 0)
    else:
        assert env.restarts == 1
        assert invalid == (fault != "crash@1")  # that one was lost before anything was seen of it
        assert len(games.running()) == 2


@needs_smacv2
def test_game_that_never_starts_ends_the_run(make_env, games, monkeypatch):
    monkeypatch.setenv("FAKE_SC2_FAULT", "start")
    env = make_env("protoss_5_vs_5", 1, timeout=8.0)
    env.max_failures = 2
    with pytest.raises(ConnectionError, match="failed 2 times in a row, the last time: ConnectError"):
        env.reset()
    assert len(games.started()) == 2


@needs_smacv2
def test_game_that_always_crashes_ends_the_run(make_env, monkeypatch):
    monkeypatch.setenv("FAKE_SC2_FAULT", "crash@5")
    env = make_env("protoss_5_vs_5", 1)
    env.max_failures = 3
    with pytest.raises(
        ConnectionError, match="failed 3 times in a row, the last time: ConnectionError: the game crashed"
    ):
        for _ in play(env, 100):
            pass


@needs_smacv2
def test_checkpoint_declares_the_running_battles_lost(make_env):
    env = make_env("protoss_5_vs_5", 2, seed=3)
    _, info = env.reset()
    first = info["state"]
    saved = env.get_state()
    env.set_state(saved)
    _, *outcome, info = env.step(np.zeros((2, 5), np.int64))  # actions for battles long gone
    assert info["invalid"].all()
    assert not np.any(outcome)  # no reward, not terminated, not truncated
    assert not last_actions(env, info["state"]).any()
    assert not np.array_equal(info["state"], first)
    *_, info = env.step(info["action_mask"].argmax(-1))
    assert not info["invalid"].any()


@needs_smacv2
def test_games_start_when_they_are_needed_and_close_ends_them_twice(make_env, games):
    saved = make_env("protoss_5_vs_5", 2, seed=3).get_state()
    env, other = make_env("protoss_5_vs_5", 2, seed=3), make_env("protoss_5_vs_5", 2, seed=8)
    env.set_state(saved)
    assert games.started() == []
    _, *outcome, info = env.step(np.zeros((2, 5), np.int64))  # actions for nothing
    assert info["invalid"].all()
    assert not np.any(outcome)
    _, first = other.reset(seed=3)  # the seed of what is launched, not one more
    assert np.array_equal(first["state"], info["state"])
    first["action_mask"][:] = False  # the caller's own
    assert not other.step(np.ones((2, 5), np.int64))[-1]["invalid"].any()
    assert len(games.running()) == 4
    for each in (env, other, env, other):
        each.close()
    assert wait_until(lambda: not games.running())
    assert env.restarts == other.restarts == 0


@needs_smacv2
def test_replays_are_saved(make_env, tmp_path):
    env = make_env("protoss_5_vs_5", 2)
    env.reset()
    files = env.save_replay(tmp_path / "replays", "step_1000")
    assert [Path(file).parent for file in files] == [tmp_path / "replays"] * 2
    assert all(Path(file).read_bytes() == b"a replay" for file in files)
    *_, info = env.step(np.ones((2, 5), np.int64))
    assert not info["invalid"].any()


@needs_smacv2
def test_replays_of_seeded_battles_are_kept_where_the_option_says(make_env, tmp_path):
    """After each test and at the end; the battles of training, which are not seeded, leave none."""
    for seeds, names in (([None, None], []), ([5, 6], ["1_0", "1_1", "2_0", "2_1"])):
        env = make_env("protoss_5_vs_5", 2, replay_folder=str(tmp_path / f"{len(names)}"))
        for seed in seeds:
            env.reset(seed=seed)
        env.close()
        env.close()
        found = sorted(file.name for file in tmp_path.glob(f"{len(names)}/*"))  # with the time at the end
        assert len(found) == len(names)
        assert all(file.startswith(f"protoss_5_vs_5_{name}_") for file, name in zip(found, names, strict=True))


@needs_smacv2
@pytest.mark.parametrize("end", ["return", "exception", "interrupt", "terminate", "kill", "kill in a hang"])
def test_nothing_is_left_however_the_trainer_ends(games, monkeypatch, tmp_path, end):
    if end == "kill in a hang":  # the workers wait for their games and cannot notice the end of their pipes
        monkeypatch.setenv("FAKE_SC2_FAULT", "hang@10")
    program = tmp_path / "trainer.py"
    program.write_text(f"""
from envs.starcraft2 import StarCraft2

if __name__ == "__main__":
    env = StarCraft2("protoss_5_vs_5", 2)
    obs, info = env.reset()
    print(*[worker.pid for worker in env._workers], flush=True)
    while {end!r} not in ("return", "exception"):
        *_, info = env.step(info["action_mask"].argmax(-1))
    if {end!r} == "exception":
        raise SystemError
""")
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    trainer = subprocess.Popen(
        [sys.executable, program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=environment,
    )
    pids = [int(pid) for pid in trainer.stdout.readline().split()] + [pid for pid, _ in games.started()]
    assert len(pids) == 4
    time.sleep(0.5)
    if end == "interrupt":
        os.killpg(trainer.pid, signal.SIGINT)  # the terminal sends it to everybody
    elif end not in ("return", "exception"):
        trainer.send_signal(signal.SIGTERM if end == "terminate" else signal.SIGKILL)
    _, errors = trainer.communicate(timeout=30)
    assert wait_until(lambda: not any(map(is_running, pids)))
    codes = {"return": 0, "exception": 1, "interrupt": -signal.SIGINT, "terminate": -signal.SIGTERM}
    assert trainer.returncode == codes.get(end, -signal.SIGKILL)
    assert b"Process SpawnProcess" not in errors  # no worker complains beside the trainer
    if end in ("return", "exception", "interrupt"):
        assert not list(tmp_path.glob("sc2-*"))


# ---------------------------------------------------------------------------------------------------------------------
# With smacv2: training
# ---------------------------------------------------------------------------------------------------------------------


@needs_smacv2
@pytest.mark.parametrize("fault", ["none", "crash@60", "hang@60", "error@60", "kill"])
def test_training_goes_on_and_stores_only_whole_battles(games, monkeypatch, tmp_path, fault):
    """Two games to train on, two to test on, one fault in one of them."""
    stored, stop = [], threading.Event()
    monkeypatch.setenv("FAKE_SC2_FAULT", "" if fault in ("none", "kill") else fault)
    monkeypatch.setenv("FAKE_SC2_FAULT_FILE", str(tmp_path / "fault"))

    class Replay(deque):
        def append(self, rows):
            stored.append(common.from_rows({name: column.clone() for name, column in rows.items()}))
            if fault == "kill" and len(stored) == 3:
                os.kill(games.running()[0], signal.SIGKILL)
            super().append(rows)

    monkeypatch.setattr(script, "deque", Replay)
    monkeypatch.setattr(
        starcraft2.StarCraft2, "__init__", functools.partialmethod(starcraft2.StarCraft2.__init__, timeout=20.0)
    )
    sizes = dict(num_envs=2, batch_size=4, buffer_size=20, total_timesteps=600, eval_interval=400, eval_episodes=2)
    args = script.Args(map="zerg_5_vs_5", backend="starcraft2", run_dir=str(tmp_path / "run"), **sizes)
    summary = script.train(args, stop)
    assert (summary["backend"], summary["simulator_version"], summary["env_steps"]) == ("starcraft2", None, 600)
    assert summary["updates"] > 0
    assert len(stored) == summary["episodes"]
    for episode in stored:
        length = len(episode["reward"])
        assert episode["terminated"].tolist() == [False] * (length - 1) + [True]
        played = episode["state"][:, -5 * 11 :].reshape(length + 1, 5, 11)  # the last actions, zeros at the start
        assert not played[0].any()
        alive = ~episode["mask"][:-1, :, 0]  # a dead agent's last action is shown as 0, as the one it takes
        assert (played[1:].argmax(-1) == episode["action"])[alive].all()
        assert np.take_along_axis(episode["mask"][:-1], episode["action"][..., None], axis=-1).all()
        assert alive[0].all()
    started = 4 + (fault != "none")
    assert len(games.started()) == started
    assert wait_until(lambda: not games.running())
    resumed = script.train(common.resumed_args(script, tmp_path / "run", total_timesteps=700))
    assert resumed["env_steps"] == 700
    assert len(games.started()) == started + 4


# ---------------------------------------------------------------------------------------------------------------------
# The package and the simulator, on the same units
# ---------------------------------------------------------------------------------------------------------------------


def order_of_agents(random_after: np.ndarray, N: int) -> list[int]:
    """The order in which the simulator's agents looked around, from its generator's state afterwards."""
    battle = np.zeros(1, BATTLE)
    with np.errstate(over="ignore"):
        battle["random"] = random_after - np.uint64(N - 1) * GOLDEN
    order = list(range(N))
    for k in range(N - 1, 0, -1):
        pick = int(uniform(battle[0]) * (k + 1))
        order[k], order[pick] = order[pick], order[k]
    return order


@pytest.fixture
def server(games):
    """The stand-in within this process, to which pysc2 connects instead of launching a game."""
    import smacv2.env  # noqa: F401 - defines the flag
    from absl import flags

    server = fake_sc2.serve(0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags.FLAGS.sc2_port = server.socket.getsockname()[1]
    yield server
    flags.FLAGS.sc2_port = None  # monkeypatch would delete it
    server.shutdown()


@needs_smacv2
@pytest.mark.parametrize("wipe", [False, True], ids=["clean", "wipe"])
@pytest.mark.parametrize("map_name", [f"{race}_{size}" for race in RACES for size in ("5_vs_5", "10_vs_11")])
def test_simulator_computes_what_the_package_computes(server, monkeypatch, map_name, wipe):
    """Before every step the simulator is given the stand-in's units; then both take the step with the same actions."""
    from smacv2.env import StarCraftCapabilityEnvWrapper

    race, N, M = parse_map_name(map_name)
    wrapper = StarCraftCapabilityEnvWrapper(**starcraft2.sc2_config(map_name), seed=1)
    package = wrapper.env
    for k, distribution in enumerate(wrapper.env_key_to_distribution_map.values()):
        starcraft2.seed_generators(distribution, np.random.SeedSequence(k))
    random.seed(3)
    rng = np.random.default_rng(4)
    sim = SMACv2Sim(map_name, 1, enemy_wipe=wipe)
    world = sim._world

    def look():
        """The package's obs, state and mask; with the wipe, its agents look around in the simulator's order."""
        if wipe:
            # Even a corpse can be seen first. The package leaves it where it was last seen alive, half a second before.
            for j, corpse in package.enemies.items():
                if corpse.health == 0:
                    corpse.pos.x, corpse.pos.y = field.units[N + j]["x"], field.units[N + j]["y"]
            order = order_of_agents(world.battles["random"], N)
            with monkeypatch.context() as patch:
                patch.setattr("random.shuffle", lambda agents: agents.__setitem__(slice(None), order))
                obs = package.get_obs()
        else:
            package.obs_enemies[:] = 1  # hides nothing, so nothing is wiped
            obs = package.get_obs()
        return np.stack(obs), package.get_state(), np.array(package.get_avail_actions(), bool)

    compared = battles = rewarded = wiped = 0
    while compared < 400 or battles < 4:
        wrapper.reset()
        package.max_reward = expected_max_reward(race, N, M)
        field, length, terminated, actions = server.game.field, 0, False, None
        if wipe:  # forget that reset() has looked around
            package.obs_enemies[:], package.enemy_tags = 0, [None] * M
            names = ("x", "y", "health", "shield", "cooldown", "energy")
            units = [(WOL_UNITS[unit["type"]].name, *(unit[name] for name in names)) for unit in field.units]
            sim.load_battle(0, units[:N], units[N:])
        while not terminated:
            obs, state, mask = look()
            world.units[0] = field.units
            for name in ("random", "clock", "phase"):
                world.battles[name] = field.battle[name]
            world.battles["step"] = length
            world.last_actions[0] = -1 if actions is None else actions
            for ours, theirs in zip(sim.observe(0), (obs, state, mask), strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=0)
            wiped += world.first_row.any()

            actions = random_actions(mask, rng)
            attack = mask[:, 6:].any(1) & (rng.random(N) < 0.7)  # or else hardly anybody dies
            actions[attack] = 6 + mask[attack, 6:].argmax(1)
            _, sim_reward, ended, _, info = sim.step(actions[None])
            reward, terminated, outcome = package.step(actions)
            length += 1
            compared += 1
            rewarded += reward > 0
            assert terminated == ended[0]
            assert reward == pytest.approx(sim_reward[0], abs=2e-6)
            for name in ("battle_won", "dead_allies", "dead_enemies"):
                assert outcome[name] == info[name][0]
            if terminated and not wipe:  # the simulator's generator has gone on to its next battle
                final = info["final_obs"], info["final_info"]["state"], info["final_info"]["action_mask"]
                for ours, theirs in zip(final, look(), strict=True):
                    np.testing.assert_allclose(ours[0], theirs, atol=2e-6, rtol=0)
        battles += 1
    wrapper.close()
    assert rewarded > 20
    assert (wiped > 100) == wipe


@needs_smacv2
@pytest.mark.parametrize("map_name", ["protoss_5_vs_5", "terran_10_vs_11"])
def test_enemy_wipe_can_be_undone(make_env, map_name):
    """With the fix, the observations are those that the simulator without wipe makes of the units in the state."""
    race, N, M = parse_map_name(map_name)
    fixed = make_env(map_name, 1, seed=2, fix_enemy_wipe=True)
    wiped = make_env(map_name, 1, seed=2)
    sim = SMACv2Sim(map_name, 1)
    bodies = {unit.name: unit for unit in WOL_UNITS}
    has_shield = race == "protoss"

    def units(state):
        """What load_battle takes."""
        for k in range(N + M):
            ally = k < N
            width = 7 + has_shield if ally else 6 + has_shield
            row = state[k * width :][:width] if ally else state[N * (7 + has_shield) + (k - N) * width :][:width]
            position = row[2:4] if ally else row[1:3]
            name = RACES[race].types[int(row[-3:].argmax())]
            body = bodies[name]
            energy_or_cooldown = row[1] * body.cooldown_divisor if ally else 0.0
            energy, cooldown = (energy_or_cooldown, 0.0) if name == "medivac" else (0.0, energy_or_cooldown)
            shield = row[-4] * body.shield if has_shield else 0.0
            yield name, *(position * 32.0 + 16.0), row[0] * body.health, shield, cooldown, energy

    for env in (fixed, wiped):
        rows = shown = 0
        _, info = env.reset()
        rng = np.random.default_rng(0)
        for _ in range(150):
            obs, _, _, _, info = env.step(random_actions(info["action_mask"], rng))
            everybody = list(units(info["state"][0].astype(float)))
            sim.load_battle(0, everybody[:N], everybody[N:])
            clean, _, _ = sim.observe(0)
            width = 8 + has_shield
            mine, theirs = (o[:, 4 : 4 + M * width].reshape(N, M, width)[..., 1] > 0 for o in (clean, obs[0]))
            rows, shown = rows + mine.sum(), shown + (mine & theirs).sum()
            if env is fixed:
                np.testing.assert_allclose(obs[0], clean, atol=1e-5)
        assert rows > 50
        assert shown == rows if env is fixed else shown < 0.95 * rows
