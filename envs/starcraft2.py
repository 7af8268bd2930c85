"""StarCraft II through the smacv2 package: what it needs, worker processes with a game each, and one first battle.

The interface is that of envs/__init__.py; the package's faults and what is done about each: docs/starcraft2.md.
"""

import contextlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from envs.smacv2_sim import (
    RACES,
    check_actions,
    check_choice,
    check_flag,
    check_integer,
    expected_max_reward,
    parse_map_name,
    refuse_unknown,
)  # fmt: skip

SC2_MAP = "Maps/SMAC_Maps/32x32_flat.SC2Map"  # the one map file of all SMACv2 scenarios, inside the game's folder


def check_starcraft2(map_name: str) -> dict[str, str]:
    """Return the game's path and the packages' versions; raise ValueError, saying in one sentence what is missing.

    Looks without importing anything: smacv2 is slow to import, and parses the command line while it is at it.
    """
    parse_map_name(map_name)
    packages = ("smacv2", "pysc2", "s2clientprotocol")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    folder = Path(os.environ.get("SC2PATH", "~/StarCraftII")).expanduser()
    games = sorted(game for game in folder.glob("Versions/Base*/SC2_x64") if os.access(game, os.X_OK))
    for wrong, sentence in (
        (sys.platform != "linux", "The game runs without a screen on Linux only (on Windows: in WSL 2)"),
        (missing, f"Python packages are missing: {', '.join(missing)}: install as docs/starcraft2.md says"),
        (not folder.is_dir(), f"No StarCraft II in {folder}: unpack the Linux package 4.10 there, or set SC2PATH"),
        (not games, f"No executable Versions/Base*/SC2_x64 in {folder}: unpack the Linux package 4.10 again"),
        (not (folder / SC2_MAP).is_file(), f"No map {folder / SC2_MAP}: copy the smacv2 repository's SMAC_Maps there"),
    ):
        if wrong:
            raise ValueError(f"{sentence}, see docs/starcraft2.md.")
    found = {"game": str(games[-1])}
    for name in (*packages, "protobuf"):
        found[name] = "not installed by pip"  # such as a source folder on PYTHONPATH
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def is_installed(map_name: str) -> bool:
    """Whether check_starcraft2 finds everything; ValueError for an impossible map all the same."""
    parse_map_name(map_name)
    try:
        return bool(check_starcraft2(map_name))
    except ValueError:
        return False


def check_number(name: str, value, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}, expected a number from {low:g} to {high:g}.")
    return float(value)


def sc2_config(map_name: str, **options) -> dict:
    """The standard SMACv2 configuration of a map; what is not listed has the package's default."""
    race, num_agents, num_enemies = parse_map_name(map_name)
    types, weights, exception = RACES[race]
    team = {"dist_type": "weighted_teams", "unit_types": list(types), "weights": list(weights), "observe": True}
    capabilities = {
        "n_units": num_agents,
        "n_enemies": num_enemies,
        "team_gen": team | {"exception_unit_types": [exception]},
        "start_positions": {"dist_type": "surrounded_and_reflect", "p": 0.5, "map_x": 32, "map_y": 32},
    }
    standard = {"obs_own_pos": True, "use_unit_ranges": True, "min_attack_range": 2, "capability_config": capabilities}
    return {"map_name": f"10gen_{race}", **standard, **options}


def seed_generators(thing, seeds: np.random.SeedSequence) -> None:
    """Seed the generators of teams and start positions, which lie nested in one another; the package never does."""
    for name, value in vars(thing).items():
        if isinstance(value, np.random.Generator):
            setattr(thing, name, np.random.default_rng(seeds.spawn(1)[0]))
        elif hasattr(value, "generate"):
            seed_generators(value, seeds)


def sc2_worker(pipe, config: dict, seed: list[int], max_reward: float | None, fix_wipe: bool, timeout: float, tmp: str):
    """One process with one game. Sends a reply to every command; after any error a sentence instead, and ends."""

    def kill_group(*_):
        os.kill(0, signal.SIGKILL)  # 0: everybody in the caller's process group

    os.setsid()  # a process group of its own, for worker and game: killing it leaves nothing behind
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which then closes the pipe
    signal.signal(signal.SIGTERM, kill_group)
    trainer = multiprocessing.parent_process()
    threading.Thread(target=lambda: kill_group(trainer.join()), daemon=True).start()  # the trainer may be killed, too
    tempfile.tempdir = tmp  # the trainer removes this folder, with what a killed game leaves in it
    for stream in (1, 2):  # the game is talkative
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    wrapper = None
    try:
        import portpicker
        from absl import flags
        from smacv2.env import StarCraftCapabilityEnvWrapper

        pick, reserved = portpicker.pick_unused_port, []

        def pick_port() -> int:
            """Reserve the game's TCP port until it listens by holding the UDP port: pickers want both to be free."""
            while True:
                reserved[:] = [socket.socket(type=socket.SOCK_DGRAM)]
                with contextlib.suppress(OSError):
                    reserved[0].bind(("", port := pick()))
                    return port

        def game_lost():
            raise ConnectionError("the game crashed or did not answer")

        def seed_all(seed: list[int]) -> None:
            seeds = np.random.SeedSequence(seed)
            random.seed(int(seeds.generate_state(1)[0]))  # shuffles the teams, and the agents when they look around
            np.random.seed(seeds.generate_state(2)[1])  # noqa: NPY002
            for distribution in wrapper.env_key_to_distribution_map.values():
                seed_generators(distribution, seeds)

        def look(obs: list[np.ndarray]) -> tuple:
            """obs is the result of this step's only get_obs(): a call also records which agent saw which enemy."""
            obs = np.stack(obs)  # (N, O)
            if fix_wipe:  # an enemy that is hidden wipes rows: hide none, look again, then hide row by row
                seen = env.obs_enemies.copy()  # (enemies, N)
                env.obs_enemies[:] = 1
                obs = np.stack(env.get_obs())
                env.obs_enemies[:] = seen
                rows, width = env.get_obs_enemy_feats_size()
                obs[:, 4 : 4 + rows * width] *= seen.T.repeat(width, axis=1)
            return obs, env.get_state(), np.array(env.get_avail_actions(), bool)

        def begin() -> tuple:
            teams_and_positions = {}
            for distribution in wrapper.env_key_to_distribution_map.values():
                teams_and_positions |= distribution.generate()
            obs, _ = env.reset(teams_and_positions)  # wrapper.reset() would return None where units do not spawn
            if any(unit.health <= 0 for unit in env.agents.values()):
                raise RuntimeError("a battle began with dead agents")
            env._episode_count = max(1, env._episode_count)  # at 0 another reset would launch another game
            if max_reward is not None:
                env.max_reward = max_reward  # or else the enemies of this process's first battle have set it
            return look(obs)

        flags.FLAGS.sc2_timeout = int(timeout / 2)  # the game's, before the trainer's patience with this process ends
        portpicker.pick_unused_port = pick_port
        game_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        wrapper = StarCraftCapabilityEnvWrapper(**config, seed=game_seed)
        env = wrapper.env
        env.full_restart = game_lost  # the package would go on with an empty battle
        seed_all(seed)
        while True:
            command, argument = pipe.recv()
            reward, terminated, final, outcome = 0.0, False, None, (False, 0, 0)
            if command == "reset":
                if argument is not None:
                    seed_all(argument)
                battle = begin()
            elif command == "step":
                reward, terminated, info = env.step(argument)
                outcome = info["battle_won"], info["dead_allies"], info["dead_enemies"]
                battle = look(env.get_obs())
                if terminated:
                    final = (*battle, *outcome)
                    battle = begin()
            else:  # "save_replay"
                final = env._run_config.save_replay(env._controller.save_replay(), *argument)
            pipe.send((reward, terminated, final, (*battle, *outcome)))
    except EOFError:  # the trainer has closed the pipe
        pass
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send(f"{type(error).__name__}: {error}")
    finally:
        if wrapper is not None:
            wrapper.close()


class StarCraft2:
    """E battles of StarCraft II, each a game with a worker process of its own.

    Nothing is started before the first reset, or the first step after set_state. Options: reward_scale as SMACv2Sim's;
    fix_enemy_wipe undoes the package's erasing of enemy rows (its issue 50); prob_obs_enemy 0 with action_mask False is
    SMACv2's extended partial observability; replay_folder is where the games' replays of seeded battles, such as tests,
    are kept; timeout, in seconds, is the patience with a worker.

    Whatever goes wrong - a game crashes, hangs, spawns no units, a worker dies - has one cure: the worker's process
    group is killed and a new worker begins a new battle. info["invalid"] marks the environment: what was collected of
    its lost battle must be thrown away, and the observation is the first of the new one.
    """

    backend, title, episode_limit = "starcraft2", "StarCraft II through the smacv2 package.", 200
    max_failures = 5  # of one worker in a row, without a battle finished between them

    def __init__(
        self,
        map_name: str,
        num_envs: int,
        seed: int = 0,
        *,
        reward_scale: str = "expected",
        fix_enemy_wipe: bool = False,
        prob_obs_enemy: float = 1.0,
        action_mask: bool = True,
        replay_folder: str = "",
        timeout: float = 180.0,
        **unknown,
    ):
        refuse_unknown("StarCraft II", unknown, StarCraft2)
        race, N, enemies = parse_map_name(map_name)
        shield = race == "protoss"
        self.name = self.map_name = map_name
        self.num_envs, self.num_agents, self.num_enemies = check_integer("num_envs", num_envs, 1, 2**31), N, enemies
        self.num_actions = 6 + (max(N, enemies) if race == "terran" else enemies)  # a medivac's targets are allies
        self.obs_size = 4 + (enemies + N - 1) * (8 + shield) + 6 + shield
        self.state_size = N * (7 + shield) + enemies * (6 + shield) + N * self.num_actions
        self.seed, self.timeout = check_integer("seed", seed, 0, 2**63 - 1), check_number("timeout", timeout, 2, 1e6)
        expected = check_choice("reward_scale", reward_scale, ("expected", "first_episode")) == "expected"
        self._max_reward = expected_max_reward(race, N, enemies) if expected else None
        self._fix_wipe = check_flag("fix_enemy_wipe", fix_enemy_wipe)
        visible = check_number("prob_obs_enemy", prob_obs_enemy, 0, 1)
        self._config = sc2_config(map_name, prob_obs_enemy=visible, action_mask=check_flag("action_mask", action_mask))
        self.about = {"backend": self.backend, "simulator_version": None, **check_starcraft2(map_name)}
        if not isinstance(replay_folder, str):
            raise ValueError(f"replay_folder is {replay_folder!r}, expected a path.")
        self._replay_folder, self._seeded_resets = replay_folder, 0
        self.restarts = 0  # workers replaced
        self._lost = True  # all battles: none has begun, or set_state has ended them
        self._workers, self._pipes, self._folders = ([None] * num_envs for _ in range(3))
        self._starts, self._failures = np.zeros(num_envs, int), np.zeros(num_envs, int)

    def _next_seed(self, e: int) -> list[int]:
        """Other teams and positions in every environment, and after every restart."""
        self._starts[e] += 1
        return [self.seed, e, int(self._starts[e]) - 1]

    def _start(self, e: int) -> None:
        context = multiprocessing.get_context("spawn")  # not fork: the trainer has threads and a GPU
        self._pipes[e], pipe = context.Pipe()
        self._folders[e] = tempfile.TemporaryDirectory(prefix="sc2-", ignore_cleanup_errors=True)
        options = (self._next_seed(e), self._max_reward, self._fix_wipe, self.timeout, self._folders[e].name)
        worker = context.Process(target=sc2_worker, args=(pipe, self._config, *options), daemon=True)
        worker.start()
        pipe.close()  # the worker's end is then its alone: if it dies, this side reads the end of file
        self._workers[e] = worker

    def _kill(self, e: int) -> None:
        worker, self._workers[e] = self._workers[e], None
        with contextlib.suppress(ProcessLookupError):  # there is no group before the worker's first line
            os.killpg(worker.pid, signal.SIGKILL)
        worker.kill()
        worker.join()
        self._pipes[e].close()
        self._folders[e].cleanup()

    def _send(self, e: int, command: str, argument=None) -> None:
        with contextlib.suppress(OSError):  # a dead worker is noticed when it does not answer
            self._pipes[e].send((command, argument))

    def _receive(self, e: int, deadline: float) -> tuple | str:
        """A worker's reply, or why there is none."""
        try:
            if self._pipes[e].poll(max(0.0, deadline - time.monotonic())):
                return self._pipes[e].recv()
            return f"no answer within {self.timeout:.0f} s"
        except (EOFError, OSError):
            return "the worker process died"

    def _replace(self, e: int, reason: str) -> None:
        self._kill(e)
        self.restarts += 1
        self._failures[e] += 1
        if self._failures[e] >= self.max_failures:
            self._replay_folder = ""
            self.close()
            raise ConnectionError(f"StarCraft II failed {self._failures[e]} times in a row, the last time: {reason}")
        time.sleep(2.0 ** (self._failures[e] - 1) - 1)
        self._start(e)
        self._send(e, "reset")

    def _collect(self):
        """All workers' replies as one batch; where a battle was lost, the beginning of another one."""
        replies, invalid = [None] * self.num_envs, np.zeros(self.num_envs, bool)
        while missing := [e for e, reply in enumerate(replies) if reply is None]:
            deadline = time.monotonic() + self.timeout
            for e in missing:
                reply = self._receive(e, deadline)
                if isinstance(reply, str):
                    invalid[e] = True
                    self._replace(e, reply)
                else:
                    replies[e] = reply
        reward, terminated, finals, battles = zip(*replies, strict=True)
        terminated = np.array(terminated)
        self._failures[terminated] = 0
        obs, info = self._stack(battles)
        self._mask = info["action_mask"].copy()  # what the caller does with its own changes nothing here
        info["invalid"] = invalid
        if terminated.any():
            zeros = [np.zeros_like(field) for field in battles[0]]
            final_obs, final_info = self._stack([zeros if final is None else final for final in finals])
            info |= {"final_obs": final_obs, "_final_obs": terminated}
            info |= {"final_info": final_info, "_final_info": terminated}
        return obs, np.array(reward, np.float32), terminated, np.zeros_like(terminated), info, finals

    @staticmethod
    def _stack(battles) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        obs, *fields = (np.array(field) for field in zip(*battles, strict=True))  # (E, N, O); (E, S), (E, N, A), (E,)
        return obs, dict(
            zip(("state", "action_mask", "battle_won", "dead_allies", "dead_enemies"), fields, strict=True)
        )

    def _begin(self, seeded: bool):
        """New battles everywhere, of new seeds or going on with the workers' generators."""
        self._lost = False
        for e in range(self.num_envs):
            new = self._workers[e] is None
            if new:
                self._start(e)
            self._send(e, "reset", self._next_seed(e) if seeded and not new else None)
        return self._collect()

    def reset(self, seed: int | None = None):
        """A seed fixes the battles' teams and positions, but not the game's own dice, cast when it was launched."""
        if seed is not None:
            self._keep_replays()
            self._seeded_resets += 1
            self.seed, self._starts[:] = check_integer("seed", seed, 0, 2**63 - 1), 0
        obs, *_, info, _ = self._begin(seeded=seed is not None)
        return obs, info

    def step(self, actions: np.ndarray):
        """actions (E, N) -> obs (E, N, O), reward (E,), terminated (E,), truncated (E,), info. Autoreset: SAME_STEP."""
        if self._lost:
            *batch, info, _ = self._begin(seeded=True)
            info["invalid"][:] = True
            return *batch, info
        actions = check_actions(actions, self._mask.shape[:2])
        if not ((actions >= 0) & (actions < self.num_actions)).all():
            raise ValueError(f"the actions are not all from 0 to {self.num_actions - 1}")
        if not np.take_along_axis(self._mask, actions[..., None], axis=-1).all():
            raise ValueError("an agent got an action that its mask forbids")  # the game would be lost over it
        for e, action in enumerate(actions.tolist()):
            self._send(e, "step", action)
        return self._collect()[:-1]

    def get_state(self) -> dict[str, np.ndarray]:
        """For a checkpoint: a battle cannot be saved, only which seeds have been used."""
        return {"starts": self._starts.copy()}

    def set_state(self, saved: dict) -> None:
        """Go on from a checkpoint: its battles are lost, so the next step begins others and calls all rows invalid."""
        self._starts[:], self._lost = np.asarray(saved["starts"]), True

    def save_replay(self, folder: str | Path, prefix: str) -> list[str]:
        """Save a replay of each game, all its battles since it was launched, and return the files."""
        for e in range(self.num_envs):
            self._send(e, "save_replay", (str(Path(folder).resolve()), f"{prefix}_{e}"))
        return [str(file) for file in self._collect()[-1] if file]

    def _keep_replays(self) -> None:
        if self._replay_folder and self._seeded_resets and not self._lost:
            self.save_replay(self._replay_folder, f"{self.name}_{self._seeded_resets}")

    def close(self) -> None:
        """End all workers and games. Without it they end with the trainer, however that ends."""
        self._keep_replays()
        self._lost = True
        running = [e for e, worker in enumerate(self._workers) if worker is not None]
        for e in running:
            self._pipes[e].close()
        deadline = time.monotonic() + 5.0
        for e in running:
            self._workers[e].join(max(0.0, deadline - time.monotonic()))
            self._kill(e)


def check_env(map_name: str, **options) -> None:
    """Play one battle with random actions and print what was found; raise ValueError if something is missing."""
    env = StarCraft2(map_name, 1, **options)
    env.max_failures = 1
    for name, version in check_starcraft2(map_name).items():
        print(f"{name:18} {version}")
    start, steps, total, rng = time.perf_counter(), 0, 0.0, np.random.default_rng(0)
    try:
        _, info = env.reset()
        launched = time.perf_counter()
        terminated = [False]
        while not terminated[0]:
            actions = (rng.random(info["action_mask"].shape) * info["action_mask"]).argmax(-1)  # (1, N)
            _, reward, terminated, _, info = env.step(actions)
            steps, total = steps + 1, total + float(reward[0])
        ended = time.perf_counter()
    except ConnectionError as error:
        raise ValueError(str(error)) from None
    finally:
        env.close()
    print(f"{'agents, enemies':18} {env.num_agents}, {env.num_enemies}")
    print(f"{'obs, state, actions':18} {env.obs_size}, {env.state_size}, {env.num_actions}")
    print(
        f"one battle: launched in {launched - start:.1f} s, {steps} steps at {steps / (ended - launched):.0f} steps/s,"
    )
    print(f"return {total:.2f}, {'won' if info['battle_won'][0] else 'not won'}")
