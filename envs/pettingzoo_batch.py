"""Any cooperative PettingZoo environment as one batch, behind the interface that envs/__init__.py states.

    from envs.pettingzoo_batch import PettingZooBatch
    env = PettingZooBatch("mpe2.simple_reference_v3", num_envs=8, seed=1, max_cycles=25)
    env = PettingZooBatch("my_module:make_my_env", num_envs=8, workers=4)
    env = PettingZooBatch(lambda: MyParallelEnv(), num_envs=8, team_reward="mean")

It must be a ParallelEnv with discrete actions and the same `possible_agents` in every episode. Observations of any
space are flattened (gymnasium.spaces.flatten), and what is smaller than the largest agent's is padded: observations
with zeros, actions with unavailable ones. Masks are taken from observations {"observation", "action_mask"} or from the
agent's info["action_mask"]. An agent that has left sees zeros, and its only action is number 0, which is not played.
"""

import contextlib
import importlib
import importlib.metadata
import multiprocessing
import re
import traceback

import cloudpickle
import numpy as np
from gymnasium import spaces
from pettingzoo import ParallelEnv

DEFAULT_LIMIT = 1000  # steps of an episode whose environment does not say how many it has


def check_choice(name, value, allowed):
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(allowed)}.")


def check_integer(name, value, low, high):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}, expected an integer from {low} to {high}.")
    return int(value)


def find_factory(make):
    """The function that makes the environment, from itself or from "module" (its parallel_env) or "module:name"."""
    if callable(make):
        return make
    if not isinstance(make, str) or not re.fullmatch(r"[\w.]+(:\w+)?", make):
        raise ValueError(f"The environment is {make!r}, expected a function, or a text like 'module' or 'module:name'.")
    module, _, name = make.partition(":")
    try:
        factory = getattr(importlib.import_module(module), name or "parallel_env", None)
    except ImportError as error:
        raise ValueError(f"The environment {make} cannot be imported: {error}.") from None
    if not callable(factory):
        raise ValueError(f"The module {module} has no function {name or 'parallel_env'}.")
    return factory


class Game:
    """One of the environments, its views padded: (obs (N, O) float32, state (S,) float32, mask (N, A) bool)."""

    def __init__(self, factory, options, settings):
        self.env = factory(**options)
        self.team_reward, self.own_state, self.limit = settings
        if not isinstance(self.env, ParallelEnv):
            raise ValueError(f"The environment is a {type(self.env).__name__}, expected a PettingZoo ParallelEnv.")
        self.agents = list(self.env.possible_agents)
        if not self.agents:
            raise ValueError("The environment has no possible_agents.")
        self.observation_spaces = [self.env.observation_space(agent) for agent in self.agents]
        self.action_spaces = [self.env.action_space(agent) for agent in self.agents]
        for agent, space in zip(self.agents, self.action_spaces, strict=True):
            if not isinstance(space, spaces.Discrete):
                raise ValueError(f"{agent}'s actions are {space}, but only Discrete ones can be learnt here.")
        self.observation_spaces = [
            space["observation"] if isinstance(space, spaces.Dict) and "observation" in space.spaces else space
            for space in self.observation_spaces
        ]
        try:
            self.obs_sizes = [spaces.flatdim(space) for space in self.observation_spaces]
        except (NotImplementedError, ValueError):
            raise ValueError(f"Observations of {self.observation_spaces[0]} have no fixed size.") from None
        self.shape = len(self.agents), max(self.obs_sizes)
        self.num_actions = max(int(space.n) for space in self.action_spaces)
        self.state_size = None

    def begin(self, seed=None):
        observations, infos = self.env.reset(seed=seed)
        self.steps, self.live = 0, [agent for agent in self.agents if agent in self.env.agents]
        return self.look(observations, infos)

    def look(self, observations, infos):
        obs, mask = np.zeros(self.shape, np.float32), np.zeros((self.shape[0], self.num_actions), bool)
        for i, agent in enumerate(self.agents):
            if agent in self.live and agent in observations:
                seen, given = observations[agent], infos.get(agent, {}).get("action_mask")
                if isinstance(seen, dict) and "observation" in seen:
                    seen, given = seen["observation"], seen.get("action_mask", given)
                obs[i, : self.obs_sizes[i]] = spaces.flatten(self.observation_spaces[i], seen)
                mask[i, : self.action_spaces[i].n] = True if given is None else np.asarray(given, bool)
            mask[i, 0] |= not mask[i].any()
        state = np.asarray(self.env.state(), np.float32).ravel() if self.own_state else obs.ravel().copy()
        if state.size != (self.state_size or state.size):
            raise ValueError(f"state() has {state.size} numbers here and {self.state_size} elsewhere: try state='obs'.")
        self.state_size = state.size
        return obs, state, mask

    def step(self, actions):
        """Returns: reward, terminated, truncated, the last view if the episode ended, or else None, and the present."""
        live = self.live
        chosen = {
            agent: int(action + space.start)
            for agent, action, space in zip(self.agents, actions, self.action_spaces, strict=True)
            if agent in live
        }
        observations, rewards, terminations, truncations, infos = self.env.step(chosen)
        self.steps += 1
        reward = sum(float(value) for value in rewards.values())
        left = [agent for agent in live if not (terminations.get(agent) or truncations.get(agent))]
        left = [agent for agent in left if agent in self.env.agents]
        truncated = any(truncations.get(agent) for agent in live) if not left else self.steps >= self.limit
        terminated, ended = not left and not truncated, not left or truncated
        self.live = live if ended else left  # what the last ones saw is still needed
        view = self.look(observations, infos)
        final = view if ended else None
        reward /= len(self.agents) if self.team_reward == "mean" else 1
        if not all(np.isfinite(numbers).all() for numbers in (reward, *view[:2])):
            raise FloatingPointError(f"The environment's step {self.steps} gives rewards or views that are not finite.")
        return reward, terminated, truncated, final, self.begin() if ended else view


def serve(pipe, pickled):
    """A worker process: some of the environments, until the other end is closed."""
    try:
        factory, count, *rest = cloudpickle.loads(pickled)
        games = [Game(factory, *rest) for _ in range(count)]
        while True:
            command, arguments = pipe.recv()
            pipe.send([getattr(game, command)(argument) for game, argument in zip(games, arguments, strict=True)])
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")


class PettingZooBatch:
    """`num_envs` copies of a PettingZoo environment, see the module.

    An episode ends when no agent is left: it is truncated if one of the last was, or after episode_limit steps, and
    terminated otherwise. A checkpoint holds no episode: after set_state the next step begins others and calls all rows
    invalid.

    Args:
        make: a function that makes the environment, or "module" (its parallel_env) or "module:name".
        num_envs, seed: as everywhere; the first episode of environment i depends on (seed, i).
        team_reward: "sum" or "mean" over all possible agents.
        state: "env", the environment's state(), "obs", all observations in a row, or "auto", the former if it has one.
        episode_limit: steps after which an episode is cut off; by default the environment's max_cycles, or 1000.
        workers: processes that share the environments, which pays if a step takes longer than a millisecond; 0: none.
            Programs that use them must be guarded by `if __name__ == "__main__"`.
        options: keyword arguments for `make`.

    Errors: ValueError, one sentence, for what is impossible; RuntimeError if an environment in a worker fails.
    """

    backend, restarts = "pettingzoo", 0

    def __init__(
        self, make, /, num_envs, seed=0, *, team_reward="sum", state="auto", episode_limit=None, workers=0, **options
    ):
        factory = find_factory(make)
        self.num_envs = check_integer("num_envs", num_envs, 1, 2**31)
        self.seed = check_integer("seed", seed, 0, 2**63 - 1)
        check_choice("team_reward", team_reward, ("sum", "mean"))
        check_choice("state", state, ("auto", "env", "obs"))
        workers = min(check_integer("workers", workers, 0, 1024), num_envs)
        try:
            first = Game(factory, options, (team_reward, False, 1))
        except TypeError as error:
            raise ValueError(f"The environment cannot be made with the options {options}: {error}.") from None
        first.begin(0)
        has_state = state != "obs"
        try:
            first.env.state()
        except (NotImplementedError, AttributeError):
            if state == "env":
                raise ValueError("The environment has no state(): leave the option state out.") from None
            has_state = False
        cycles = getattr(first.env.unwrapped, "max_cycles", None)
        cycles = cycles if isinstance(cycles, int) and cycles > 0 else DEFAULT_LIMIT
        self.episode_limit = check_integer("episode_limit", episode_limit or cycles, 1, 2**31)
        settings = first.team_reward, first.own_state, first.limit = team_reward, has_state, self.episode_limit
        first.state_size = None
        self.state_size = len(first.begin(0)[1])
        (self.num_agents, self.obs_size), self.num_actions = first.shape, first.num_actions

        known = getattr(first.env, "metadata", {}).get("name") or getattr(make, "__name__", "environment")
        self.name = re.sub(r"\W+", "_", make.rpartition(".")[2] if isinstance(make, str) else str(known))
        package = type(first.env.unwrapped).__module__.partition(".")[0]
        self.about = {"backend": self.backend, "environment": make if isinstance(make, str) else self.name}
        self.about |= {name: version for name in ("pettingzoo", package) if (version := find_version(name))}
        self.about |= {"options": repr(options), "team_reward": team_reward, "own_state": has_state}
        self.title = f"PettingZoo: {self.name}, {self.num_agents} agents, {self.num_actions} actions"

        self._starts, self._lost = np.zeros(num_envs, np.int64), False
        self._games, self._pipes, self._processes = [], [], []
        if workers:
            first.env.close()
            context = multiprocessing.get_context("spawn")  # not fork: the trainer has threads and a GPU
            self._shares = np.diff([num_envs * k // workers for k in range(workers + 1)]).tolist()
            for count in self._shares:
                here, there = context.Pipe()
                pickled = cloudpickle.dumps((factory, count, options, settings))
                process = context.Process(target=serve, args=(there, pickled), daemon=True)
                process.start()
                there.close()
                self._pipes.append(here)
                self._processes.append(process)
        else:
            self._games = [first, *(Game(factory, options, settings) for _ in range(num_envs - 1))]
        self._mask = None

    def _call(self, command, arguments):
        """Call a method of every game with its own argument. Returns: list of E results."""
        if self._games:
            return [getattr(game, command)(argument) for game, argument in zip(self._games, arguments, strict=True)]
        rest = list(arguments)
        for pipe, count in zip(self._pipes, self._shares, strict=True):
            with contextlib.suppress(OSError):  # a dead worker's last words are read below
                pipe.send((command, rest[:count]))
            rest = rest[count:]
        results = []
        for pipe in self._pipes:
            try:
                result = pipe.recv()
            except (EOFError, OSError):
                result = "its process died"
            if isinstance(result, str):
                self.close()
                raise RuntimeError(f"An environment in a worker process failed: {result}")
            results += result
        return results

    def _begin(self, seeded):
        seeds = [None] * self.num_envs
        if seeded:  # other episodes in every environment, and after every checkpoint
            keys = ([self.seed, e, int(start)] for e, start in enumerate(self._starts))
            seeds = [int(np.random.SeedSequence(key).generate_state(1)[0] >> 1) for key in keys]
            self._starts += 1
        self._lost = False
        return self._stack(self._call("begin", seeds))

    def _stack(self, views):
        obs, state, mask = (np.stack(field) for field in zip(*views, strict=True))
        self._mask = mask.copy()  # what the caller does with its own changes nothing here
        return obs, {"state": state, "action_mask": mask}

    def reset(self, seed=None):
        """A new episode everywhere; a seed makes it the first of that seed's. Returns: obs (E, N, O), info."""
        if seed is not None:
            self.seed = check_integer("seed", seed, 0, 2**63 - 1)
            self._starts[:] = 0
        return self._begin(seeded=seed is not None or self._mask is None)

    def step(self, actions):
        """Actions (E, N) -> obs (E, N, O), reward (E,), terminated (E,), truncated (E,), info: envs/__init__.py."""
        E, N = self.num_envs, self.num_agents
        actions = np.asarray(actions)
        if actions.shape != (E, N) or actions.dtype.kind not in "iu":
            raise ValueError(f"actions are {actions.dtype} {actions.shape}, expected integers {(E, N)}.")
        if self._lost or self._mask is None:
            obs, info = self._begin(seeded=True)
            info["invalid"] = np.ones(E, bool)
            return obs, np.zeros(E, np.float32), np.zeros(E, bool), np.zeros(E, bool), info
        known = (actions >= 0) & (actions < self.num_actions)
        wrong = ~np.take_along_axis(self._mask, np.where(known, actions, 0)[..., None], 2)[..., 0] | ~known
        if wrong.any():
            e, agent = np.argwhere(wrong)[0]
            raise ValueError(f"environment {e}, agent {agent}: action {actions[e, agent]} is not available.")
        rewards, terminated, truncated, finals, views = zip(*self._call("step", actions), strict=True)
        obs, info = self._stack(views)
        terminated, truncated = np.array(terminated, bool), np.array(truncated, bool)
        ended = terminated | truncated
        if ended.any():
            nothing = tuple(np.zeros_like(field) for field in views[0])
            final = [np.stack(field) for field in zip(*(view or nothing for view in finals), strict=True)]
            info |= {"final_obs": final[0], "final_info": {"state": final[1], "action_mask": final[2]}}
            info |= {"_final_obs": ended, "_final_info": ended.copy()}
        return obs, np.array(rewards, np.float32), terminated, truncated, info

    def get_state(self):
        return {"starts": self._starts.copy()}

    def set_state(self, saved):
        self._starts[:], self._lost = np.asarray(saved["starts"]), True

    def close(self):
        for game in self._games:
            game.env.close()
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.join(5)
            process.kill()
        self._pipes, self._processes = [], []


def find_version(package):
    try:
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
