"""SMACv2's rules as a PettingZoo parallel environment.

from envs.pettingzoo_smacv2 import parallel_env
env = parallel_env("terran_5_vs_5", render_mode="rgb_array")
observations, infos = env.reset(seed=1)
while env.agents:
    actions = {agent: env.action_space(agent).sample(observations[agent]["action_mask"]) for agent in env.agents}
    observations, rewards, terminations, truncations, infos = env.step(actions)
"""

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete
from pettingzoo import ParallelEnv
from pettingzoo.utils.conversions import parallel_to_aec

from .smacv2_sim import EPISODE_LIMIT, NO_OP, STOP, SMACv2Sim, is_decided


class SMACv2Parallel(ParallelEnv):
    """One battle of envs/smacv2_sim.py at a time, agents agent_0, agent_1, ...

    Observations are dicts of "observation" (O,) float32 and "action_mask" (A,) int8; `state()` is (S,) float32. Every
    agent gets the team's reward. An agent that falls stays in `agents` until the battle ends, with an empty observation
    and no-op as its only action: what its team still earns is its reward, too, and it did not end for the team. A
    battle that is won, lost or drawn terminates; one that is cut off after 200 steps, with fighters on both sides, is
    truncated (SMACv2 itself calls that a terminal). An action that the mask forbids is replaced by stop, or by no-op
    for the fallen, and "illegal_action" in the agent's info says so. Infos also have "battle_won", "dead_allies" and
    "dead_enemies".

    Args: map_name, such as "protoss_5_vs_5"; render_mode, None or "rgb_array"; options of the simulator, reward_scale,
    enemy_wipe and unit_table. Without a seed at the first reset, battles differ from run to run.

    Errors: ValueError, one sentence, for what is impossible.
    """

    def __init__(self, map_name="terran_5_vs_5", render_mode=None, **options):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode is {render_mode!r}, expected None or 'rgb_array'.")
        entropy = int(np.random.SeedSequence().generate_state(1)[0])
        self.sim = SMACv2Sim(map_name, 1, entropy, **options)
        self.metadata = {"name": f"smacv2_{map_name}", "render_modes": ["rgb_array"], "render_fps": 8}
        self.render_mode, self.max_cycles = render_mode, EPISODE_LIMIT
        if render_mode:
            from .smacv2_render import Film  # only now: it needs Pillow

            self.sim = Film(self.sim, keep=1)
        O, A = self.sim.obs_size, self.sim.num_actions
        self.possible_agents, self.agents = [f"agent_{i}" for i in range(self.sim.num_agents)], []
        self.observation_spaces, self.action_spaces = {}, {}
        for agent in self.possible_agents:
            self.observation_spaces[agent] = Dict(
                {"observation": Box(-1, 1, (O,), np.float32), "action_mask": Box(0, 1, (A,), np.int8)}
            )
            self.action_spaces[agent] = Discrete(A)
        self.state_space = Box(-np.inf, np.inf, (self.sim.state_size,), np.float32)  # its cooldowns may exceed 1

    def observation_space(self, agent):
        return self.observation_spaces[agent]

    def action_space(self, agent):
        return self.action_spaces[agent]

    def _show(self, obs, info):
        self._state, self._mask = info["state"][0], info["action_mask"][0].astype(np.int8)
        views = zip(self.possible_agents, obs[0], self._mask, strict=True)
        return {agent: {"observation": row, "action_mask": mask} for agent, row, mask in views}

    def reset(self, seed=None, options=None):
        self.agents = self.possible_agents[:]
        obs, info = self.sim.reset(seed)
        infos = {agent: self._info(info, False) for agent in self.agents}
        return self._show(obs, info), infos

    def _info(self, info, illegal):
        counts = {name: info[name][0].item() for name in ("battle_won", "dead_allies", "dead_enemies")}
        return counts | {"illegal_action": illegal}

    def step(self, actions):
        agents = self.agents
        if not agents or actions.keys() != set(agents):
            raise ValueError(
                f"There are actions of {sorted(actions)}, but the agents are {agents}: reset() begins anew."
            )
        chosen = np.array([actions[agent] for agent in agents], np.int64)
        if ((chosen < 0) | (chosen >= self.sim.num_actions)).any():
            raise ValueError(f"The actions are {chosen.tolist()}, expected 0 to {self.sim.num_actions - 1}.")
        illegal = self._mask[np.arange(len(agents)), chosen] == 0
        chosen = np.where(illegal, np.where(self._mask[:, NO_OP], NO_OP, STOP), chosen)
        obs, reward, over, _, info = self.sim.step(chosen[None])
        observations = self._show(info["final_obs"], info["final_info"]) if over[0] else self._show(obs, info)
        timeout = bool(over[0]) and not is_decided(self.sim, self._state)
        if over[0]:
            self.agents = []
        rewards, terminations, truncations = (
            dict.fromkeys(agents, value) for value in (float(reward[0]), bool(over[0]) and not timeout, timeout)
        )
        infos = {agent: self._info(info, bool(wrong)) for agent, wrong in zip(agents, illegal, strict=True)}
        return observations, rewards, terminations, truncations, infos

    def state(self):
        return self._state

    def render(self):
        """The battle as it stands, or how it ended, (H, W, 3) uint8; None without a render_mode."""
        return self.sim.draw() if self.render_mode else None

    def close(self):
        """Nothing to do."""


parallel_env = SMACv2Parallel


def env(map_name="terran_5_vs_5", render_mode=None, **options):
    """The same, one agent after the other (PettingZoo's AEC interface)."""
    return parallel_to_aec(parallel_env(map_name, render_mode, **options))
