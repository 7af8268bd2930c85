"""MPE's Spread as in the Soft-QMIX paper: batched in numpy, and the same in mpe2 itself; start states and pictures.

Three agents are to cover three landmarks without bumping into each other. The interface is that of envs/__init__.py;
E environments, N = 3 agents, A = 5 actions.
"""

import mpe2
import numpy as np
from mpe2.simple_spread import simple_spread
from PIL import Image, ImageDraw, ImageFont

from .film import save_evaluation

LEVELS = {"simple": 1.0, "medium": 1.5, "hard": 2.0}  # k, the half-width of the square in which the agents start
FORCES = 5.0 * np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]])  # (A, 2): stay, left, right, down, up
OTHERS = np.array([[1, 2], [0, 2], [0, 1]])  # (N, 2): whom each agent sees and bumps into
DT, DAMPING, CONTACT_DISTANCE, CONTACT_FORCE, CONTACT_MARGIN = 0.1, 0.25, 0.3, 100.0, 1e-3


def start_positions(level: str, num_envs: int, seed: int, episode: int) -> tuple[np.ndarray, np.ndarray]:
    """Where agents (E, N, 2) and landmarks (E, N, 2) start: k U[-1, 1]^2 and 0.8 k U[-1, 1]^2.

    The generator is keyed by (seed, episode) and environments draw in order of their index, so environment i starts
    alike whatever happened before and however many environments run beside it.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, episode], np.uint64)))
    points = LEVELS[level] * generator.uniform(-1, 1, (num_envs, 6, 2))
    return points[:, :3], 0.8 * points[:, 3:]


def is_integer(value, low: int) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and low <= value < 2**63


def distance(gap: np.ndarray) -> np.ndarray:  # (..., 2) -> (...)
    x, y = gap[..., 0], gap[..., 1]
    return np.sqrt(x * x + y * y)


class Spread:
    """E environments in one batch of numpy. Every episode has 25 steps, so all of them end together.

    Reward of the team per step: the sum over the three agents of -S - collisions, with S the sum over the landmarks of
    the distance to the nearest agent. An agent counts as colliding with itself (-75 an episode), as in the original.
    """

    num_agents, num_actions, obs_size, state_size, episode_limit = 3, 5, 18, 54, 25
    backend, restarts = "batched", 0

    def __init__(self, level: str, num_envs: int, seed: int = 0, **options):
        for wrong, sentence in (
            (options, f"MPE Spread has no option {next(iter(options), '')}; it has none at all."),
            (level not in LEVELS, f"MPE Spread has no level {level!r}; it has {', '.join(LEVELS)}."),
            (not is_integer(num_envs, 1), f"num_envs is {num_envs!r}; it must be an integer of at least 1."),
            (not is_integer(seed, 0), f"seed is {seed!r}; it must be an integer from 0 to 2**63 - 1."),
        ):
            if wrong:
                raise ValueError(sentence)
        self.level, self.num_envs, self.name = level, num_envs, f"spread_{level}"
        self.title = f"MPE Spread ({level}), {'batched' if self.backend == 'batched' else f'mpe2 {mpe2.__version__}'}"
        self.about = {"backend": self.backend, "mpe2": mpe2.__version__}
        self.seed, self.episode, self.t = seed, -1, 0
        self.position = np.zeros((num_envs, 3, 2))  # of the agents, (E, N, 2)
        self.velocity = np.zeros((num_envs, 3, 2))
        self.landmark = np.zeros((num_envs, 3, 2))
        self.film: list[tuple[np.ndarray, np.ndarray]] = []  # positions (E, N, 2) and rewards (E,) of this episode

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, dict]:
        """Start a new episode everywhere: the first one of `seed`, or without a seed the next one in line."""
        if seed is not None:
            self.seed, self.episode = seed, -1
        self.episode, self.t = self.episode + 1, 0
        self.last_landmark = self.landmark
        self.position, self.landmark = start_positions(self.level, self.num_envs, self.seed, self.episode)
        self.velocity = np.zeros_like(self.position)
        self.film, self.last_film = [(self.position.copy(), np.zeros(self.num_envs))], self.film
        self._load()
        return self.observe()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Actions (E, N) -> obs (E, N, O), reward (E,), terminated (E,), truncated (E,), info."""
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs, 3) or actions.dtype.kind not in "iu":
            raise ValueError(f"actions must be integers ({self.num_envs}, 3), not {actions.dtype} {actions.shape}")
        bad = (actions < 0) | (actions >= self.num_actions)
        if bad.any():
            env, agent = np.argwhere(bad)[0]
            raise ValueError(f"environment {env}, agent {agent}: action {actions[env, agent]} is not in 0..4")
        self.t += 1
        reward = self._move(actions).astype(np.float32)
        self.film.append((self.position.copy(), reward.copy()))
        terminated = np.full(self.num_envs, self.t == self.episode_limit)  # step 25 is a true end: no bootstrap
        obs, info = self.observe()
        if self.t == self.episode_limit:
            final = {"final_obs": obs, "_final_obs": terminated.copy()}
            final |= {"final_info": info, "_final_info": terminated.copy()}
            obs, info = self.reset()
            info |= final
        return obs, reward, terminated, np.zeros_like(terminated), info

    def observe(self) -> tuple[np.ndarray, dict]:
        """What `reset` returns, for the present moment."""
        obs = self._observe()
        mask = np.ones((self.num_envs, 3, 5), bool)
        return obs, {"state": obs.reshape(self.num_envs, 54).copy(), "action_mask": mask}

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything that `set_state` needs to go on exactly from here."""
        clock = np.array([self.seed, self.episode, self.t], np.int64)
        arrays = {"position": self.position, "velocity": self.velocity, "landmark": self.landmark, "clock": clock}
        return {name: array.copy() for name, array in arrays.items()}

    def set_state(self, state: dict[str, np.ndarray]) -> tuple[np.ndarray, dict]:
        """Go on from what `get_state` gave, of either backend; returns what `reset` returns."""
        for name in ("position", "velocity", "landmark"):
            array = np.array(state[name], np.float64)
            if array.shape != (self.num_envs, 3, 2):
                raise ValueError(f"{name} has shape {array.shape}, not ({self.num_envs}, 3, 2)")
            setattr(self, name, array)
        self.seed, self.episode, self.t = (int(number) for number in state["clock"])
        self._load()
        return self.observe()

    def draw(self, env_index: int) -> list[np.ndarray]:
        """Frames of that environment's last episode, see draw_episode."""
        positions, rewards = (np.stack([step[i][env_index] for step in self.last_film]) for i in (0, 1))
        return draw_episode(positions, self.last_landmark[env_index], rewards[1:])

    def save_film(self, place, step: int = 0) -> list:
        """Write the last episodes of environments 0 to 2 as evaluation.gif: see save_evaluation."""
        return save_evaluation([frame for e in range(min(3, self.num_envs)) for frame in self.draw(e)], place, step, 10)

    def close(self) -> None:
        """Nothing to do."""

    def _load(self) -> None:
        """Pass positions and velocities on to the physics: nothing to do here."""

    def _move(self, actions: np.ndarray) -> np.ndarray:
        """One step of the physics, in float64; returns the reward (E,)."""
        towards = self.position[:, OTHERS] - self.position[:, :, None]  # (E, N, 2 others, 2)
        apart = distance(towards)
        overlap = CONTACT_MARGIN * np.logaddexp(0, (CONTACT_DISTANCE - apart) / CONTACT_MARGIN)  # a soft max(0, .)
        force = FORCES[actions] - CONTACT_FORCE * (towards * (overlap / apart)[..., None]).sum(2)
        self.velocity = self.velocity * (1 - DAMPING) + force * DT
        self.position = self.position + self.velocity * DT  # by the new velocity; today's mpe2 uses the old one

        to_landmark = distance(self.landmark[:, :, None] - self.position[:, None])  # (E, landmarks, N)
        apart = distance(self.position[:, OTHERS] - self.position[:, :, None])  # (E, N, 2 others)
        collisions = 3 + (apart < CONTACT_DISTANCE).sum((1, 2))  # 3: each agent with itself
        return -3 * to_landmark.min(2).sum(1) - collisions

    def _observe(self) -> np.ndarray:
        obs = np.zeros((self.num_envs, 3, 18), np.float32)  # the last four, messages of the others, stay 0
        here = self.position[:, :, None]
        obs[..., 0:2], obs[..., 2:4] = self.velocity, self.position
        obs[..., 4:10] = (self.landmark[:, None] - here).reshape(-1, 3, 6)
        obs[..., 10:14] = (self.position[:, OTHERS] - here).reshape(-1, 3, 4)
        return obs


class VelocityFirst(simple_spread.ExtendedWorld):
    """mpe2's world with the original order of integration: velocity, then position by the new velocity."""

    def integrate_state(self, p_force):
        for agent, force in zip(self.agents, p_force, strict=False):  # landmarks, after the agents, do not move
            agent.state.p_vel = agent.state.p_vel * (1 - self.damping) + force / agent.mass * self.dt
            agent.state.p_pos = agent.state.p_pos + agent.state.p_vel * self.dt


class GivenStart(simple_spread.Scenario):
    """mpe2's scenario with its start states taken from `start` = agents' positions, velocities, landmarks: (3, 2)."""

    def reset_world(self, world, np_random):
        super().reset_world(world, np_random)
        position, velocity, landmark = self.start
        for i in range(3):
            world.agents[i].state.p_pos, world.agents[i].state.p_vel = position[i].copy(), velocity[i].copy()
            world.landmarks[i].state.p_pos = landmark[i].copy()


class SpreadMPE2(Spread):
    """The same on PettingZoo's parallel environment mpe2.simple_spread_v3: slower, and what all this is held to."""

    backend = "mpe2"

    def __init__(self, level: str, num_envs: int, seed: int = 0, **options):
        super().__init__(level, num_envs, seed, **options)
        self.envs = []
        for _ in range(num_envs):
            env = simple_spread.parallel_env(N=3, local_ratio=0.5, max_cycles=self.episode_limit)
            env.unwrapped.world.__class__ = VelocityFirst
            env.unwrapped.scenario = GivenStart()
            env.unwrapped.screen = None  # 2 MB each, to draw on
            self.envs.append(env)

    def _load(self) -> None:
        for env, *start in zip(self.envs, self.position, self.velocity, self.landmark, strict=True):
            env.unwrapped.scenario.start = start
            env.reset()

    def _move(self, actions: np.ndarray) -> np.ndarray:
        reward = np.zeros(self.num_envs)
        for e, env in enumerate(self.envs):
            # mpe2 truncates at step 25; `step` calls the same moment terminated.
            rewards = env.step(dict(zip(env.possible_agents, actions[e].tolist(), strict=True)))[1]
            # Each agent gets (-S - its collisions with others) / 2; the original counts S and itself for each agent.
            reward[e] = 2 * sum(rewards.values()) - 3
            self.position[e] = [agent.state.p_pos for agent in env.unwrapped.world.agents]
            self.velocity[e] = [agent.state.p_vel for agent in env.unwrapped.world.agents]
        return reward

    def _observe(self) -> np.ndarray:
        return np.stack([env.state().reshape(3, 18) for env in self.envs])


# --- Pictures ---------------------------------------------------------------------------------------------------------

AGENT_RADIUS, LANDMARK_RADIUS = CONTACT_DISTANCE / 2, 0.08
AGENT_COLOURS, LANDMARK_COLOUR = ((0, 114, 178), (0, 158, 115), (204, 121, 167)), (213, 94, 0)
SIZE, HEADER, FINE = 480, 32, 2  # pixels of the square field and of the line above it; drawn FINE times as large


def draw_episode(positions: np.ndarray, landmarks: np.ndarray, rewards: np.ndarray) -> list[np.ndarray]:
    """Agents' positions (T + 1, N, 2), landmarks (N, 2), rewards (T,) -> T + 1 frames (512, 480, 3) uint8, and a pause.

    Agents are discs of their true radius with their trail, landmarks orange crosses. One view of the whole episode
    contains all of them. The pause, to see the end, is the last frame nine times more.
    """
    positions, landmarks = np.asarray(positions, float), np.asarray(landmarks, float)
    points = np.concatenate([positions.reshape(-1, 2), landmarks])
    low, high = points.min(0), points.max(0)
    scale = FINE * SIZE / ((high - low).max() + 3 * AGENT_RADIUS)  # half a radius is left on either side
    corner = (low + high) / 2 + np.array([-1, 1]) * FINE * SIZE / scale / 2  # top left; pictures grow downwards
    font = ImageFont.load_default(FINE * 16)

    def pixels(place: np.ndarray) -> np.ndarray:  # (..., 2) -> (..., 2)
        return (place - corner) * np.array([1, -1]) * scale + np.array([0, FINE * HEADER])

    frames = []
    for t in range(len(positions)):
        picture = Image.new("RGB", (FINE * SIZE, FINE * (SIZE + HEADER)), "white")
        draw = ImageDraw.Draw(picture, "RGBA")  # colours with a fourth number are mixed with what is below
        for i, colour in enumerate(AGENT_COLOURS):
            trail = pixels(positions[: t + 1, i])  # (t + 1, 2)
            draw.line([tuple(place) for place in trail], (*colour, 160), 2 * FINE)
            (x, y), r = trail[-1], AGENT_RADIUS * scale
            draw.ellipse((x - r, y - r, x + r, y + r), (*colour, 150), colour, FINE)
        for x, y in pixels(landmarks):  # above the agents: one that is covered can be seen, too
            r = LANDMARK_RADIUS * scale
            draw.line((x - r, y - r, x + r, y + r), LANDMARK_COLOUR, round(r / 2))
            draw.line((x - r, y + r, x + r, y - r), LANDMARK_COLOUR, round(r / 2))
        draw.rectangle((0, 0, FINE * SIZE, FINE * HEADER), (235, 235, 235))
        text = f"step {t:2}    return {np.sum(rewards[:t]):.1f}"
        draw.text((FINE * 10, FINE * HEADER / 2), text, "black", font, anchor="lm")
        frames.append(np.array(picture.resize((SIZE, SIZE + HEADER), Image.Resampling.BOX)))
    return frames + 9 * frames[-1:]
