"""The simulator in the smacv2 package's clothes, for trainers that were written for it: PyMARL2, EPyMARL, on-policy.

    from envs.smacv2_package import StarCraftCapabilityEnvWrapper  # was: from smacv2.env.starcraft2.wrapper import ...

The class has the package's name, constructor keywords, methods and numbers (main branch of February 2024), but plays
envs/smacv2_sim.py: nothing to install but numba, thousands of steps a second in place of about a hundred, and results
that are not StarCraft II's. docs/simulator.md says what to change in each trainer.

Where it differs: rewards are scaled by the simulator's one constant per map (the package takes its first battle's
enemies), `get_obs()` may be called as often as one likes, `get_stats()` before the first battle ends gives a win rate
of 0, and seeds decide about battles. Enemy rows are not wiped unless the simulator's own option enemy_wipe is True.
"""

import logging
import multiprocessing

import numpy as np

from .smacv2_sim import (
    EPISODE_LIMIT,
    FIRST_TARGET,
    MIN_MASK_RANGE,
    RACES,
    SMACv2Sim,
    check_flag,
    check_integer,
    is_decided,
)

logging.getLogger("numba").setLevel(logging.WARNING)  # PyMARL's level, DEBUG, has the compiler write for minutes

ONLY = {  # what the simulator plays of the options that have a meaning in it
    "step_mul": 8,
    "move_amount": 2,
    "obs_all_health": True,
    "obs_own_health": True,
    "obs_last_action": False,
    "obs_pathing_grid": False,
    "obs_terrain_height": False,
    "obs_instead_of_state": False,
    "obs_timestep_number": False,
    "obs_starcraft": True,
    "conic_fov": False,
    "state_last_action": True,
    "state_timestep_number": False,
    "reward_sparse": False,
    "reward_only_positive": True,
    "reward_death_value": 10,
    "reward_win": 200,
    "reward_defeat": 0,
    "min_attack_range": MIN_MASK_RANGE,
    "fully_observable": False,
    "heuristic_ai": False,
    "heuristic_rest": False,
    "prob_obs_enemy": 1.0,
    "action_mask": True,
}
IGNORED = {"difficulty", "game_version", "num_fov_actions", "reward_negative_scale", "kill_unit_step_mul", "replay_dir"}
IGNORED |= {"replay_prefix", "window_size_x", "window_size_y", "debug"}
KEYS = {"n_units", "n_enemies", "team_gen", "start_positions"}
STARTS = {"dist_type": "surrounded_and_reflect", "p": 0.5, "map_x": 32, "map_y": 32}
SIGHT, SHOT = 9, 6  # of every unit, with use_unit_ranges False


def refuse(name, value, expected):
    raise ValueError(f"{name} is {value!r}, but the simulator plays {expected} only.")


def read_map(map_name, config):
    """(the simulator's map name, may a whole team be of the exception?) from the package's two ways to say it.

    Errors: ValueError, one sentence with the option and its value, for a game that the simulator does not play.
    """
    race = str(map_name).removeprefix("10gen_")
    if race not in RACES or race == map_name:
        refuse("map_name", map_name, "10gen_protoss, 10gen_terran and 10gen_zerg")
    types, weights, exception = RACES[race]
    if not isinstance(config, dict) or config.keys() != KEYS:
        got = sorted(config) if isinstance(config, dict) else config
        refuse("capability_config", got, "a dictionary of n_units, n_enemies, team_gen and start_positions")
    team, start = config["team_gen"], config["start_positions"]
    for name, value in STARTS.items():
        if start.get(name) != value:
            refuse(f"start_positions.{name}", start.get(name), value)
    for name, value in {"dist_type": "weighted_teams", "observe": True}.items():
        if team.get(name) != value:
            refuse(f"team_gen.{name}", team.get(name), value)
    shares, given = dict(zip(types, weights, strict=True)), (team.get("unit_types", ()), team.get("weights", ()))
    if len(given[0]) != len(given[1]) or dict(zip(*given, strict=True)) != shares:
        refuse("team_gen.weights", [*given[1]], f"{shares}")
    excepted = list(team.get("exception_unit_types") or [])
    if excepted not in ([], [exception]):
        refuse("team_gen.exception_unit_types", excepted, f"{[exception] if exception else []} or none")
    return f"{race}_{config['n_units']}_vs_{config['n_enemies']}", excepted == []


class StarCraftCapabilityEnvWrapper:
    """One battle after the other; between a battle's end and `reset()` all getters show how it ended.

    Args: those of the package, by name. `capability_config` gives sizes, teams and starts, `map_name` the race
    ("10gen_terran"). continuing_episode, obs_own_pos, use_unit_ranges, reward_scale and reward_scale_rate are played
    either way, with the package's defaults; what is without meaning here is ignored; enemy_wipe and unit_table are the
    simulator's. `seed` and the number of this process among its parent's children decide about the battles, since some
    trainers give the same seed to all their workers; without a seed numpy's global generator gives one at the first
    reset, so that a trainer's own `np.random.seed` is enough.

    Errors: ValueError, one sentence, for what the simulator does not play and for actions that are not available.
    """

    force_restarts = 0

    def __init__(
        self,
        map_name="8m",
        seed=None,
        capability_config=None,
        continuing_episode=False,
        obs_own_pos=False,
        use_unit_ranges=False,
        reward_scale=True,
        reward_scale_rate=20,
        enemy_wipe=False,
        unit_table="wol",
        **options,
    ):
        for name, value in options.items():
            if name in ONLY and (value != ONLY[name] or isinstance(value, bool) != isinstance(ONLY[name], bool)):
                refuse(name, value, ONLY[name])
            if name not in ONLY and name not in IGNORED:
                raise ValueError(f"{name} is {value!r}, but neither the package nor the simulator has this option.")
        self.continuing_episode = check_flag("continuing_episode", continuing_episode)
        self.obs_own_pos = check_flag("obs_own_pos", obs_own_pos)
        name, any_team = read_map(map_name, capability_config)
        self.sim = SMACv2Sim(name, 1, enemy_wipe=enemy_wipe, unit_table=unit_table)
        if any_team:
            self.sim._rules = self.sim._rules._replace(exception=-1)
        if not check_flag("use_unit_ranges", use_unit_ranges):
            self.sim._rules.table["sight"], self.sim._rules.table["mask_range"] = SIGHT, SHOT
        self.map_name, self._seed, self._seeded = map_name, None, False
        self.seed(seed)
        self.n_agents, self.n_enemies, self.n_actions = self.sim.num_agents, self.sim.num_enemies, self.sim.num_actions
        self.n_actions_no_attack, self.episode_limit = FIRST_TARGET, EPISODE_LIMIT
        self.max_reward = float(self.sim.max_reward[0])
        self._factor = reward_scale_rate / 20 if check_flag("reward_scale", reward_scale) else self.max_reward / 20
        shield = ["shield"] * (self.sim.race == "protoss")
        self.capability_attr_names = ["type_0", "type_1", "type_2"]
        self.ally_state_attr_names = ["health", "energy/cooldown", "rel_x", "rel_y", *shield]
        self.enemy_state_attr_names = ["health", "rel_x", "rel_y", *shield, *self.capability_attr_names]
        self.battles_won = self.battles_game = self.timeouts = self._episode_steps = 0
        self.win_counted, self._over = False, True
        obs, state, mask = self.sim.observe()
        self._show(obs, {"state": state, "action_mask": mask})

    @property
    def env(self):
        return self  # the package wraps another object, whose attributes some trainers read

    def _show(self, obs, info):
        self._obs, self._state, self._mask = obs[0], info["state"][0], info["action_mask"][0].astype(np.int64)
        if not self.obs_own_pos:  # the two columns before the three of the type
            self._obs = np.delete(self._obs, [-5, -4], axis=1)

    def reset(self):
        """Start a battle. Returns: list of N observations (O,) float32, state (S,) float32."""
        if not self._seeded:
            seed = np.random.randint(2**31) if self._seed is None else self._seed  # noqa: NPY002 - the trainer's
            worker = getattr(multiprocessing.current_process(), "_identity", ())
            seed = int(np.random.SeedSequence([seed, *worker]).generate_state(1)[0])
        self._show(*self.sim.reset(seed=None if self._seeded else seed))
        self._seeded, self._over, self.win_counted, self._episode_steps = True, False, False, 0
        return self.get_obs(), self.get_state()

    def step(self, actions):
        """Actions (N,) or (N, 1), a list, array or tensor of integers -> reward, terminated, info.

        Info has battle_won, dead_allies and dead_enemies, and after a time-out, with continuing_episode, episode_limit.
        """
        if self._over:
            raise ValueError("No battle is being fought: call reset() before step().")
        actions = [int(action.item() if hasattr(action, "item") else np.ravel(action)[0]) for action in actions]
        obs, reward, terminated, _, info = self.sim.step(np.array([actions], np.int64))
        self._episode_steps += 1
        self._over = bool(terminated[0])
        result = {name: info[name][0].item() for name in ("battle_won", "dead_allies", "dead_enemies")}
        if not self._over:
            self._show(obs, info)
            return float(reward[0]) * self._factor, False, result
        self._show(info["final_obs"], info["final_info"])
        self.win_counted = result["battle_won"]
        self.battles_game += 1
        self.battles_won += self.win_counted
        if not is_decided(self.sim, self._state):
            self.timeouts += 1
            if self.continuing_episode:
                result["episode_limit"] = True
        return float(reward[0]) * self._factor, True, result

    def get_obs(self):
        return list(self._obs)

    def get_obs_agent(self, agent_id, fully_observable=False):
        return self._obs[agent_id]

    def get_state(self):
        return self._state

    def get_avail_actions(self):
        return self._mask.tolist()

    def get_avail_agent_actions(self, agent_id):
        return self._mask[agent_id].tolist()

    def get_capabilities(self):
        return self._obs[:, -3:].ravel()  # nothing of the dead, whose observations are empty

    def get_obs_size(self):
        return self._obs.shape[1]

    def get_state_size(self):
        return self._state.shape[0]

    def get_total_actions(self):
        return self.n_actions

    def get_cap_size(self):
        return len(self.capability_attr_names)

    def get_env_info(self):
        return {
            "state_shape": self.get_state_size(),
            "obs_shape": self.get_obs_size(),
            "cap_shape": self.get_cap_size(),
            "n_actions": self.n_actions,
            "n_agents": self.n_agents,
            "episode_limit": self.episode_limit,
            "agent_features": self.ally_state_attr_names + self.capability_attr_names,
            "enemy_features": self.enemy_state_attr_names,
        }

    def get_stats(self):
        return {
            "battles_won": self.battles_won,
            "battles_game": self.battles_game,
            "battles_draw": self.timeouts,
            "win_rate": self.battles_won / max(self.battles_game, 1),
            "timeouts": self.timeouts,
            "restarts": self.force_restarts,
        }

    def seed(self, seed=None):
        """The package's takes nothing and returns the seed; with one, the next reset begins that seed's battles."""
        if seed is not None:
            self._seed, self._seeded = check_integer("seed", seed, 0, 2**63 - 1), False
        return self._seed

    def render(self, mode="human"):
        """The battle as an array (H, W, 3) uint8, whatever the mode; once it has ended, the next one's start."""
        return self.sim.render()

    def save_replay(self):
        """Nothing to save: a film is made by envs/smacv2_render.py."""

    def close(self):
        """Nothing to do."""
