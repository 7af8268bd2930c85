# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "numpy>=2,<3", "tyro>=0.9,<2", "numba>=0.61", "tensorboard>=2.18", "tqdm>=4.66",
#   "filelock>=3.12", "pillow>=10.1"]
# ///
"""MAPPO on SMACv2 (Yu et al. 2021, arXiv 2103.01955), one file, top to bottom: on-policy, beside softqmix_smacv2.py.

    python mappo_smacv2.py --map protoss_5_vs_5                                       # the paper's run, 10M steps
    python mappo_smacv2.py --map terran_5_vs_5 --total-timesteps 200000               # watch it learn, three minutes
    python mappo_smacv2.py --resume runs/NAME                                         # go on after Ctrl-C or a crash
    python mappo_smacv2.py --evaluate runs/NAME/policy.pt --eval-episodes 1000        # test what was learnt

PPO for a team: one recurrent policy, shared by all agents, each of which sees its own observation only, and a recurrent
critic that sees the global state, too. Collect a rollout, estimate advantages by GAE, take five clipped gradient steps
on it, throw it away. The on-policy baseline of Soft-QMIX (Chen, Huang, Schneider 2024, arXiv 2406.13930).

"Yu" is Yu et al.; table numbers are Chen et al.'s. In shape comments: E environments, T steps of a rollout, C of a
chunk, N agents, A actions, S state, O observation, H hidden state; M = E T / C chunks of a rollout, and their R = C M
rows in order of the time within a chunk: the first rows of all chunks, then all second ones, and so on.
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

import importlib.util
import io
import json
import math
import shlex
import threading
import time
import zipfile
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
    seed: int = 1  # fixes networks, battles and sampled actions
    cuda: bool = True  # use the GPU if there is one
    track: bool = False  # log to Weights & Biases, too
    wandb_project_name: str = "softqmix"  # its project
    wandb_entity: str | None = None  # its team or user
    run_dir: str | None = None  # this run's folder; default runs/{map}__{exp_name}__{backend}__{seed}__{time}-{process}
    resume: str | None = None  # go on in this run folder; only steps, test and save intervals and device may change
    evaluate: str | None = None  # only evaluate this policy.pt, or that of this run folder
    capture_video: bool = False  # film battles of the last test, on the simulator
    check_env: bool = False  # only look for StarCraft II, play one battle, and print sizes, speed and versions
    total_timesteps: int = 10_050_000  # environment steps of all environments together (section 5.3)
    num_envs: int = 8  # battles stepped as one batch (Table 6)
    num_steps: int = 400  # of each environment in a rollout (Table 6); the run's last, unfinished rollout is not learnt
    chunk_length: int = 8  # steps over which gradients flow back in time (Table 6)
    update_epochs: int = 5  # gradient steps on a rollout, each on all of it (Table 6)
    learning_rate: float = 5e-4  # of Adam, for the actor (Table 6)
    critic_learning_rate: float = 1e-3  # of Adam, for the critic (Table 6)
    anneal_steps: int | None = None  # steps over which both rates fall linearly to 0 (Table 6); default total_timesteps
    max_grad_norm: float = 10.0  # gradient norm is clipped to this, separately for actor and critic
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    clip_coef: float = 0.2  # epsilon: how far a ratio may move from 1, and a (normalised) value from the old one
    ent_coef: float = 0.01  # weight of the policy's entropy
    huber_delta: float = 10.0  # errors of the (normalised) values count linearly beyond this
    death_masking: bool = True  # of an agent without a choice (a dead one) the critic sees nothing but its id (Yu)
    input_norm: bool = True  # LayerNorm on the inputs of both networks
    eval_interval: int = 10_000  # environment steps between evaluations
    eval_episodes: int = 32  # greedy battles in an evaluation; on the simulator its largest divisor up to 64 at a time
    checkpoint_interval: int = 500_000  # environment steps between checkpoints; there is one at the end and on Ctrl-C


RANGES = {"seed": (0, 2**31 - 1), "gamma": (0, 1), "gae_lambda": (0, 1), "clip_coef": (1e-9, 1), "ent_coef": (0, 1e6)}
MAY_CHANGE = {"total_timesteps", "eval_interval", "checkpoint_interval", "cuda", "capture_video"}  # in a resumed run
MAY_CHANGE |= {"run_dir", "resume", "evaluate", "check_env", "track", "wandb_project_name", "wandb_entity"}
SIZES = ("obs_size", "num_agents", "num_actions")  # of the agent network


def make_env(args: Args, num_envs: int, seed: int) -> SMACv2Sim | StarCraft2:
    """Battles as one batch, behind the interface that envs/__init__.py states; ValueError for a wrong option."""
    if args.backend == "auto":
        args.backend = "starcraft2" if is_installed(args.map) else "sim"
    return {"sim": SMACv2Sim, "starcraft2": StarCraft2}[args.backend](args.map, num_envs, seed, **args.env_options)


# --- Networks (Yu; Table 6) -------------------------------------------------------------------------------------------
class Recurrent(nn.Module):
    """LayerNorm -> [Linear, ReLU, LayerNorm] x 2 -> GRU -> LayerNorm -> Linear: an actor or a critic for all agents."""

    def __init__(self, features: int, num_agents: int, output_size: int, gain: float, input_norm: bool):
        super().__init__()
        self.hidden_size = hidden_size = 64
        self.register_buffer("input_norm", torch.tensor(input_norm))  # a policy.pt says by itself which network it is
        self.norm_in = nn.LayerNorm(features + num_agents)
        self.fc1, self.norm1 = nn.Linear(features + num_agents, hidden_size), nn.LayerNorm(hidden_size)
        self.fc2, self.norm2 = nn.Linear(hidden_size, hidden_size), nn.LayerNorm(hidden_size)
        self.gru, self.norm3 = nn.GRU(hidden_size, hidden_size), nn.LayerNorm(hidden_size)
        self.fc_out = nn.Linear(hidden_size, output_size)
        for layer, layer_gain in ((self.fc1, 2**0.5), (self.fc2, 2**0.5), (self.gru, 1), (self.fc_out, gain)):
            for name, parameter in layer.named_parameters():
                nn.init.zeros_(parameter) if "bias" in name else nn.init.orthogonal_(parameter, layer_gain)

    def unroll(self, x: torch.Tensor, hidden: torch.Tensor | None, first: torch.Tensor | None):
        """x (R, N, features), hidden (M, N, H) before the first of R / M steps -> output (R, N, ...), hidden after all.
        first (R,): an episode begins with this row, so what came before is forgotten."""
        hidden = x.new_zeros(*x.shape[:2], self.hidden_size) if hidden is None else hidden  # of one first step
        x = torch.cat([x, torch.eye(x.shape[1], device=x.device).expand(len(x), -1, -1)], dim=-1)  # agent ids (R, N, N)
        x = self.norm_in(x) if self.input_norm else x
        x = self.norm1(F.relu(self.fc1(x)))
        x = self.norm2(F.relu(self.fc2(x)))
        M, states = len(hidden), []
        for t, x_t in enumerate(x.split(M)):
            if first is not None:
                hidden = hidden.masked_fill(first[t * M : (t + 1) * M, None, None], 0)
            hidden = torch.gru_cell(x_t.flatten(0, 1), hidden.flatten(0, 1), *self.gru.parameters()).view_as(hidden)
            states.append(hidden)
        return self.fc_out(self.norm3(torch.cat(states))), hidden


class Agent(Recurrent):
    """The actor pi: own observation and agent id (one-hot) -> a logit for each action."""

    def __init__(self, obs_size: int, num_agents: int, num_actions: int, input_norm: bool = True):
        super().__init__(obs_size, num_agents, num_actions, 0.01, input_norm)

    def forward(self, obs: torch.Tensor, last_action=None, hidden: torch.Tensor | None = None, first=None):
        """obs (R, N, O), hidden (M, N, H) or None -> logits (R, N, A), hidden. The last action is not used."""
        return self.unroll(obs, hidden, first)


class Critic(Recurrent):
    """V: global state, own observation and agent id -> the (normalised) return that awaits the team."""

    def __init__(self, env: SMACv2Sim | StarCraft2, args: Args):
        super().__init__(env.state_size + env.obs_size, env.num_agents, 1, 1.0, args.input_norm)
        self.death_masking = args.death_masking

    def forward(self, obs, state, mask, hidden: torch.Tensor, first: torch.Tensor | None = None):
        """obs (R, N, O), state (R, S), mask (R, N, A), hidden (M, N, H) -> values (R, N), hidden."""
        x = torch.cat([state.unsqueeze(1).expand(-1, obs.shape[1], -1), obs], dim=-1)  # (R, N, S + O)
        if self.death_masking:
            x = x.masked_fill(~has_choice(mask).unsqueeze(-1), 0)
        value, hidden = self.unroll(x, hidden, first)
        return value.squeeze(-1), hidden


class ValueNorm(nn.Module):
    """Mean and standard deviation of all returns so far, the older ones slowly fading: the critic's unit (Yu)."""

    def __init__(self, beta: float = 0.99999):
        super().__init__()
        self.beta = beta
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))  # of 1, G, G^2; the first unbiases

    def update(self, returns: torch.Tensor) -> None:
        returns = returns.double()
        self.sums.lerp_(torch.stack([returns.new_ones(()), returns.mean(), returns.square().mean()]), 1 - self.beta)

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation; 0 and .1 before the first update."""
        mean, square = self.sums[1:] / self.sums[0].clamp(min=1e-12)
        return mean.float(), (square - mean.square()).clamp(min=0.01).sqrt().float()

    def normalise(self, returns: torch.Tensor) -> torch.Tensor:
        mean, std = self.statistics()
        return (returns - mean) / std

    def denormalise(self, values: torch.Tensor) -> torch.Tensor:
        mean, std = self.statistics()
        return values * std + mean


class Networks(nn.Module):
    """All networks of a run: actor and critic, without a weight in common, and the statistics of returns."""

    def __init__(self, env: SMACv2Sim | StarCraft2, args: Args):
        super().__init__()
        self.actor = Agent(env.obs_size, env.num_agents, env.num_actions, args.input_norm)
        self.critic = Critic(env, args)
        self.value_norm = ValueNorm()

    def parameter_groups(self) -> list[dict]:
        """What Adam trains; the gradient norm is clipped for each group by itself."""
        return [{"params": list(self.actor.parameters())}, {"params": list(self.critic.parameters())}]


def has_choice(mask: torch.Tensor) -> torch.Tensor:
    """Agents with more than one available action. On SMACv2: those alive. (..., A) -> (...)."""
    return mask.sum(-1) > 1


def greedy_action(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Decentralised execution: the best available action of the agent network alone, (..., A) -> (...)."""
    return values.masked_fill(~mask, -torch.inf).argmax(-1)


def masked_log_policy(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log softmax over available actions, -inf for the others: logits, mask (..., A) -> (..., A)."""
    return F.log_softmax(logits.masked_fill(~mask, -torch.inf), dim=-1)


def sample_action(log_policy: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Draw from the policy by the Gumbel-max trick, never an unavailable action: (..., A) -> (...)."""
    gumbel = -torch.empty_like(log_policy).exponential_().log()
    return (log_policy + gumbel).masked_fill(~mask, -torch.inf).argmax(-1)


@torch.no_grad()
def act(networks: Networks, row: dict[str, torch.Tensor], hidden: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """Sample, independently for each environment and agent. Returns what the rollout keeps of it: action, log pi and
    value, each (E, N), and the hidden states (2, E, N, H) of actor and critic before; then the hidden states after."""
    logits, actor_hidden = networks.actor(row["obs"], None, hidden[0], row["first"])  # (E, N, A)
    log_policy = masked_log_policy(logits, row["mask"])
    action = sample_action(log_policy, row["mask"])
    value, critic_hidden = networks.critic(row["obs"], row["state"], row["mask"], hidden[1], row["first"])
    log_prob = log_policy.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    decision = {"action": action, "log_prob": log_prob, "value": value, "hidden": hidden}
    return decision, torch.stack([actor_hidden, critic_hidden])


@torch.no_grad()
def value_of(networks: Networks, row: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """The critic's (normalised) values (E, N) of what environments show."""
    return networks.critic(row["obs"], row["state"], row["mask"], hidden[1], row["first"])[0]


# --- Learning: a rollout is T rows, what was seen, done and got at t = 0..T-1 in all environments ---------------------
def make_row(obs, info: dict, first, device: torch.device) -> dict[str, torch.Tensor]:
    """What all environments show, obs (E, N, O), state (E, S) and mask (E, N, A), and where an episode begins (E,)."""
    row = {"obs": obs, "state": info["state"], "mask": info["action_mask"], "first": first}
    return {name: torch.from_numpy(array).to(device) for name, array in row.items()}


def forget(rollout: list[dict[str, torch.Tensor]], e: int) -> None:
    """Environment e lost its game in the last step: nothing of that episode may be learnt."""
    for row in reversed(rollout):
        row["valid"][e] = False
        if row["first"][e]:
            break


def gae(reward, terminated, done, value, next_value, gamma: float, gae_lambda: float) -> torch.Tensor:
    """Generalised advantage estimation (T, E, N), for each environment and agent:
      A_t = delta_t + gamma lambda (1 - done_t) A_{t+1}
      delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)
    reward, terminated, done (T, E), value and next_value (T, E, N). done_t: step t was an episode's last; if it was cut
    off, not terminated, next_value_t is the value of its final view."""
    advantage = reward.unsqueeze(-1) + gamma * next_value.masked_fill(terminated.unsqueeze(-1), 0) - value  # delta
    for t in reversed(range(len(reward) - 1)):
        advantage[t] += gamma * gae_lambda * advantage[t + 1].masked_fill(done[t].unsqueeze(-1), 0)
    return advantage


@torch.no_grad()
def make_batch(networks: Networks, rollout: list[dict], last_value: torch.Tensor, args: Args) -> SimpleNamespace:
    """Advantages and returns of a rollout, and all of it cut into chunks; last_value (E, N) is that of view T."""
    x = SimpleNamespace(**{name: torch.stack([row[name] for row in rollout]) for name in rollout[0]})  # (T, E, ...)
    values = networks.value_norm.denormalise(torch.cat([x.value, last_value.unsqueeze(0)]))  # (T + 1, E, N)
    final_value = networks.value_norm.denormalise(x.final_value)
    next_value = torch.where(x.truncated.unsqueeze(-1), final_value, values[1:])
    advantage = gae(x.reward, x.terminated, x.done, values[:-1], next_value, args.gamma, args.gae_lambda)  # (T, E, N)
    returns, valid = advantage + values[:-1], x.valid.unsqueeze(-1).expand_as(advantage)
    active = has_choice(x.mask) & valid
    chosen = advantage[active]
    columns = {name: getattr(x, name) for name in ("obs", "state", "mask", "first", "action", "log_prob", "value")}
    columns |= {"returns": returns, "valid": valid, "active": active}
    columns["advantage"] = ((advantage - chosen.mean()) / (chosen.std(correction=0) + 1e-5)).masked_fill(~active, 0)
    C = args.chunk_length  # (T, E, ...) -> (T/C, C, E, ...) -> (C, T/C, E, ...) -> (R, ...)
    batch = {name: c.unflatten(0, (-1, C)).transpose(0, 1).flatten(0, 2) for name, c in columns.items()}
    hidden = x.hidden[::C].transpose(0, 1).flatten(1, 2)  # (T, 2, E, N, H) -> (2, M, N, H)
    explained = 1 - advantage[valid].var(correction=0) / returns[valid].var(correction=0).clamp(min=1e-12)
    return SimpleNamespace(**batch, hidden=hidden, explained_variance=explained)


def compute_losses(networks: Networks, batch, args: Args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped losses of policy and values, and what to log: these, entropy (nats), distance to the old policy."""
    logits, _ = networks.actor(batch.obs, None, batch.hidden[0], batch.first)  # (R, N, A)
    log_policy = masked_log_policy(logits, batch.mask)
    log_ratio = log_policy.gather(-1, batch.action.unsqueeze(-1)).squeeze(-1) - batch.log_prob  # (R, N)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    surrogate = torch.minimum(ratio * batch.advantage, clipped * batch.advantage)
    entropy = -(log_policy.exp() * log_policy.masked_fill(~batch.mask, 0)).sum(-1)

    value, _ = networks.critic(batch.obs, batch.state, batch.mask, batch.hidden[1], batch.first)  # (R, N)
    y = networks.value_norm.normalise(batch.returns)
    clipped_value = batch.value + (value - batch.value).clamp(-args.clip_coef, args.clip_coef)
    errors = [F.huber_loss(v, y, reduction="none", delta=args.huber_delta) for v in (value, clipped_value)]

    def mean(x, where):
        return (x * where).sum() / where.sum().clamp(min=1)

    logs = {
        "policy": -mean(surrogate, batch.active),
        "value": mean(torch.maximum(*errors), batch.valid),  # of dead agents, too (Table 6)
        "entropy": mean(entropy, batch.active),
        "approx_kl": mean(ratio - 1 - log_ratio, batch.active),
        "clipfrac": mean((ratio - 1).abs() > args.clip_coef, batch.active),
    }
    loss = logs["policy"] - args.ent_coef * logs["entropy"] + logs["value"]
    return loss, {name: value.detach() for name, value in logs.items()}


def annealing(step: int, args: Args) -> float:
    """Factor of both learning rates in the iteration to which this step belongs: 1 in the first, linearly down to 0."""
    return max(0.0, 1 - (step - step % (args.num_envs * args.num_steps)) / args.anneal_steps)


def update(networks: Networks, optimizer: torch.optim.Adam, batch, factor: float, args: Args) -> dict:
    """All gradient steps on a rollout. Actor and critic share nothing, and Adam works parameter by parameter, so one
    optimiser does for both losses. Returns the logs of the last step."""
    for group, rate in zip(optimizer.param_groups, (args.learning_rate, args.critic_learning_rate), strict=True):
        group["lr"] = rate * factor
    for _ in range(args.update_epochs if batch.valid.any() else 0):
        networks.value_norm.update(batch.returns[batch.valid])
        loss, logs = compute_losses(networks, batch, args)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm)
        optimizer.step()
    return logs | {"explained_variance": batch.explained_variance} if batch.valid.any() else {}


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
    if args.num_steps % args.chunk_length:
        raise InputError(f"--num-steps {args.num_steps} is not a multiple of --chunk-length {args.chunk_length}.")
    args.anneal_steps = args.anneal_steps or args.total_timesteps  # which a resumed run keeps
    if args.anneal_steps < args.total_timesteps:
        raise InputError(f"After --anneal-steps {args.anneal_steps} nothing is learnt: lower --total-timesteps to it.")
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
        raise InputError(f"{args.resume} has made its {saved['step']} steps: it can make {args.anneal_steps} in all.")
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
    torch.manual_seed(args.seed + (saved["step"] if saved else 0))  # on a GPU a resumed run draws new random numbers
    networks = Networks(env, args).to(device)
    optimizer = torch.optim.Adam(networks.parameter_groups(), lr=args.learning_rate, eps=1e-5)
    rollout: list[dict[str, torch.Tensor]] = []
    E, N = args.num_envs, env.num_agents
    if saved:
        step, episodes, updates, seconds, metrics, row, returns, hidden = saved["loop"]
        networks.load_state_dict(saved["networks"])
        optimizer.load_state_dict(saved["optimizer"])
        row, hidden = {name: column.to(device) for name, column in row.items()}, hidden.to(device)
        rollout.extend({name: column.to(device) for name, column in row.items()} for row in saved["rollout"])
        torch.set_rng_state(saved["rng"])
    else:
        step, episodes, updates, seconds, metrics = 0, 0, 0, 0.0, []
        returns = torch.zeros(E, dtype=torch.float64)  # so far, of the episodes that have not ended
        row = make_row(*env.reset(), np.ones(E, bool), device)
        hidden = torch.zeros(2, E, N, networks.actor.hidden_size, device=device)
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
                charts = {"SPS": times["sps"], "learning_rate": args.learning_rate * annealing(step, args)}
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
                "loop": [step, episodes, updates, time.monotonic() - start, metrics, row, returns, hidden],
                "networks": networks.state_dict(), "optimizer": optimizer.state_dict(),
                "env": {name: torch.from_numpy(value) for name, value in env.get_state().items()},
                "rollout": rollout,
            })  # fmt: skip
            agent = {name: value.cpu() for name, value in networks.actor.state_dict().items()}
            write(run_dir / "policy.pt", {"kind": f"{ALGORITHM} policy 2", **about, "step": step, "agent": agent})
        if ends:
            break

        # Act in all environments
        decision, after = act(networks, row, hidden)
        try:
            obs, reward, terminated, truncated, info = env.step(decision["action"].cpu().numpy())
        except ConnectionError as error:  # a resumed run begins new battles
            failure = error
            continue
        step += E
        bar.update(E)

        # Store the step; the view that it led to is the next row, or, where the episode was cut off, final_value
        lost = np.broadcast_to(info.get("invalid", False), E)  # with its game
        ended, final_value = terminated | truncated | lost, torch.zeros_like(decision["value"])
        if truncated.any():
            final = make_row(info["final_obs"], info["final_info"], np.zeros(E, bool), device)
            final_value = value_of(networks, final, after)
        outcome = {"reward": reward, "terminated": terminated, "truncated": truncated, "done": ended, "valid": ~lost}
        outcome = {name: torch.from_numpy(column).to(device) for name, column in outcome.items()}
        rollout.append(row | decision | outcome | {"final_value": final_value})
        row, hidden = make_row(obs, info, ended, device), after
        for e in np.flatnonzero(lost):
            forget(rollout, e)
        returns += torch.from_numpy(reward)
        for e in np.flatnonzero(terminated | truncated):
            episodes += 1
            writer.add_scalar("charts/episodic_return", returns[e], step)
        returns[ended] = 0

        # Learn
        if len(rollout) == args.num_steps:
            batch = make_batch(networks, rollout, value_of(networks, row, hidden), args)
            logs = update(networks, optimizer, batch, annealing(step - E, args), args)
            rollout.clear()
            updates += args.update_epochs
            if not math.isfinite(sum(logs.values())):
                raise FloatingPointError(f"A loss is not finite at step {step}: try a lower --learning-rate.")
            for name, value in logs.items():
                writer.add_scalar(f"losses/{name}", value, step)

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
        print(f"Nothing was learnt: the first update waits for {E * args.num_steps} steps, and {step} were made.")
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
        advice = "out of memory; lower --num-envs or --num-steps: " if memory else ""
        tqdm.write(f"error: {advice}{error}", file=sys.stderr)  # not within the bar
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    for fd, name in ((1, "stdout"), (2, "stderr")):
        fd = fd if getattr(sys, name) else os.open(os.devnull, os.O_WRONLY)  # closed, as by >&- in a shell
        buffer = io.BufferedWriter(Unbroken(fd, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, errors="backslashreplace", line_buffering=True))
    sys.exit(main())
