# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "numpy>=2,<3", "tyro>=0.9,<2", "numba>=0.61", "tensorboard>=2.18", "tqdm>=4.66",
#   "filelock>=3.12", "pillow>=10.1"]
# ///
"""FOP on SMACv2 (Zhang et al. 2021, ICML), one file, top to bottom: maximum entropy by actor and critic.

    python fop_smacv2.py --map protoss_5_vs_5                                         # the paper's run, 10M steps
    python fop_smacv2.py --map terran_5_vs_5 --total-timesteps 500000                 # watch it learn, half an hour
    python fop_smacv2.py --resume runs/NAME                                           # go on after Ctrl-C or a crash
    python fop_smacv2.py --evaluate runs/NAME/policy.pt --eval-episodes 1000          # test what was learnt

Soft actor-critic for a team whose joint policy is the product of its agents' policies. Each agent has an actor pi_i,
which follows softmax(q_i / alpha), q_i the lower of two critics' values of the agent's actions. In each critic a mixer
adds up Q_jt from V(s), the q_i and the advantages q_i - v_i over the soft values v_i, weighted by global state and
joint action; Q_jt learns from the team's reward. A baseline of Soft-QMIX (Chen, Huang, Schneider 2024, arXiv
2406.13930): `diff qmix_smacv2.py fop_smacv2.py` is the method. Alpha falls over 90,000 steps, most of which play nearly
uniformly: only greedy tests show what is learnt.

"(FOP)" marks what is from Zhang et al. or their released code; table, algorithm and appendix numbers are Chen et al.'s.
In shape comments: B episodes of a batch, N agents, A actions, E environments, S state, O observation, H hidden state, K
heads of a mixer; M rows of a batch with t = 0..L, R of them with t < L.
"""

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports, which are slow
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends them without a traceback
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a waiting thread leaves its core to others
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # on matrices this small more gain little, and slow other runs down
    if not Path(__file__).with_name("envs").is_dir():
        sys.exit(f"error: The folder envs/ must stand beside {Path(__file__).name}: copy it, too.")

import copy
import importlib.util
import io
import json
import math
import shlex
import threading
import time
import zipfile
from collections import deque
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs.smacv2_render import Film
from envs.smacv2_sim import SMACv2Sim
from envs.starcraft2 import StarCraft2, check_env, is_installed

ALGORITHM = Path(__file__).stem  # this file's name, by which its runs, checkpoints and policies are known


@dataclass
class Args:
    exp_name: str = ALGORITHM  # name of this experiment, part of the run's name
    map: str = "protoss_5_vs_5"  # protoss, terran or zerg, then the number of allies and enemies
    backend: Literal["auto", "starcraft2", "sim"] = "auto"  # auto: StarCraft II where installed, else the simulator
    env_options: dict[str, bool | int | float | str] = field(default_factory=dict)  # for the game, e.g. enemy_wipe True
    seed: int = 1  # fixes networks, battles, exploration and replay
    cuda: bool = True  # use the GPU if there is one
    track: bool = False  # log to Weights & Biases, too
    wandb_project_name: str = "softqmix"  # its project
    wandb_entity: str | None = None  # its team or user
    run_dir: str | None = None  # this run's folder; default runs/{map}__{exp_name}__{backend}__{seed}__{time}-{process}
    resume: str | None = None  # go on in this run folder; only steps, test and save intervals and device may change
    evaluate: str | None = None  # only evaluate this policy.pt, or that of this run folder
    capture_video: bool = False  # film battles of the last test, on the simulator
    check_env: bool = False  # only look for StarCraft II, play one battle, and print sizes, speed and versions
    total_timesteps: int = 10_050_000  # environment steps of all environments (section 5.3; Table 10 misprints a tenth)
    num_envs: int = 4  # battles stepped as one batch; FOP's code has 1, with as many updates per battle
    episodes_per_update: int = 1  # one update per this many finished battles, whatever num_envs is (FOP)
    batch_size: int = 32  # battles in an update (FOP)
    burn_in: int = 100  # battles in the replay before the first update (Table 10)
    buffer_size: int = 5000  # battles in the replay (Table 10)
    learning_rate: float = 5e-4  # of RMSprop, for actor and critics (Table 10)
    max_grad_norm: float = 10.0  # gradient norm is clipped to this, separately for the actor and each critic
    gamma: float = 0.99  # discount factor
    td_lambda: float = 0.4  # lambda of TD(lambda) (Table 10)
    target_update_interval: int = 200  # episodes between copies of the critics to their targets (Table 10)
    tau: float = 1.0  # below 1: after each update targets move this fraction of the way instead (Algorithm 1)
    alpha_start: float = 0.5  # temperature at step 0, in units of Q_jt (FOP)
    alpha_finish: float = 0.05  # temperature after the annealing (FOP)
    alpha_anneal_time: int = 90_000  # environment steps over which alpha falls linearly (FOP)
    joint_entropy: bool = False  # the targets' entropy is the agents' sum; else their mean, as in FOP's released code
    epsilon_start: float = 1.0  # probability of a random action at step 0 (Table 10)
    epsilon_finish: float = 0.05  # probability of a random action after the annealing (Table 10)
    epsilon_anneal_time: int = 50_000  # environment steps over which epsilon falls linearly (Table 10)
    eval_interval: int = 10_000  # environment steps between evaluations
    eval_episodes: int = 32  # greedy battles in an evaluation; on the simulator its largest divisor up to 64 at a time
    checkpoint_interval: int = 500_000  # environment steps between checkpoints; there is one at the end and on Ctrl-C


RANGES = {"seed": (0, 2**31 - 1), "gamma": (0, 1), "td_lambda": (0, 1), "tau": (1e-9, 1)}
RANGES |= {"epsilon_start": (0, 1), "epsilon_finish": (0, 1)}
MAY_CHANGE = {"total_timesteps", "eval_interval", "checkpoint_interval", "cuda", "capture_video"}  # in a resumed run
MAY_CHANGE |= {"run_dir", "resume", "evaluate", "check_env", "track", "wandb_project_name", "wandb_entity"}
SIZES = ("obs_size", "num_agents", "num_actions")  # of the agent network


def make_env(args: Args, num_envs: int, seed: int) -> SMACv2Sim | StarCraft2:
    """Battles as one batch, behind the interface that envs/__init__.py states; ValueError for a wrong option."""
    if args.backend == "auto":
        args.backend = "starcraft2" if is_installed(args.map) else "sim"
    return {"sim": SMACv2Sim, "starcraft2": StarCraft2}[args.backend](args.map, num_envs, seed, **args.env_options)


# --- Networks (FOP; Table 10) -----------------------------------------------------------------------------------------
class Agent(nn.Module):
    """f^stage1, the agent network: observation, last action, agent id (one-hot) -> values of actions. Shared by all."""

    def __init__(self, obs_size: int, num_agents: int, num_actions: int, hidden_size: int = 64):
        super().__init__()
        self.num_agents, self.num_actions, self.hidden_size = num_agents, num_actions, hidden_size
        self.fc_in = nn.Linear(obs_size + num_actions + num_agents, hidden_size)
        self.gru = nn.GRU(hidden_size, hidden_size)
        self.fc_out = nn.Linear(hidden_size, num_actions)

    def forward(self, obs: torch.Tensor, last_action: torch.Tensor, hidden=None, sizes: list[int] | None = None):
        """obs (M, N, O), last_action (M, N) with -1 for none -> values (M, N, A), hidden states after them (M, N, H).
        To act: a row for each of M = E environments, and the hidden states (E, N, H) that the last call returned.
        To learn: the rows of a batch, sizes[t] of them at time t; hidden states are zero before t = 0."""
        one_hot = (last_action.unsqueeze(-1) == torch.arange(self.num_actions, device=obs.device)).float()  # (M, N, A)
        agent_id = torch.eye(self.num_agents, device=obs.device).expand(len(obs), -1, -1)  # (M, N, N)
        x = F.relu(self.fc_in(torch.cat([obs, one_hot, agent_id], dim=-1))).flatten(0, 1)  # (M*N, H)
        sizes = [n * self.num_agents for n in sizes or [len(obs)]]
        state = x.new_zeros(sizes[0], self.hidden_size) if hidden is None else hidden.flatten(0, 1)
        if x.is_cuda:
            output = self.gru(nn.utils.rnn.PackedSequence(x, torch.tensor(sizes)), state.unsqueeze(0))[0].data
        else:  # the same step by step: on a CPU it takes half as long
            states = []
            for x_t in x.split(sizes):
                state = torch.gru_cell(x_t, state[: len(x_t)], *self.gru.parameters())  # the other episodes have ended
                states.append(state)
            output = torch.cat(states)
        return self.fc_out(output).unflatten(0, obs.shape[:2]), output.unflatten(0, obs.shape[:2])


class Mixer(nn.Module):
    """Q_jt(s, u) = sum_i q_i + V(s) + sum_i (lambda_i(s, u) - 1) (q_i - v_i), with gradient stopped at q_i - v_i.

    lambda_i = sum_k |key_k(s)| sigmoid(agent_ki(s)) sigmoid(action_ki(s, u)) >= 0. The value is that of V(s) + sum_i
    [v_i + lambda_i (q_i - v_i)], but the gradient reaches each q_i with weight 1, as in a sum."""

    def __init__(self, state_size: int, num_agents: int, num_actions: int, embed: int = 32, heads: int = 4):
        super().__init__()
        self.num_actions, self.heads = num_actions, heads
        self.key = nn.Linear(state_size, heads)
        self.agent = nn.Linear(state_size, heads * num_agents)
        self.action = nn.Linear(state_size + num_agents * num_actions, heads * num_agents)
        self.v = nn.Sequential(nn.Linear(state_size, embed), nn.ReLU(), nn.Linear(embed, 1))

    def weight(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """state (R, S), action (R, N) -> lambda (R, N)."""
        one_hot = (action.unsqueeze(-1) == torch.arange(self.num_actions, device=action.device)).float()  # (R, N, A)
        gates = self.agent(state).sigmoid() * self.action(torch.cat([state, one_hot.flatten(1)], dim=1)).sigmoid()
        return (self.key(state).abs().unsqueeze(-1) * gates.unflatten(1, (self.heads, -1))).sum(1)  # over (R, K, N)

    def forward(self, q_i: torch.Tensor, v_i: torch.Tensor, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """q_i, v_i (R, N), state (R, S), action (R, N) -> Q_jt (R,)."""
        correction = (self.weight(state, action) - 1) * (q_i - v_i).detach()
        return (q_i + correction).sum(1) + self.v(state).squeeze(1)


class Critic(nn.Module):
    """q_i of own observation and agent id (one-hot), shared by all agents, and the mixer that makes them Q_jt."""

    def __init__(self, env: SMACv2Sim | StarCraft2, hidden_size: int = 64):
        super().__init__()
        self.fc1 = nn.Linear(env.obs_size + env.num_agents, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)
        self.fc_out = nn.Linear(hidden_size, env.num_actions)
        self.mixer = Mixer(env.state_size, env.num_agents, env.num_actions)

    def forward(self, obs, state, mask, action, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
        """obs (R, N, O), state (R, S), mask (R, N, A), action (R, N) -> q_i of all actions (R, N, A), Q_jt (R,)."""
        agent_id = torch.eye(obs.shape[1], device=obs.device).expand(len(obs), -1, -1)  # (R, N, N)
        x = F.relu(self.fc1(torch.cat([obs, agent_id], dim=-1)))
        q = self.fc_out(F.relu(self.fc2(x)))  # (R, N, A)
        q_i = q.gather(-1, action.unsqueeze(-1)).squeeze(-1)  # (R, N)
        return q, self.mixer(q_i, soft_value(q, mask, alpha), state, action)


class Networks(nn.Module):
    """All networks of a run: the actor, two critics that differ in their initial weights, and their target copies."""

    def __init__(self, env: SMACv2Sim | StarCraft2, args: Args):
        super().__init__()
        self.actor = Agent(env.obs_size, env.num_agents, env.num_actions)  # here its values are the logits of pi_i
        self.critic = nn.ModuleList([Critic(env), Critic(env)])
        self.target = copy.deepcopy(self.critic)

    def parameter_groups(self) -> list[dict]:
        """What RMSprop trains; the gradient norm is clipped for each group by itself."""
        return [{"params": list(network.parameters())} for network in (self.actor, *self.critic)]


def greedy_action(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Decentralised execution: the best available action of the agent network alone, (..., A) -> (...)."""
    return values.masked_fill(~mask, -torch.inf).argmax(-1)


def epsilon_at(step: int, args: Args) -> float:
    """Probability of a random action, annealed linearly from epsilon_start to epsilon_finish (Table 10)."""
    return float(np.interp(step, [0, args.epsilon_anneal_time], [args.epsilon_start, args.epsilon_finish]))


def alpha_at(step: int, args: Args) -> float:
    """Temperature of policy, soft values and targets, annealed linearly from alpha_start to alpha_finish (FOP)."""
    return float(np.interp(step, [0, args.alpha_anneal_time], [args.alpha_start, args.alpha_finish]))


def masked_log_policy(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log softmax over available actions, -inf for the others: logits, mask (..., A) -> (..., A)."""
    return F.log_softmax(logits.masked_fill(~mask, -torch.inf), dim=-1)


def sample_action(log_policy: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Draw from the policy by the Gumbel-max trick, never an unavailable action: (..., A) -> (...)."""
    gumbel = -torch.empty_like(log_policy).exponential_().log()
    return (log_policy + gumbel).masked_fill(~mask, -torch.inf).argmax(-1)


def soft_value(q: torch.Tensor, mask: torch.Tensor, alpha: float) -> torch.Tensor:
    """v_i = alpha log sum exp(q_i / alpha) over available actions, at least their best q_i: (..., A) -> (...)."""
    return alpha * (q.masked_fill(~mask, -torch.inf) / alpha).logsumexp(-1)


@torch.no_grad()
def act(networks: Networks, row: dict[str, torch.Tensor], hidden: torch.Tensor, epsilon: float):
    """With probability epsilon a random available action, else one that the policy draws, independently for each
    environment and agent: actions (E, N), hidden (E, N, H)."""
    logits, hidden = networks.actor(row["obs"], row["last_action"], hidden)  # (E, N, A)
    random_action = torch.rand_like(logits).masked_fill(~row["mask"], -1).argmax(-1)
    explore = torch.rand_like(logits[..., 0]) < epsilon
    own_action = sample_action(masked_log_policy(logits, row["mask"]), row["mask"])
    return torch.where(explore, random_action, own_action).cpu().numpy(), hidden


# --- Learning: an episode of L steps is L + 1 rows, what is seen at time t = 0..L and what led there ------------------
def make_row(obs, info: dict, last_action, reward, terminated) -> dict[str, torch.Tensor]:
    """What all environments show, obs (E, N, O), state (E, S) and mask (E, N, A), and the step that led there:
    last_action (E, N), reward and terminated (E,); at t = 0 they are -1, 0 and False."""
    row = {"obs": obs, "state": info["state"], "mask": info["action_mask"]}
    row |= {"last_action": last_action, "reward": reward, "terminated": terminated}
    return {name: torch.from_numpy(array) for name, array in row.items()}


def sample_batch(replay: deque, batch_size: int, device: torch.device) -> SimpleNamespace:
    """Draw different episodes, all equally likely; their rows stand in order of time, without padding.
    First t = 0 of all B episodes, the longest first, then t = 1 of those that have one, and so on: sizes[t] of each,
    M in all. `now` (R,) are the indices of those with t < L; the row that follows the i-th of these is row B + i."""
    episodes = [replay[i] for i in torch.randperm(len(replay))[:batch_size].tolist()]
    episodes.sort(key=lambda episode: len(episode["reward"]), reverse=True)
    times = [torch.arange(len(episode["reward"])) for episode in episodes]
    t = torch.cat(times)
    order = t.argsort(stable=True)  # applied on the device, below: a GPU gathers faster
    now = torch.cat([time < len(time) - 1 for time in times])[order].nonzero().squeeze(1)
    rows = {key: torch.cat([episode[key] for episode in episodes]).to(device)[order.to(device)] for key in episodes[0]}
    return SimpleNamespace(**rows, now=now.to(device), sizes=t.bincount().tolist())


def td_lambda_targets(reward, terminated, next_q, next_log_policy, sizes, gamma, td_lambda, alpha) -> torch.Tensor:
    """Soft TD(lambda) targets y_t, appendix D's reverse view with the sampled u' (a soft Peng's Q(lambda)):
      y_t = r_t + gamma [Qbar_tot(s_{t+1}, u') - alpha log pi(u' | s_{t+1}) + lambda (y_{t+1} - Qbar_tot(s_{t+1}, u'))]
      y_L = Qbar_tot(s_L, u')
    Columns are (R,), sizes[t] rows of each t < L; log pi is summed over agents. Nothing follows a terminated step."""
    y = reward + gamma * (next_q - alpha * next_log_policy).masked_fill(terminated, 0)
    following = y[:0]  # y_{t+1} of the episodes that have one: the longest, which come first
    for y_t, q in zip(reversed(y.split(sizes)), reversed(next_q.split(sizes)), strict=True):
        y_t[: len(following)] += gamma * td_lambda * (following - q[: len(following)])
        following = y_t
    return y


def compute_losses(networks: Networks, batch, alpha: float, args: Args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L_Q + L_pi, and what to log: both, mean Q_jt, the joint policy's entropy (nats) at t. Of the critics c = 1, 2,
    in means over steps and, in L_pi, over agents:
      L_Q = sum_c mean [Q_jt,c(s_t, u_t) - y_t]^2,  L_pi = mean sum_u pi_i(u) [alpha log pi_i(u) - min_c q_i,c(u)]"""
    B, now = batch.sizes[0], batch.now
    mask, action = batch.mask[now], batch.last_action[B:]  # (R, N, A), (R, N), taken at time t
    next_state, next_mask = batch.state[B:], batch.mask[B:]  # (R, S), (R, N, A)

    logits, _ = networks.actor(batch.obs, batch.last_action, sizes=batch.sizes)  # (M, N, A)
    log_policy = masked_log_policy(logits, batch.mask)
    inputs = (batch.obs[now], batch.state[now], mask, action, alpha)
    (q1, q_jt1), (q2, q_jt2) = (critic(*inputs) for critic in networks.critic)  # (R, N, A), (R,)

    with torch.no_grad():
        next_action = sample_action(log_policy[B:], next_mask)  # (R, N), u'
        next_log_policy = log_policy[B:].gather(-1, next_action.unsqueeze(-1)).sum((1, 2))  # (R,)
        inputs = (batch.obs[B:], next_state, next_mask, next_action, alpha)
        next_q = torch.minimum(*(target(*inputs)[1] for target in networks.target))  # (R,), of the joint values
        columns = (batch.reward[B:], batch.terminated[B:], next_q, next_log_policy)
        entropy_weight = alpha if args.joint_entropy else alpha / action.shape[1]  # of log pi's sum over agents
        y = td_lambda_targets(*columns, batch.sizes[1:], args.gamma, args.td_lambda, entropy_weight)  # (R,)

    loss_q = (q_jt1 - y).square().mean() + (q_jt2 - y).square().mean()
    # In closed form over actions. An agent with one action has log pi = 0 and no gradient: the dead need no mask,
    # and count in the mean.
    policy, log_policy = log_policy[now].exp(), log_policy[now]
    q = torch.minimum(q1, q2).detach()  # (R, N, A), of each agent's own values
    loss_pi = (policy * (alpha * log_policy - q).masked_fill(~mask, 0)).sum(-1).mean()
    entropy = -(policy * log_policy.masked_fill(~mask, 0)).sum((1, 2))  # (R,)
    logs = {"td": loss_q, "policy": loss_pi, "q_tot": q_jt1.mean(), "entropy": entropy.mean()}
    return loss_q + loss_pi, {name: value.detach() for name, value in logs.items()}


def update(networks: Networks, optimizer: torch.optim.RMSprop, batch, alpha: float, args: Args) -> dict:
    """One gradient step. RMSprop works parameter by parameter, so one does for all losses; returns the logs."""
    loss, logs = compute_losses(networks, batch, alpha, args)
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


@torch.no_grad()
def evaluate(agent: Agent, env, episodes: int, seed: list[int], device: torch.device) -> dict[str, float]:
    """Greedy, decentralised episodes: `episodes` / E in each environment, so that short ones do not count for more."""
    E, quota = env.num_envs, episodes // env.num_envs
    obs, info = env.reset(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))
    hidden = torch.zeros(E, env.num_agents, agent.hidden_size, device=device)
    last_action = torch.full((E, env.num_agents), -1, device=device)
    returns, running_return, wins = [[] for _ in range(E)], np.zeros(E), 0
    while min(map(len, returns)) < quota:
        values, hidden = agent(torch.from_numpy(obs).to(device), last_action, hidden)
        last_action = greedy_action(values, torch.from_numpy(info["action_mask"]).to(device))
        obs, reward, terminated, truncated, info = env.step(last_action.cpu().numpy())
        running_return += reward
        for e in np.flatnonzero(terminated | truncated):
            if len(returns[e]) < quota:
                returns[e].append(running_return[e])
                wins += int(info["final_info"]["battle_won"][e])
        for e in np.flatnonzero(terminated | truncated | info.get("invalid", False)):  # invalid: lost with its game
            running_return[e], hidden[e], last_action[e] = 0, 0, -1
    values = np.concatenate(returns)
    std = float(values.std(ddof=1)) if episodes > 1 else math.nan
    return {"return_mean": float(values.mean()), "return_std": std, "win_rate": wins / episodes}


# --- A run: what can go wrong, files, the training loop ---------------------------------------------------------------
class InputError(ValueError):
    """Something the user can put right, told in one sentence. On the command line: exit code 2, no traceback."""


def write(path: Path, content: str | dict) -> None:
    """Text or tensors, under a temporary name and renamed, so that no file is ever left half written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(content) if isinstance(content, str) else torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # PyTorch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written; no space or permission? Older files are intact. ({error})") from error


def load(path: str, kind: str) -> dict:
    """A run folder's checkpoint.pt or policy.pt, or a policy's file; InputError if missing, damaged or another's."""
    file = Path(path, f"{kind}.pt") if os.path.isdir(path) or kind == "checkpoint" else Path(path)
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        found = f"it is {saved['kind']}" if zipfile.ZipFile(file).testzip() is None else "a part of it is damaged"
    except Exception:  # whatever a damaged or foreign file makes the unpickler raise
        found = "it is damaged, foreign, or too large for memory" if os.path.exists(file) else "there is no such file"
    if found != f"it is {ALGORITHM} {kind} 2":
        raise InputError(f"{file} holds no {kind} of this version of {ALGORITHM}: {found}; give a folder with one.")
    return saved


def prepare(args: Args) -> tuple:
    """Both environments, device, what was saved; InputError for whatever the user got wrong, before a file is made."""
    for name, value in vars(args).items():
        low, high = RANGES.get(name, (1, 2**31 - 1) if type(value) is int else (1e-9, 1e6))
        if type(value) in (int, float) and not low <= value <= high:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be in [{low:g}, {high:g}].")
        if value == "" or (type(value) is str and not value.isprintable()):
            raise InputError(f"--{name.replace('_', '-')} is {value!a}: empty, or beyond this locale's letters.")
    if not args.batch_size <= args.burn_in <= args.buffer_size:
        sizes = f"between --batch-size {args.batch_size} and --buffer-size {args.buffer_size}"
        raise InputError(f"--burn-in {args.burn_in} is not {sizes}: change one of the three.")
    if {"map_name", "num_envs", "seed"} & args.env_options.keys():
        raise InputError("--env-options cannot set map_name, num_envs or seed: use --map, --num-envs or --seed.")
    if args.track and not importlib.util.find_spec("wandb"):
        raise InputError("--track needs the package wandb: pip install wandb, or leave the option out.")
    if (args.run_dir, args.resume, args.evaluate).count(None) < 2:
        raise InputError("--run-dir, --resume and --evaluate exclude each other: give one of them.")
    saved = load(args.resume, "checkpoint") if args.resume else args.evaluate and load(args.evaluate, "policy")
    for name in sorted(vars(args).keys() - MAY_CHANGE) if args.resume else ():
        if (ours := getattr(args, name)) != (theirs := saved["args"].get(name, ours)):
            raise InputError(f"{name} is {ours}, but was {theirs} in {args.resume}: leave the option out.")
    if args.resume and saved["step"] >= args.total_timesteps and Path(args.resume, "summary.json").exists():
        raise InputError(f"{args.resume} has made its {saved['step']} steps: give more --total-timesteps.")
    try:
        if args.check_env:
            sys.exit(check_env(args.map, **args.env_options))  # which prints what there is
        env = make_env(args, args.num_envs, args.seed)
        most = 64 if args.backend == "sim" else args.num_envs  # each of StarCraft II's is a game of its own
        eval_env = make_env(args, max(n for n in range(1, most + 1) if args.eval_episodes % n == 0), args.seed)
        eval_env = Film(eval_env, battles=3) if args.capture_video else eval_env
        if saved and any(saved[name] != getattr(env, name) for name in SIZES):
            raise InputError(f"{args.resume or args.evaluate} was trained in a game of other sizes than {env.name}'s.")
        if args.resume:
            env.set_state({name: value.numpy() for name, value in saved["env"].items()})
    except ValueError as error:
        raise InputError(error) from None
    return env, eval_env, torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu"), saved


def train(args: Args, stop: threading.Event | None = None) -> dict:
    """Run the experiment, or the rest of it with args.resume, and return what summary.json holds.
    Once `stop` is set, it saves a checkpoint and raises KeyboardInterrupt. Raises InputError for impossible settings,
    OSError if a file cannot be written or a game is lost for good, FloatingPointError if a loss is not finite."""
    env, eval_env, device, saved = prepare(args)
    name = f"{env.name}__{args.exp_name}__{env.backend}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    run_dir = Path(args.resume or args.run_dir or f"runs/{name}")
    try:
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume or args.run_dir))
        (lock := FileLock(run_dir / "run.lock")).acquire(timeout=0)  # released however this process ends
    except OSError as error:
        raise InputError(f"{run_dir} cannot be used: {error.strerror or 'another process trains in it'}.") from None
    if not saved and {"config.json", "metrics.csv", "checkpoint.pt"} & set(os.listdir(run_dir)):
        raise InputError(f"{run_dir} already holds a run: choose another --run-dir (--resume needs its checkpoint.pt).")
    about = {"algorithm": ALGORITHM, **env.about, "device": str(device), "python": sys.version.split()[0]}
    about |= {"torch": str(torch.__version__), "numpy": np.__version__, "args": asdict(args), "map": env.name}
    about |= {name: getattr(env, name) for name in SIZES}
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False  # a GRU in float32 on a GPU, too
    torch.manual_seed(args.seed + (saved["step"] if saved else 0))  # on a GPU a resumed run draws new random numbers
    networks = Networks(env, args).to(device)
    optimizer = torch.optim.RMSprop(networks.parameter_groups(), lr=args.learning_rate, alpha=0.99, eps=1e-5)
    replay: deque[dict[str, torch.Tensor]] = deque(maxlen=args.buffer_size)
    E, N = args.num_envs, env.num_agents
    if saved:
        step, episodes, updates, seconds, metrics, row, played, hidden = saved["loop"]
        networks.load_state_dict(saved["networks"])
        optimizer.load_state_dict(saved["optimizer"])
        columns = (column.split(saved["lengths"]) for column in saved.pop("replay").values())
        replay.extend(dict(zip(row, (x.clone() for x in rows), strict=True)) for rows in zip(*columns, strict=True))
        torch.set_rng_state(saved["rng"])
    else:
        step, episodes, updates, seconds, metrics = 0, 0, 0, 0.0, []
        played = [[] for _ in range(E)]  # the rows of the episodes that have not ended
        row = make_row(*env.reset(), np.full((E, N), -1), np.zeros(E, np.float32), np.zeros(E, bool))
        hidden = torch.zeros(E, N, networks.actor.hidden_size)
    if args.track:
        names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "id": run_dir.name}
        importlib.import_module("wandb").init(**names, config=about, sync_tensorboard=True, resume="allow")
    write(run_dir / (f"resumed_{step}.json" if saved else "config.json"), json.dumps(about, indent=2))
    writer = SummaryWriter(str(run_dir), purge_step=step + 1 if saved else None)
    writer.add_text("config", f"{env.title}\n```\n{json.dumps(about, indent=2)}\n```")
    print(f"{env.title}\n{env.name}, seed {args.seed}, {device}, from step {step:,} -> {run_dir}", flush=True)
    every = 0.5 if sys.stderr.isatty() else 60  # seconds
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", unit_scale=True, miniters=1, mininterval=every)
    start, failure = time.monotonic() - seconds, None
    while True:
        # Test, and save for --resume and --evaluate: at intervals and at the end
        done, tested = step >= args.total_timesteps, metrics and metrics[-1]["step"] == step
        if done or (not tested and step // args.eval_interval > (step - E) // args.eval_interval):  # at step 0, too
            try:
                result = evaluate(networks.actor, eval_env, args.eval_episodes, [args.seed, step], device)
                seconds = time.monotonic() - start
                times = {"sps": round(step / seconds, 1), "seconds": round(seconds, 1)}
                line = {"step": step, "episodes": episodes, "updates": updates} | result | times
                metrics = [*(metrics[:-1] if tested else metrics), line]  # a repeated last test replaces the first
                lines = [metrics[0], *(line.values() for line in metrics)]
                write(run_dir / "metrics.csv", "".join(",".join(map(str, line)) + "\n" for line in lines))
                charts = {"SPS": times["sps"], "epsilon": epsilon_at(step, args), "alpha": alpha_at(step, args)}
                charts["env_restarts"] = env.restarts + eval_env.restarts
                for name, value in (charts | result).items():
                    writer.add_scalar(f"{'charts' if name in charts else 'eval'}/{name}", value, step)
                bar.set_postfix_str(f"return {result['return_mean']:.1f}, wins {result['win_rate']:.2f}", refresh=False)
            except ConnectionError as error:  # StarCraft II failed for good
                failure = error
        ends = done or failure or (stop and stop.is_set())
        if ends or step // args.checkpoint_interval > (step - E) // args.checkpoint_interval:
            write(run_dir / "checkpoint.pt", {
                "kind": f"{ALGORITHM} checkpoint 2", **about, "step": step, "rng": torch.get_rng_state(),
                "loop": [step, episodes, updates, time.monotonic() - start, metrics, row, played, hidden],
                "networks": networks.state_dict(), "optimizer": optimizer.state_dict(),
                "env": {name: torch.from_numpy(value) for name, value in env.get_state().items()},
                "lengths": [len(episode["reward"]) for episode in replay],
                "replay": {name: torch.cat([episode[name] for episode in replay]) for name in (row if replay else ())},
            })  # fmt: skip
            agent = {name: value.cpu() for name, value in networks.actor.state_dict().items()}
            write(run_dir / "policy.pt", {"kind": f"{ALGORITHM} policy 2", **about, "step": step, "agent": agent})
        if ends:
            break

        # Act in all environments
        inputs = {name: column.to(device) for name, column in row.items()}
        action, hidden = act(networks, inputs, hidden.to(device), epsilon_at(step, args))
        try:
            obs, reward, terminated, truncated, info = env.step(action)
        except ConnectionError as error:  # a resumed run begins new battles
            failure = error
            continue
        step += E
        bar.update(E)
        for e in range(E):
            played[e].append([column[e] for column in row.values()])
        row = make_row(obs, info, action, reward, terminated)

        # Store finished episodes, and learn
        for e in np.flatnonzero(terminated | truncated):
            last = make_row(info["final_obs"], info["final_info"], action, reward, terminated)
            played[e].append([column[e] for column in last.values()])
            replay.append({name: torch.stack(rows) for name, *rows in zip(row, *played[e], strict=True)})  # columns
            episodes += 1
            writer.add_scalar("charts/episodic_return", replay[-1]["reward"].sum(), step)
            if len(replay) >= args.burn_in and episodes % args.episodes_per_update == 0:
                batch = sample_batch(replay, args.batch_size, device)
                logs = update(networks, optimizer, batch, alpha_at(step, args), args)
                updates += 1
                if not math.isfinite(sum(logs.values())):
                    raise FloatingPointError(f"A loss is not finite at step {step}: try a lower --learning-rate.")
                for name, value in logs.items() if updates % 25 == 0 else ():
                    writer.add_scalar(f"losses/{name}", value, step)
            if args.tau == 1 and episodes % args.target_update_interval == 0:
                move_target(networks, 1.0)
        for e in np.flatnonzero(terminated | truncated | info.get("invalid", False)):  # invalid: lost with its game
            played[e], hidden[e] = [], 0
            row["last_action"][e], row["reward"][e], row["terminated"][e] = -1, 0, False
        if updates == 0:
            bar.set_postfix_str(f"{len(replay)} of {args.burn_in} battles until the first update", refresh=False)

    bar.close()
    if done and not failure:
        summary = {**about, "env_steps": step, **metrics[-1], "eval": {"episodes": args.eval_episodes, **result}}
        write(run_dir / "summary.json", json.dumps(summary, indent=2))
        if args.capture_video:
            eval_env.save_film(run_dir, step)
    for end in (writer.close, env.close, eval_env.close, lock.release):
        end()
    if failure or not done:
        raise failure or KeyboardInterrupt("Resume by " + shlex.join(["python", sys.argv[0], "--resume", str(run_dir)]))
    print(f"{step:,} steps: test win rate {result['win_rate']:.2f}, return {result['return_mean']:.2f} -> {run_dir}")
    if updates == 0:
        print(f"Nothing was learnt: the first update waits for {args.burn_in} battles, and {episodes} were played.")
    return summary


def evaluate_policy(args: Args) -> None:
    """Play args.eval_episodes greedy battles with the agent network of a policy.pt, and print the result."""
    _, env, device, policy = prepare(args)
    agent, n = Agent(*(policy[name] for name in SIZES)).to(device), args.eval_episodes
    agent.load_state_dict(policy["agent"])
    result = evaluate(agent, env, n, [args.seed, 2**40], device)
    p, z = result["win_rate"], 1.959964  # Wilson's 95 % interval of a proportion
    centre, half = (n * p + z * z / 2) / (n + z * z), z * math.sqrt(n * p * (1 - p) + z * z / 4) / (n + z * z)
    print(f"{env.title}\n{env.name}: win rate {p:.3f} (95 % interval {centre - half:.3f} to {centre + half:.3f}),")
    print(f"return {result['return_mean']:.2f} +- {result['return_std']:.2f} in {n} battles")
    if args.capture_video:
        env.save_film(args.evaluate, policy["step"])
    env.close()


class Unbroken(io.FileIO):
    """Standard output or error whose reader, a pipe or terminal, may go away without ending the training."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def main() -> int:
    """The command line. Exit codes: 2 for what the user can put right, 130 after Ctrl-C, 1 for other failures."""
    stop = threading.Event()
    threading.excepthook = lambda _: None  # TensorBoard's thread fails on a full disk: train() is told, too
    try:
        args = tyro.cli(Args, description=__doc__)
        if path := args.resume or args.evaluate:  # what is not given is as it was in that run
            known = load(path, "checkpoint" if args.resume else "policy")["args"]
            known |= dict.fromkeys(["run_dir", "resume", "evaluate"])
            args = tyro.cli(Args, default=Args(**known | {"env_options": {}}))  # tyro takes no words for a filled one
            args.env_options = known["env_options"] | args.env_options
        if args.evaluate or args.check_env:  # the latter ends in prepare()
            evaluate_policy(args)
        else:
            for signum in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
                if signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores SIGHUP
                    signal.signal(signum, lambda *_: stop.set())  # ends after this step or test, with a checkpoint
            train(args, stop)
    except KeyboardInterrupt as interrupt:
        print(interrupt, file=sys.stderr)
        return 130
    except (OSError, InputError, FloatingPointError, MemoryError, RuntimeError) as error:
        memory = isinstance(error, MemoryError) or "allocate" in str(error)  # PyTorch raises a RuntimeError
        if isinstance(error, RuntimeError) and not memory:
            raise
        advice = "out of memory; lower --num-envs, --batch-size or --buffer-size: " if memory else ""
        tqdm.write(f"error: {advice}{error}", file=sys.stderr)  # not within the bar
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    for fd, name in ((1, "stdout"), (2, "stderr")):
        fd = fd if getattr(sys, name) else os.open(os.devnull, os.O_WRONLY)  # closed, as by >&- in a shell
        buffer = io.BufferedWriter(Unbroken(fd, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, errors="backslashreplace", line_buffering=True))
    sys.exit(main())
