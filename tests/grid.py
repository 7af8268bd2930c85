"""A small game that tempts: on a 5 x 5 grid two agents are paid 1, once, when both stand on the goal, and it is over.

    python softqmix_mpe.py --env tests.grid:make --env-options time_limit end

docs/when_it_does_not_learn.md tells what happens to the entropy of staying alive.
"""

import numpy as np
from gymnasium.spaces import Box, Discrete
from pettingzoo import ParallelEnv

MOVES = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))  # stay, north, south, east, west


class Grid(ParallelEnv):
    """Agents see where they, the other one and the goal are; both begin anywhere but on the goal."""

    def __init__(self, size, max_cycles, time_limit, show_time, reward):
        self.metadata, self.possible_agents = {"name": "grid"}, ["a", "b"]
        self.size, self.max_cycles, self.reward = size, max_cycles, reward
        self.time_limit, self.show_time = time_limit, show_time
        self.random = np.random.default_rng()
        self.observations = {agent: Box(0, 1, (7 if show_time else 6,)) for agent in self.possible_agents}
        self.actions = {agent: Discrete(len(MOVES)) for agent in self.possible_agents}

    def observation_space(self, agent):
        return self.observations[agent]

    def action_space(self, agent):
        return self.actions[agent]

    def look(self):
        time = [self.t / self.max_cycles] if self.show_time else []
        (a, b), goal, far = self.places, self.goal, self.size - 1
        seen = {"a": (*a, *b, *goal), "b": (*b, *a, *goal)}
        return {agent: np.array([*(x / far for x in cells), *time], np.float32) for agent, cells in seen.items()}

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self.agents, self.t = list(self.possible_agents), 0
        cells = self.random.integers(self.size**2, size=3)
        while cells[0] in cells[1:]:
            cells[1:] = self.random.integers(self.size**2, size=2)
        self.goal, *self.places = (divmod(int(cell), self.size) for cell in cells)
        return self.look(), {agent: {} for agent in self.agents}

    def step(self, actions):
        self.t += 1
        for i, agent in enumerate(self.agents):
            cell = [x + move for x, move in zip(self.places[i], MOVES[actions[agent]], strict=True)]
            self.places[i] = tuple(min(max(x, 0), self.size - 1) for x in cell)
        won, agents = all(place == self.goal for place in self.places), self.agents
        late = self.t == self.max_cycles and not won
        over, cut_off = won or (late and self.time_limit == "end"), late and self.time_limit == "cut"
        self.agents = [] if over or cut_off else agents
        rewards = dict.fromkeys(agents, won * self.reward / len(agents))  # the team's is the sum
        ends = dict.fromkeys(agents, over), dict.fromkeys(agents, cut_off)
        return self.look(), rewards, *ends, {agent: {} for agent in agents}


def make(size=5, max_cycles=25, time_limit="cut", show_time=False, reward=1.0):
    """Args: time_limit, "cut" (the last value is bootstrapped) or "end" (nothing follows); show_time: seen, too."""
    return Grid(size, max_cycles, time_limit, show_time, reward)
