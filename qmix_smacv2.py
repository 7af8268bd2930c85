"""QMIX on SMACv2 (Rashid et al. 2018, arXiv 1803.11485), one file, top to bottom: the twin of softqmix_smacv2.py.

    python qmix_smacv2.py --map protoss_5_vs_5                                        # the paper's run, 10M steps
    python qmix_smacv2.py --map terran_5_vs_5 --total-timesteps 200000                # watch it learn
    python qmix_smacv2.py --resume runs/NAME                                          # go on after Ctrl-C or a crash
    python qmix_smacv2.py --evaluate runs/NAME/policy.pt --eval-episodes 1000         # test what was learnt

QMIX learns Q_tot(s, u) = Mixer(Q_1, ..., Q_n; s), monotonic in every Q_i, so that each agent's greedy action is part of
the greedy joint action. This is the baseline of the Soft-QMIX paper (Chen, Huang, Schneider 2024, arXiv 2406.13930):
epsilon-greedy exploration, double-Q targets, TD(lambda), and otherwise the same agent, mixer, replay and settings as
softqmix_smacv2.py. `diff qmix_smacv2.py softqmix_smacv2.py` is the paper's contribution.

Equation, table and appendix numbers are those of the Soft-QMIX paper. In shape comments: B episodes of a batch,
N agents, A actions, E environments, S state, O observation, H hidden state; M rows of a batch with t = 0..L, R of them
with t < L.
"""

import contextlib
import copy
import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import sys
import sysconfig
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs.smacv2_sim import SIMULATOR_VERSION, SMACv2Sim, parse_map_name
from envs.starcraft2 import StarCraft2, check_env, check_starcraft2

ALGORITHM = "qmix_smacv2"


@dataclass
class Args:
    exp_name: str = "qmix_smacv2"
    """name of this experiment, part of the run's name"""
    map: str = "protoss_5_vs_5"
    """SMACv2 scenario: protoss, terran or zerg, then the number of allies and enemies"""
    backend: Literal["auto", "starcraft2", "sim"] = "auto"
    """starcraft2: the game through smacv2; sim: the bundled simulator; auto: the game where it is installed"""
    seed: int = 1
    """fixes networks, battles, exploration and replay"""
    torch_deterministic: bool = True
    """choose deterministic cuDNN kernels, where there are any"""
    cuda: bool = True
    """use the GPU if there is one"""
    compile: bool = False
    """compile the mixer with torch.compile: half a minute at the start, a little faster from then on"""
    cudagraphs: bool = False
    """on a GPU, record what updating and acting launch, then replay it as a whole; batches are padded for it"""
    run_dir: str | None = None
    """folder of this run; default runs/{map}__{exp_name}__{backend}__{seed}__{time}"""
    resume: str | None = None
    """go on from this checkpoint folder, or from the newest one of this run folder; options default to the run's own"""
    evaluate: str | None = None
    """only evaluate this checkpoint folder, run folder or policy.pt"""

    total_timesteps: int = 10_050_000
    """environment steps, summed over environments (section 5.3; Table 8 misprints a tenth of it)"""
    num_envs: int = 4
    """battles stepped as one batch (Table 8)"""
    episodes_per_update: int = 4
    """one update per this many finished battles, whatever num_envs is (Table 8 with 4 environments)"""
    batch_size: int = 128
    """battles in an update (Table 8); the first update waits for this many"""
    buffer_size: int = 5000
    """battles in the replay (Table 8)"""
    buffer_device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the replay lives; auto: on the GPU unless it would take more than half of its free memory"""
    learning_rate: float = 1e-3
    """of Adam (Table 8)"""
    max_grad_norm: float = 10.0
    """gradient norm is clipped to this"""
    gamma: float = 0.99
    """discount factor"""
    td_lambda: float = 0.4
    """lambda of TD(lambda) (Table 8, Eq. 24)"""
    td_weight: float = 1.0
    """weight of squared TD errors where Q_tot exceeds its target; 1 is the paper, less biases Q_tot upwards"""
    target_update_interval: int = 200
    """episodes between copies of the networks to their targets (Table 8); ignored if tau < 1"""
    tau: float = 1.0
    """below 1: after every update, targets move this fraction of the way to the networks instead (Algorithm 1)"""
    mixer: Literal["qmix", "vdn"] = "qmix"
    """qmix: the monotonic network; vdn: the plain sum of Q_i"""
    epsilon_start: float = 1.0
    """probability of a random action at step 0 (Table 8)"""
    epsilon_finish: float = 0.05
    """probability of a random action after the annealing (Table 8)"""
    epsilon_anneal_time: int = 100_000
    """environment steps over which epsilon falls linearly (Table 8)"""

    eval_interval: int = 10_000
    """environment steps between evaluations"""
    eval_episodes: int = 32
    """greedy battles in an evaluation, played side by side in the largest divisor up to 64: take no prime number"""
    checkpoint_interval: int = 500_000
    """environment steps between checkpoints; there is always one at the end and on Ctrl-C"""
    checkpoint_replay: bool = True
    """keep the replay in the newest checkpoint; without it a resumed run refills it first"""
    reward_scale: Literal["expected", "first_episode"] = "expected"
    """expected: one constant per map; first_episode: set by the first battle's enemies, as the smacv2 package does"""
    enemy_wipe: bool = False
    """simulator: imitate the observation fault of smacv2 since June 2023 (its issue 50)"""
    fix_enemy_wipe: bool = False
    """StarCraft II: undo that fault"""
    prob_obs_enemy: float = 1.0
    """StarCraft II: 0, with --no-action-mask, is SMACv2's extended partial observability"""
    action_mask: bool = True
    """StarCraft II: see prob_obs_enemy"""
    save_replay: bool = False
    """StarCraft II: save the games' replays after each evaluation"""
    check_env: bool = False
    """StarCraft II: only check package, game and map, play one battle, and print sizes, speed and versions"""


FIXED = ("map", "num_envs", "seed", "mixer")  # what a resumed run cannot change
GAME_FIXED = ("reward_scale", "enemy_wipe", "fix_enemy_wipe", "prob_obs_enemy", "action_mask")  # nor these
GAME_OPTIONS = {"fix_enemy_wipe": False, "prob_obs_enemy": 1.0, "action_mask": True, "save_replay": False}


class InputError(ValueError):
    """Something the user can put right, told in one sentence. On the command line: exit code 2, no traceback."""


def check_args(args: Args) -> None:
    """Raise InputError for impossible settings."""
    try:
        parse_map_name(args.map)
    except ValueError as error:
        raise InputError(f"--map: {error}") from None
    at_least_one = "num_envs episodes_per_update batch_size buffer_size total_timesteps target_update_interval"
    for name in (at_least_one + " eval_interval eval_episodes checkpoint_interval").split():
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1.")
    within = (("td_lambda", 0, 1), ("gamma", 0, 1), ("prob_obs_enemy", 0, 1), ("seed", 0, 2**31 - 1))
    within += (("epsilon_start", 0, 1), ("epsilon_finish", 0, 1), ("epsilon_anneal_time", 1, math.inf))
    for name, low, high in within:
        if not low <= getattr(args, name) <= high:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be in [{low}, {high}].")
    for name, high in (("learning_rate", 1e6), ("max_grad_norm", math.inf), ("tau", 1)):
        if not 0 < getattr(args, name) <= high:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be in (0, {high:g}].")
    if not 0 <= args.td_weight < math.inf:
        raise InputError(f"--td-weight is {args.td_weight}; it must be finite and at least 0 (1 is the paper's loss).")
    if args.batch_size > args.buffer_size:
        raise InputError(f"--batch-size {args.batch_size} is larger than --buffer-size {args.buffer_size}: lower it.")
    if args.evaluate:  # what follows is about training
        return
    if args.buffer_device == "cuda" and not (args.cuda and torch.cuda.is_available()):
        raise InputError("--buffer-device cuda needs a GPU that PyTorch can use, and --cuda: take auto or cpu.")
    if args.cudagraphs and not (args.cuda and torch.cuda.is_available()):
        raise InputError("--cudagraphs needs a GPU that PyTorch can use, and --cuda: take --no-cudagraphs.")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if args.compile and not (shutil.which(compiler) and Path(sysconfig.get_path("include"), "Python.h").exists()):
        raise InputError(f"--compile needs {compiler} and Python.h (python3-dev): install both, or take --no-compile.")


# --- Environment: one of two games ------------------------------------------------------------------------------------


def choose_backend(args: Args) -> str:
    """Return "starcraft2" or "sim"; raise InputError if what is asked for is not there."""
    backend = "sim"
    if args.backend != "sim":
        try:
            check_starcraft2(args.map)
            backend = "starcraft2"
        except ValueError as error:
            if args.backend == "starcraft2":
                raise InputError(f"--backend starcraft2: {error}") from None
    other, options = ("StarCraft II", GAME_OPTIONS) if backend == "sim" else ("the simulator", {"enemy_wipe": False})
    for name, default in options.items():
        if getattr(args, name) != default:
            raise InputError(f"The option {name.replace('_', '-')} is for {other} only: leave it out.")
    return backend


def make_env(args: Args, num_envs: int, seed: int, backend: str = "sim") -> SMACv2Sim | StarCraft2:
    """Battles as a batch: observations (E, N, O), state (E, S), action mask (E, N, A); ended ones restart at once."""
    try:
        if backend == "sim":
            return SMACv2Sim(args.map, num_envs, seed, reward_scale=args.reward_scale, enemy_wipe=args.enemy_wipe)
        options = {name: getattr(args, name) for name in ("fix_enemy_wipe", "prob_obs_enemy", "action_mask")}
        return StarCraft2(args.map, num_envs, seed, reward_scale=args.reward_scale, **options)
    except ValueError as error:
        raise InputError(error) from None


# --- Networks (Tables 5 and 8, appendix G) ----------------------------------------------------------------------------


class Agent(nn.Module):
    """f^stage1: a recurrent network of local observations, shared by all agents; all that execution needs.

    Input: observation, last action (one-hot, zeros at t = 0), agent id (one-hot). Output: a value for each action.
    """

    def __init__(self, obs_size: int, num_agents: int, num_actions: int, hidden_size: int = 64):
        super().__init__()
        self.num_agents, self.num_actions, self.hidden_size = num_agents, num_actions, hidden_size
        self.fc_in = nn.Linear(obs_size + num_actions + num_agents, hidden_size)
        self.gru = nn.GRU(hidden_size, hidden_size)
        self.fc_out = nn.Linear(hidden_size, num_actions)

    def encode(self, obs: torch.Tensor, last_action: torch.Tensor) -> torch.Tensor:
        """obs (M, N, O), last_action (M, N) with -1 for none -> input (M, N, O + A + N)."""
        last_action = last_action.unsqueeze(-1) == torch.arange(self.num_actions, device=obs.device)  # (M, N, A)
        agent_id = torch.eye(self.num_agents, device=obs.device).expand(len(obs), -1, -1)  # (M, N, N)
        return torch.cat([obs, last_action, agent_id], dim=-1)

    def step(self, obs: torch.Tensor, last_action: torch.Tensor, hidden: torch.Tensor):
        """To act: obs (E, N, O), last_action (E, N), hidden (E, N, H) -> values (E, N, A), hidden (E, N, H)."""
        x = F.relu(self.fc_in(self.encode(obs, last_action)))
        hidden = torch.gru_cell(x.flatten(0, 1), hidden.flatten(0, 1), *self.gru.parameters()).view_as(hidden)
        return self.fc_out(hidden), hidden

    def unroll(self, x: torch.Tensor, num_episodes: list[int]) -> torch.Tensor:
        """To learn: whole episodes, each from a zero hidden state, encoded (M, N, O + A + N) -> values (M, N, A).

        First come the rows t = 0 of all episodes, the longest first, then t = 1 of the num_episodes[1] that get there.
        """
        x = F.relu(self.fc_in(x)).flatten(0, 1)  # (M*N, H)
        sizes = [n * self.num_agents for n in num_episodes]
        if x.is_cuda and sizes[-1] == sizes[0]:
            output = self.gru(x.view(len(sizes), sizes[0], -1))[0].flatten(0, 1)
        elif x.is_cuda:
            output = self.gru(nn.utils.rnn.PackedSequence(x, torch.tensor(sizes)))[0].data
        else:  # the same step by step: on a CPU it takes half as long
            hidden, outputs = x.new_zeros(sizes[0], self.hidden_size), []
            for x_t in x.split(sizes):  # hidden[: len(x_t)]: the other episodes have ended
                hidden = torch.gru_cell(x_t, hidden[: len(x_t)], *self.gru.parameters())
                outputs.append(hidden)
            output = torch.cat(outputs)
        return self.fc_out(output).unflatten(0, (-1, self.num_agents))


def hypernetwork(state_size: int, output_size: int, hypernet_embed: int = 64) -> nn.Sequential:
    """Generates weights (made non-negative by their user) or a last bias from the global state."""
    return nn.Sequential(nn.Linear(state_size, hypernet_embed), nn.ReLU(), nn.Linear(hypernet_embed, output_size))


class Mixer(nn.Module):
    """QMIX's monotonic Q_tot = |W2(s)| elu(|W1(s)| Q + b1(s)) + b2(s) (Eq. 6): dQ_tot / dQ_i >= 0 for every agent."""

    def __init__(self, state_size: int, num_agents: int, embed: int = 32):
        super().__init__()
        self.w1 = hypernetwork(state_size, num_agents * embed)
        self.b1 = nn.Linear(state_size, embed)
        self.w2 = hypernetwork(state_size, embed)
        self.b2 = hypernetwork(state_size, 1)

    def forward(self, q: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """q (R, N), state (R, S) -> Q_tot (R,)."""
        w1 = self.w1(state).abs().unflatten(1, (q.shape[1], -1))  # (R, N, embed)
        hidden = F.elu((q.unsqueeze(1) @ w1).squeeze(1) + self.b1(state))  # (R, embed)
        return (hidden * self.w2(state).abs()).sum(1) + self.b2(state).squeeze(1)


class VDNMixer(nn.Module):
    """Q_tot as the plain sum of Q_i: value decomposition networks (Sunehag et al. 2017)."""

    def forward(self, q: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """q (R, N), state (R, S), unused -> Q_tot (R,)."""
        return q.sum(1)


class Critic(nn.Module):
    """theta: the agent network and the mixer, trained by L_Q (Eq. 13). Q_i means the agent network's output."""

    def __init__(self, env: SMACv2Sim | StarCraft2, args: Args):
        super().__init__()
        self.agent = Agent(env.obs_size, env.num_agents, env.num_actions)
        self.mixer = Mixer(env.state_size, env.num_agents) if args.mixer == "qmix" else VDNMixer()


class Networks(nn.Module):
    """All networks of a run: the critic theta and its target copy theta-bar."""

    def __init__(self, env: SMACv2Sim | StarCraft2, args: Args):
        super().__init__()
        self.critic = Critic(env, args)
        self.target = copy.deepcopy(self.critic)

    def parameter_groups(self) -> list[dict]:
        """What Adam trains; the gradient norm is clipped for each group by itself."""
        return [{"params": list(self.critic.parameters())}]


def compile_networks(networks: Networks) -> None:
    """Compile all but the agents, whose loop over time would have to be compiled for every batch anew."""
    for module in [*networks.critic.children(), *networks.target.children(), *networks.children()]:
        if not isinstance(module, (Agent, Critic)):
            module.compile(dynamic=True)


# --- Policy -----------------------------------------------------------------------------------------------------------


def greedy_action(stage1: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Decentralised execution: the best available action of the agent network alone, (..., A) -> (...)."""
    return stage1.masked_fill(~mask, -torch.inf).argmax(-1)


def epsilon_at(step: int, args: Args) -> float:
    """Probability of a random action, annealed linearly from epsilon_start to epsilon_finish (Table 8)."""
    progress = min(1.0, step / args.epsilon_anneal_time)
    return args.epsilon_start + progress * (args.epsilon_finish - args.epsilon_start)


def epsilon_greedy(stage1: torch.Tensor, mask: torch.Tensor, epsilon: float | torch.Tensor) -> torch.Tensor:
    """Each agent by itself: with probability epsilon any available action, else the best one: (..., A) -> (...)."""
    random_action = torch.rand_like(stage1).masked_fill(~mask, -1).argmax(-1)
    explore = torch.rand_like(stage1[..., 0]) < epsilon
    return torch.where(explore, random_action, greedy_action(stage1, mask))


# --- Replay of whole episodes -----------------------------------------------------------------------------------------


@dataclass
class Batch:
    """B episodes of L steps each in order of time, without padding: M rows with t = 0..L, of which R have t < L.

    First the rows t = 0 of all episodes, the longest first, then the rows t = 1 of those that have one, and so on. So
    the row that follows the i-th of the R rows is row B + i of the M rows. For CUDA graphs there is padding after all:
    every episode repeats its last rows to one common length L, and `real` says which of the R rows count.
    """

    obs: torch.Tensor  # (M, N, O)
    state: torch.Tensor  # (M, S)
    mask: torch.Tensor  # (M, N, A) available actions
    action: torch.Tensor  # (R, N)
    reward: torch.Tensor  # (R,)
    terminated: torch.Tensor  # (R,) ended for good here: no bootstrap
    now: torch.Tensor  # (R,) which of the M rows have t < L
    place: torch.Tensor  # (R,) t * B + the episode's number: where the row is in a table (T, B)
    last: torch.Tensor  # (R,) the episode's own last step
    real: torch.Tensor  # (R,) False in padding
    num_episodes: list[int]  # with L >= t, for each t: B, B, then fewer and fewer; padded: always B

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """(R,) -> (): over real steps."""
        return x.masked_fill(~self.real, 0).sum() / self.real.sum()


class Replay:
    """The last `capacity` episodes, each as long as it was: memory is proportional to the steps really stored."""

    VIEW = ("obs", "state", "mask")  # what has a row t = L, too
    FIELDS = (*VIEW, "action", "reward", "terminated")

    def __init__(self, capacity: int, device: torch.device):
        self.capacity, self.device = capacity, device
        self.episodes: list[dict[str, torch.Tensor]] = []
        self.oldest = 0  # the episode to overwrite next, once the replay is full

    def __len__(self) -> int:
        return len(self.episodes)

    def add(self, episode: dict[str, np.ndarray]) -> None:
        """Store a copy: obs (L+1, N, O), state (L+1, S), mask (L+1, N, A), action (L, N), reward, terminated (L,)."""
        stored = {name: torch.tensor(episode[name], device=self.device) for name in self.FIELDS}
        if len(self.episodes) < self.capacity:
            self.episodes.append(stored)
        else:
            self.episodes[self.oldest] = stored
            self.oldest = (self.oldest + 1) % self.capacity

    def sample(self, batch_size: int, device: torch.device, pad: bool = False) -> Batch:
        """Draw different episodes, all equally likely. With `pad`, lengths that differ become one multiple of 32."""
        chosen = [self.episodes[i] for i in torch.randperm(len(self.episodes))[:batch_size].tolist()]
        chosen.sort(key=lambda episode: len(episode["reward"]), reverse=True)
        lengths = np.array([len(episode["reward"]) for episode in chosen])
        num_episodes = [int((lengths >= t).sum()) for t in range(lengths[0] + 1)]
        if pad and lengths[-1] < lengths[0]:
            num_episodes = [len(chosen)] * (-(-lengths[0] // 32) * 32 + 1)
        t = np.repeat(np.arange(len(num_episodes)), num_episodes)  # (M,)
        b = np.concatenate([np.arange(n) for n in num_episodes])  # (M,) the episode's number
        now = np.flatnonzero(b < np.array([*num_episodes[1:], 0])[t])  # (R,)

        def order_of_time(num_rows: np.ndarray, t: np.ndarray, b: np.ndarray) -> torch.Tensor:
            """Where those rows are when episodes stand one after the other; beyond its end, an episode's last row."""
            first = np.cumsum(num_rows) - num_rows  # each episode's row t = 0
            return torch.from_numpy(first[b] + np.minimum(t, num_rows[b] - 1)).to(self.device)

        order = dict.fromkeys(self.FIELDS, order_of_time(lengths, t[now], b[now]))
        order |= dict.fromkeys(self.VIEW, order_of_time(lengths + 1, t, b))
        rows = {name: torch.cat([episode[name] for episode in chosen])[order[name]].to(device) for name in self.FIELDS}
        t, b = t[now], b[now]  # (R,)
        where = {"now": now, "place": t * len(chosen) + b, "last": t == lengths[b] - 1, "real": t < lengths[b]}
        return Batch(**rows, **to_tensors(where, device), num_episodes=num_episodes)

    def state_dict(self) -> dict:
        """All episodes as one tensor a field; `load_state_dict` restores them in the same order."""
        fields = {name: torch.cat([episode[name].cpu() for episode in self.episodes]) for name in self.FIELDS}
        lengths = [len(episode["reward"]) for episode in self.episodes]
        return {"lengths": lengths, "oldest": self.oldest, **fields}

    def load_state_dict(self, saved: dict) -> None:
        self.oldest, self.episodes = saved["oldest"], [{} for _ in saved["lengths"]]
        for name in self.FIELDS:
            rows = saved[name].split([length + (name in self.VIEW) for length in saved["lengths"]])
            for episode, value in zip(self.episodes, rows, strict=True):
                episode[name] = value.to(self.device, copy=True)  # a copy, since a view would keep all episodes alive
        if len(self.episodes) != self.capacity:  # the capacity is a new one: keep the newest, in order
            self.episodes = (self.episodes[self.oldest :] + self.episodes[: self.oldest])[-self.capacity :]
            self.oldest = 0


class Recorder:
    """The unfinished episodes of E environments, from which `finish` cuts out those that have ended."""

    def __init__(self, env: SMACv2Sim | StarCraft2):
        E, T, N = env.num_envs, env.episode_limit, env.num_agents
        self.arrays = {
            "t": np.zeros(E, np.int64),
            "obs": np.zeros((E, T + 1, N, env.obs_size), np.float32),
            "state": np.zeros((E, T + 1, env.state_size), np.float32),
            "mask": np.zeros((E, T + 1, N, env.num_actions), np.bool_),
            "action": np.zeros((E, T, N), np.int64),
            "reward": np.zeros((E, T), np.float32),
            "terminated": np.zeros((E, T), np.bool_),
        }

    def observe(self, envs: np.ndarray, view: dict[str, np.ndarray]) -> None:
        """What the environments with indices `envs` show at their time t."""
        for name, value in view.items():
            self.arrays[name][envs, self.arrays["t"][envs]] = value

    def act(self, action: np.ndarray, reward: np.ndarray, terminated: np.ndarray) -> None:
        """What all environments did at their time t, and what came of it; t moves on."""
        t = self.arrays["t"]
        for name, value in (("action", action), ("reward", reward), ("terminated", terminated)):
            self.arrays[name][np.arange(len(t)), t] = value
        t += 1

    def discard(self, envs: np.ndarray) -> None:
        """Throw away what environments `envs` have played: their battles died with their game."""
        self.arrays["t"][envs] = 0

    def finish(self, e: int) -> dict[str, np.ndarray]:
        """Environment e's episode of L = t transitions, whose row L has been observed; its next one starts."""
        length, self.arrays["t"][e] = int(self.arrays["t"][e]), 0
        return {name: self.arrays[name][e, : length + (name in Replay.VIEW)] for name in Replay.FIELDS}


# --- Targets and update -----------------------------------------------------------------------------------------------


def td_lambda_targets(
    reward: torch.Tensor,  # (R,) r_t
    terminated: torch.Tensor,  # (R,) the episode ended for good with step t
    next_q: torch.Tensor,  # (R,) Qbar_tot(s_{t+1}, u'_{t+1})
    batch: Batch,  # says which row is which step
    gamma: float,
    td_lambda: float,
) -> torch.Tensor:
    """TD(lambda) targets y_t (R,) with the greedy u' in place of the action taken (Peng's Q(lambda)):

    y_t = r_t + gamma [(1 - lambda) Qbar_tot(s_{t+1}, u') + lambda y_{t+1}]
    y_L = Qbar_tot(s_L, u')

    Nothing follows a terminated step.
    """
    value = next_q.where(batch.last, (1 - td_lambda) * next_q)  # last: y_L = Qbar_tot
    own = reward + gamma * value.masked_fill(terminated, 0)  # (R,) what step t itself adds to y_t
    # So y_t = own_t + gamma lambda y_{t+1}: the sum of (gamma lambda)^(k - t) own_k over k >= t, as one product.
    T, B = len(batch.num_episodes) - 1, batch.num_episodes[0]
    table = own.new_zeros(T * B).index_copy(0, batch.place, own.masked_fill(~batch.real, 0)).view(T, B)
    t = torch.arange(T, device=own.device)
    decay = torch.triu((gamma * td_lambda) ** (t - t.unsqueeze(1)).clamp(min=0).to(own.dtype))  # (T, T)
    return (decay @ table).flatten()[batch.place]


def compute_losses(networks: Networks, batch: Batch, args: Args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L_Q (Eq. 13), and what to log: L_Q and the mean of Q_tot."""
    critic, target = networks.critic, networks.target
    now, after = batch.now, slice(batch.num_episodes[0], None)  # of the M rows: those with t < L, those with t > 0
    action = batch.action.unsqueeze(-1)  # (R, N, 1)
    none = batch.action.new_full((batch.num_episodes[0], batch.action.shape[1]), -1)
    inputs = critic.agent.encode(batch.obs, torch.cat([none, batch.action]))  # (M, N, O + A + N), for any agent

    stage1 = critic.agent.unroll(inputs, batch.num_episodes)  # (M, N, A)
    state = batch.state[now]  # (R, S)
    q_i = stage1[now].gather(-1, action)  # (R, N, 1), actions taken only
    q_tot = critic.mixer(q_i.squeeze(-1), state)  # (R,)

    with torch.no_grad():
        next_state, next_mask = batch.state[after], batch.mask[after]
        # Double Q: the online network chooses u' among available actions, the target network values it.
        next_action = greedy_action(stage1[after], next_mask).unsqueeze(-1)  # (R, N, 1), u'
        next_stage1 = target.agent.unroll(inputs, batch.num_episodes)[after].gather(-1, next_action)
        next_q = target.mixer(next_stage1.squeeze(-1), next_state)  # (R,)
        columns = (batch.reward, batch.terminated, next_q)
        y = td_lambda_targets(*columns, batch, args.gamma, args.td_lambda)  # (R,)

    td_error = q_tot - y
    weight = torch.where(td_error > 0, args.td_weight, 1.0)
    loss_q = 0.5 * batch.mean(weight * td_error.square())  # the mean is over real steps, not over weights
    return loss_q, {"td": loss_q.detach(), "q_tot": batch.mean(q_tot.detach())}


def update(networks: Networks, optimizer: torch.optim.Adam, batch: Batch, args: Args) -> dict[str, torch.Tensor]:
    """One gradient step. Adam works parameter by parameter, so one optimiser does for all losses; returns the logs."""
    loss, logs = compute_losses(networks, batch, args)
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm)
    optimizer.step()
    if args.tau < 1:
        move_target(networks, args.tau)
    return logs


@torch.no_grad()
def move_target(networks: Networks, tau: float) -> None:
    """theta-bar <- tau theta + (1 - tau) theta-bar (Algorithm 1); tau = 1 copies."""
    for online, target in zip(networks.critic.parameters(), networks.target.parameters(), strict=True):
        target.lerp_(online, tau)


class CUDAGraphs:
    """Calls function, whose work on the GPU is recorded, and replayed as a whole: one launch instead of hundreds.

    With tensors of new shapes, the first call runs as usual, the second is recorded, and later ones are replayed, their
    tensors copied into those of the recorded call. So function must launch the same work whatever its tensors hold, and
    never wait for the GPU. What is not a tensor is recorded as it was, alpha and the learning rate too: what is to
    change between calls must be a tensor. The next call overwrites result and gradients.
    """

    def __init__(self, function):
        self.function, self.recorded = function, {}
        self.stream, self.memory = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, *arguments):
        groups = (vars(x) if isinstance(x, Batch) else x if isinstance(x, dict) else {"": x} for x in arguments)
        tensors = [x for group in groups for x in group.values() if isinstance(x, torch.Tensor)]
        shapes = tuple(x.shape for x in tensors)
        if shapes not in self.recorded:
            self.recorded[shapes] = None
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # on the stream that will record
                result = self.function(*arguments)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.recorded[shapes] is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self.memory, self.stream):  # computes nothing
                result = self.function(*arguments)
            self.recorded[shapes] = graph, tensors, result
        graph, inputs, result = self.recorded[shapes]
        for ours, theirs in zip(inputs, tensors, strict=True):
            ours.copy_(theirs)
        graph.replay()
        return result


# --- Acting and evaluation --------------------------------------------------------------------------------------------


@torch.no_grad()
def act(networks: Networks, view: dict[str, torch.Tensor], last_action, hidden, epsilon: torch.Tensor):
    """Epsilon-greedy, independently for each environment and agent: action (E, N), hidden (E, N, H)."""
    stage1, hidden = networks.critic.agent.step(view["obs"], last_action, hidden)  # (E, N, A)
    return epsilon_greedy(stage1, view["mask"], epsilon), hidden


@torch.no_grad()
def evaluate(agent: Agent, env: SMACv2Sim | StarCraft2, episodes: int, seed: int, device: torch.device) -> dict:
    """Greedy, decentralised battles; every environment plays the same number, so short ones are not over-represented.

    `episodes` must be a multiple of env.num_envs. Returns the number of battles, mean and standard deviation of their
    returns, and the win rate.
    """
    quota = episodes // env.num_envs
    obs, info = env.reset(seed=seed)
    hidden = torch.zeros(env.num_envs, env.num_agents, agent.hidden_size, device=device)
    last_action = torch.full((env.num_envs, env.num_agents), -1, device=device)
    running_return = np.zeros(env.num_envs)
    returns: list[list[float]] = [[] for _ in range(env.num_envs)]
    wins = 0
    while min(map(len, returns)) < quota:
        stage1, hidden = agent.step(torch.from_numpy(obs).to(device), last_action, hidden)
        last_action = greedy_action(stage1, torch.from_numpy(info["action_mask"]).to(device))
        obs, reward, terminated, truncated, info = env.step(last_action.cpu().numpy())
        running_return += reward
        for e in np.flatnonzero(info.get("invalid", ())):  # battles that died with their game begin again
            running_return[e], hidden[e], last_action[e] = 0, 0, -1
        for e in np.flatnonzero(terminated | truncated):
            if len(returns[e]) < quota:
                returns[e].append(running_return[e])
                wins += int(info["final_info"]["battle_won"][e])
            running_return[e], hidden[e], last_action[e] = 0, 0, -1
    values = np.concatenate(returns)
    return {
        "episodes": len(values),
        "return_mean": float(values.mean()),
        "return_std": float(values.std()),
        "win_rate": wins / len(values),
    }


def make_eval_env(args: Args, backend: str = "sim") -> SMACv2Sim | StarCraft2:
    """As many environments as divide the number of battles: up to 64, or up to --num-envs games of their own."""
    most = 64 if backend == "sim" else args.num_envs
    return make_env(args, max(n for n in range(1, most + 1) if args.eval_episodes % n == 0), args.seed, backend)


def evaluation_seed(seed: int, step: int) -> int:
    """A seed of its own for each evaluation of each run."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def wilson_interval(wins: float, n: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927)."""
    z, p = 1.959964, wins / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


# --- Files: written under a temporary name and renamed, so that none is ever left half written ------------------------


def write_file(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written ({error.strerror}).") from error


def write_metrics(path: Path, rows: list[dict]) -> None:
    """metrics.csv: a row per evaluation, written as a whole."""
    lines = [",".join(rows[0])] + [",".join(str(value) for value in row.values()) for row in rows]
    write_file(path, "\n".join(lines) + "\n")


def save_checkpoint(run_dir: Path, step: int, training: dict, policy: dict, replay: Replay | None) -> None:
    """Write training.pt, policy.pt and replay.pt into checkpoints/{step}; then older checkpoints lose their replay."""
    folder = run_dir / "checkpoints" / str(step)
    temporary = folder.with_name(f"{step}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        torch.save(training, temporary / "training.pt")
        torch.save(policy, temporary / "policy.pt")
        if replay is not None:
            torch.save({"kind": f"{ALGORITHM} replay", **replay.state_dict()}, temporary / "replay.pt")
        shutil.copy(temporary / "policy.pt", temporary / "newest.pt")  # copied here, where a full disk does no harm
    except (OSError, RuntimeError) as error:  # PyTorch reports a full disk as a RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"{folder} cannot be written; is the disk full? Earlier checkpoints are intact. ({error})"
        ) from error
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    os.replace(folder / "newest.pt", run_dir / "policy.pt")
    for other in folder.parent.iterdir():
        if other.suffix == ".tmp":  # of a run that was killed while it saved
            shutil.rmtree(other)
        elif other != folder:
            (other / "replay.pt").unlink(missing_ok=True)


def load_file(path: Path, kind: str) -> dict:
    """One of our files, as dictionaries of tensors and numbers; InputError if it is missing, damaged or not ours."""
    if not path.is_file():
        raise InputError(f"There is no {path}: give a run folder with a checkpoint in it, or a checkpoint folder.")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever a damaged or foreign file makes the unpickler raise
        saved = None
    found = saved.get("kind", "something else") if isinstance(saved, dict) else "damaged, or something else"
    if found != f"{ALGORITHM} {kind}":
        raise InputError(f"{path} is not a complete {kind} of {ALGORITHM}: it is {found}.")
    return saved


def checkpoint_folder(path: str) -> Path:
    """A checkpoint folder itself, or the newest one of a run folder."""
    newest = sorted((int(p.name), p) for p in Path(path).glob("checkpoints/*") if p.name.isdigit())
    return newest[-1][1] if newest else Path(path)


def policy_file(path: str) -> Path:
    """policy.pt itself, or that of a checkpoint or run folder."""
    return Path(path) if Path(path).is_file() else checkpoint_folder(path) / "policy.pt"


def load_checkpoint(args: Args, backend: str) -> dict:
    """The training state to go on from, with its replay if there is one; InputError if it does not fit the options."""
    folder = checkpoint_folder(args.resume)
    saved = load_file(folder / "training.pt", "checkpoint")
    if saved["step"] >= args.total_timesteps and (folder.parent.parent / "summary.json").exists():
        raise InputError(f"{args.resume} has made all its {saved['step']} steps: give a larger --total-timesteps.")
    for name in FIXED + GAME_FIXED:
        ours, theirs = getattr(args, name), saved["args"].get(name, getattr(Args, name))  # older than the option
        if ours != theirs:
            option = name.replace("_", "-")
            raise InputError(f"--{option} is {ours}, but {folder} was trained with {theirs}: leave the option out.")
    version = SIMULATOR_VERSION if backend == "sim" else None
    if (saved["backend"], saved["simulator_version"]) != (backend, version):
        cure = f"take --backend {saved['backend']}" if saved["backend"] != backend else "start a new run"
        theirs = f"{saved['backend']} {saved['simulator_version'] or ''}".strip()
        raise InputError(f"{folder} was trained on {theirs}, which this is not: {cure}.")
    has_replay = (folder / "replay.pt").exists()
    return {**saved, "replay": load_file(folder / "replay.pt", "replay") if has_replay else None}


def make_run_dir(args: Args, backend: str) -> Path:
    """The folder of this run: the resumed one, or a new one."""
    name = f"{args.map}__{args.exp_name}__{backend}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder = checkpoint_folder(args.resume).resolve() if args.resume else Path()
    resumed = folder.parent.parent if folder.parent.name == "checkpoints" else None
    run_dir = Path(args.run_dir) if args.run_dir else resumed or Path("runs") / name
    try:
        if run_dir.resolve() == resumed and checkpoint_folder(str(run_dir)).resolve() != folder:
            raise InputError(
                f"{args.resume} is not the newest checkpoint of its run: give a --run-dir for the new one."
            )
        if run_dir.resolve() != resumed and (run_dir / "config.json").exists():
            begun = (checkpoint_folder(str(run_dir)) / "training.pt").exists()
            cure = f"--resume {run_dir}" if begun else "delete it, since it ended before its first checkpoint"
            raise InputError(f"{run_dir} already holds a run: choose another --run-dir, or {cure}.")
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.json").touch()
    except OSError as error:
        raise InputError(f"--run-dir {run_dir} cannot be written ({error.strerror}): choose another.") from None
    return run_dir


# --- Training ---------------------------------------------------------------------------------------------------------


def banner(backend: str) -> str:
    """Which of the two games this is, so that nobody mistakes one for the other."""
    if backend == "sim":
        text = (
            f"Simulator smacv2_sim version {SIMULATOR_VERSION}: SMACv2's rules, but NOT StarCraft II, nor its results."
        )
    else:
        text = "StarCraft II through the smacv2 package."
    return f"{'=' * len(text)}\n{text}\n{'=' * len(text)}"


def choose_buffer_device(args: Args, env: SMACv2Sim | StarCraft2, device: torch.device) -> torch.device:
    """Print how much memory the replay takes, and return where it is kept."""
    N = env.num_agents
    step_bytes = 4 * N * env.obs_size + 4 * env.state_size + N * env.num_actions + 8 * N + 4 + 1
    typical, most = (args.buffer_size * (length + 1) * step_bytes for length in (60, env.episode_limit))
    chosen = "cpu" if args.buffer_device == "auto" else args.buffer_device
    if args.buffer_device == "auto" and device.type == "cuda" and most <= torch.cuda.mem_get_info()[0] / 2:
        chosen = "cuda"
    print(
        f"Replay on {chosen}: {step_bytes:,} bytes per step; {args.buffer_size:,} battles of 60 steps take "
        f"{typical / 1e9:.2f} GB, of {env.episode_limit} steps (the limit) {most / 1e9:.2f} GB."
    )
    return torch.device(chosen)


def to_tensors(arrays: dict[str, np.ndarray], device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def to_arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def train(args: Args, stop: threading.Event | None = None) -> dict:
    """Run the experiment, or the rest of it with args.resume, and return what summary.json holds.

    Once `stop` is set, a checkpoint is saved and KeyboardInterrupt raised. Raises InputError for impossible settings,
    OSError if a file cannot be written, FloatingPointError if a loss is not finite.
    """
    check_args(args)
    args.backend = backend = choose_backend(args)  # a resumed run stays with it
    saved = load_checkpoint(args, backend) if args.resume else None
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    about = {
        "backend": backend, "simulator_version": SIMULATOR_VERSION if backend == "sim" else None, "device": str(device),
        "python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__,
        **(check_starcraft2(args.map) if backend == "starcraft2" else {}),
    }  # fmt: skip
    run_dir = make_run_dir(args, backend)
    config = json.dumps({"args": dataclasses.asdict(args), **about}, indent=2)
    write_file(run_dir / "config.json", config)
    print(f"{banner(backend)}\n{args.map}, seed {args.seed}, {device} -> {run_dir}", flush=True)
    writer = SummaryWriter(str(run_dir), purge_step=saved["step"] + 1 if saved else None)
    writer.add_text("backend", banner(backend))
    writer.add_text("config", f"```\n{config}\n```")

    # Networks, replay, environments
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.backends.cudnn.allow_tf32 = False  # on a GPU, learn with the precision that acting has
    torch.manual_seed(args.seed)
    env, eval_env = make_env(args, args.num_envs, args.seed, backend), None
    networks = Networks(env, args).to(device)
    if args.compile:
        compile_networks(networks)
    optimizer = torch.optim.Adam(networks.parameter_groups(), lr=args.learning_rate, capturable=args.cudagraphs)
    play, learn = act, update
    if args.cudagraphs:
        play, learn = CUDAGraphs(act), CUDAGraphs(update)
    replay = Replay(args.buffer_size, choose_buffer_device(args, env, device))
    recorder = Recorder(env)
    hidden = torch.zeros(args.num_envs, env.num_agents, networks.critic.agent.hidden_size, device=device)
    last_action = torch.full((args.num_envs, env.num_agents), -1, device=device)
    step = episodes = updates = 0
    seconds_before, metrics = 0.0, []

    if saved:
        step, episodes, updates = saved["step"], saved["episodes"], saved["updates"]
        seconds_before, metrics = saved["seconds"], saved["metrics"]
        write_metrics(run_dir / "metrics.csv", metrics)  # without the rows of what was played and lost after it
        networks.load_state_dict(saved["networks"])
        for group in saved["optimizer"]["param_groups"]:
            group |= {"lr": args.learning_rate, "capturable": args.cudagraphs}  # the options may be new ones
        optimizer.load_state_dict(saved["optimizer"])
        env.set_state(to_arrays(saved["env"]))
        recorder.arrays, view = to_arrays(saved["recorder"]), to_arrays(saved["view"])
        hidden, last_action = saved["hidden"].to(device), saved["last_action"].to(device)
        if saved["replay"] is not None:
            replay.load_state_dict(saved.pop("replay"))  # pop: it is large, and would stay as long as this function
        torch.set_rng_state(saved["torch_rng"])
        if device.type == "cuda" and saved["cuda_rng"] is not None:
            torch.cuda.set_rng_state(saved["cuda_rng"])
    else:
        obs, info = env.reset()
        view = {"obs": obs, "state": info["state"], "mask": info["action_mask"]}  # (E, N, O), (E, S), (E, N, A)

    start_time, start_step = time.time(), step
    saved_step = step if (run_dir / "checkpoints" / str(step)).exists() else -1

    def save() -> None:
        nonlocal saved_step
        if saved_step == step:
            return
        saved_step = step
        training = {
            "kind": f"{ALGORITHM} checkpoint", "args": dataclasses.asdict(args), **about, "metrics": metrics,
            "step": step, "episodes": episodes, "updates": updates,
            "seconds": seconds_before + time.time() - start_time, "networks": networks.state_dict(),
            "optimizer": optimizer.state_dict(), "env": to_tensors(env.get_state()),
            "recorder": to_tensors(recorder.arrays), "view": to_tensors(view),
            "hidden": hidden, "last_action": last_action, "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
        }  # fmt: skip
        policy = {
            "kind": f"{ALGORITHM} policy", "args": dataclasses.asdict(args), **about, "map": args.map,
            "obs_size": env.obs_size, "num_agents": env.num_agents, "num_actions": env.num_actions,
            "agent": {name: value.cpu() for name, value in networks.critic.agent.state_dict().items()},
        }  # fmt: skip
        save_checkpoint(run_dir, step, training, policy, replay if args.checkpoint_replay and len(replay) else None)

    def test() -> None:
        nonlocal eval_env
        eval_env = eval_env or make_eval_env(args, backend)  # games of its own start when they are needed
        battles = evaluation_seed(args.seed, step)  # the same in a resumed run
        try:
            result = evaluate(networks.critic.agent, eval_env, args.eval_episodes, battles, device)
        except ConnectionError:
            if metrics:
                save()
            raise
        seconds = time.time() - start_time
        metrics.append({
            "step": step, "episodes": episodes, "updates": updates,
            **{name: result[name] for name in ("return_mean", "return_std", "win_rate")},
            "sps": round((step - start_step) / seconds, 1), "seconds": round(seconds_before + seconds, 1),
        })  # fmt: skip
        write_metrics(run_dir / "metrics.csv", metrics)
        for name in ("return_mean", "return_std", "win_rate"):
            writer.add_scalar(f"eval/{name}", result[name], step)
        writer.add_scalar("charts/SPS", metrics[-1]["sps"], step)
        writer.add_scalar("charts/epsilon", epsilon_at(step, args), step)
        if backend == "starcraft2":
            writer.add_scalar("charts/env_restarts", env.restarts + eval_env.restarts, step)
        if args.save_replay:
            eval_env.save_replay(run_dir / "replays", f"step_{step}")
        bar.set_postfix({"return": f"{result['return_mean']:.1f}", "win rate": f"{result['win_rate']:.2f}"})

    bar = tqdm(
        total=args.total_timesteps, initial=step, unit="step", unit_scale=True, dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 60,
    )  # fmt: skip
    if not metrics:
        test()
    while step < args.total_timesteps and not (stop and stop.is_set()):
        # Act in all environments
        recorder.observe(np.arange(args.num_envs), view)
        epsilon = torch.tensor(epsilon_at(step, args), device=device)  # a tensor, for CUDA graphs
        last_action, hidden = play(networks, to_tensors(view, device), last_action, hidden, epsilon)
        action = last_action.cpu().numpy()
        try:
            obs, reward, terminated, truncated, info = env.step(action)
        except ConnectionError:  # StarCraft II failed for good: a resumed run begins new battles anyway
            save()
            raise
        recorder.act(action, reward, terminated)
        view = {"obs": obs, "state": info["state"], "mask": info["action_mask"]}
        step += args.num_envs
        bar.update(args.num_envs)

        lost = np.flatnonzero(info.get("invalid", ()))
        if len(lost):
            recorder.discard(lost)
            hidden[lost], last_action[lost] = 0, -1

        # Store finished battles, and learn
        finished = np.flatnonzero(terminated | truncated)
        if len(finished):
            final = info["final_info"]
            final_view = {"obs": info["final_obs"], "state": final["state"], "mask": final["action_mask"]}
            recorder.observe(finished, {name: array[finished] for name, array in final_view.items()})
            hidden[finished], last_action[finished] = 0, -1
        for e in finished:
            episode = recorder.finish(e)
            replay.add(episode)
            episodes += 1
            writer.add_scalar("charts/episodic_return", episode["reward"].sum(), step)
            if len(replay) >= args.batch_size and episodes % args.episodes_per_update == 0:
                logs = learn(networks, optimizer, replay.sample(args.batch_size, device, args.cudagraphs), args)
                updates += 1
                if not math.isfinite(sum(logs.values())):
                    bar.close()
                    raise FloatingPointError(f"A loss is not finite at step {step}: try a lower --learning-rate.")
                if updates % 25 == 0:
                    for name, value in logs.items():
                        writer.add_scalar(f"losses/{name}", value, step)
            if args.tau == 1 and episodes % args.target_update_interval == 0:
                move_target(networks, 1.0)

        # Test and save
        if step // args.eval_interval > (step - args.num_envs) // args.eval_interval:
            test()
        if step // args.checkpoint_interval > (step - args.num_envs) // args.checkpoint_interval:
            save()

    completed = step >= args.total_timesteps
    if completed and metrics[-1]["step"] < step:
        test()
    save()
    bar.close()
    writer.close()
    for games in (env, eval_env):
        if games is not None:
            games.close()
    if not completed:
        raise KeyboardInterrupt(f"Stopped at step {step:,}. Go on with: python {sys.argv[0]} --resume {run_dir}")
    last = {name: metrics[-1][name] for name in ("return_mean", "return_std", "win_rate")}
    summary = {
        "args": dataclasses.asdict(args), **about, "env_steps": step, "episodes": episodes, "updates": updates,
        "sps": metrics[-1]["sps"], "seconds": metrics[-1]["seconds"], "eval": {"episodes": args.eval_episodes, **last},
    }  # fmt: skip
    write_file(run_dir / "summary.json", json.dumps(summary, indent=2))
    print(f"{step:,} steps: test win rate {last['win_rate']:.2f}, return {last['return_mean']:.2f} -> {run_dir}")
    return summary


def evaluate_policy(args: Args) -> dict:
    """Play args.eval_episodes greedy battles with the agent network of a policy.pt; print and return the result."""
    check_args(args)
    backend = choose_backend(args)
    policy = load_file(policy_file(args.evaluate), "policy")
    if policy["map"] != args.map:
        raise InputError(f"--map is {args.map}, but {args.evaluate} was trained on another: leave --map out.")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    agent = Agent(policy["obs_size"], policy["num_agents"], policy["num_actions"]).to(device)
    agent.load_state_dict(policy["agent"])
    print(banner(backend), flush=True)
    with contextlib.closing(make_eval_env(args, backend)) as env:
        result = evaluate(agent, env, args.eval_episodes, evaluation_seed(args.seed, 2**40), device)
    n, rate = result["episodes"], result["win_rate"]
    low, high = wilson_interval(rate * n, n)
    print(
        f"{args.map}: win rate {rate:.3f} (95 % interval {low:.3f} to {high:.3f}) in {n} battles, return "
        f"{result['return_mean']:.2f}, standard deviation {result['return_std']:.2f}; trained on {policy['backend']}"
    )
    return result


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    stop = threading.Event()
    threading.excepthook = lambda _: None  # TensorBoard's thread fails on a full disk: train() is told, too

    def stop_soon(signum, frame):
        print("\nStopping after this step or test; once more stops at once.", file=sys.stderr)
        stop.set()
        signal.signal(signum, signal.default_int_handler)

    try:
        if args.check_env:
            check_args(args)
            try:
                check_env(args.map)
            except ValueError as error:
                raise InputError(error) from None
            return 0
        if "" in (args.run_dir, args.resume, args.evaluate):
            raise InputError("--run-dir, --resume and --evaluate need a path, not an empty word: leave them out.")
        if args.resume and args.evaluate:
            raise InputError("--resume and --evaluate exclude each other: give one of them.")
        if args.resume or args.evaluate:  # what is not given on the command line is as it was in that run
            training = checkpoint_folder(args.resume or "") / "training.pt"
            file, kind = (policy_file(args.evaluate), "policy") if args.evaluate else (training, "checkpoint")
            saved = load_file(file, kind)["args"]
            options = {field.name for field in dataclasses.fields(Args)} - {"run_dir", "resume", "evaluate"}
            args = tyro.cli(Args, default=Args(**{name: saved[name] for name in options & saved.keys()}))
        if args.evaluate:
            evaluate_policy(args)
        else:
            signal.signal(signal.SIGINT, stop_soon)
            signal.signal(signal.SIGTERM, stop_soon)
            train(args, stop)
    except (InputError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise  # on a CPU PyTorch says it in words only
        print(f"error: out of memory; lower --num-envs, --batch-size or --buffer-size. ({error})", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "Stopped.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
