# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "numpy>=2,<3", "tyro>=0.9,<2", "numba>=0.61", "tensorboard>=2.18", "tqdm>=4.66",
#   "filelock>=3.12", "pillow>=10.1"]
# ///
"""HASAC on SMACv2 (Liu et al. 2024, arXiv 2306.10715), one file, top to bottom: off-policy actor-critic.

    python hasac_smacv2.py --map protoss_5_vs_5                                       # the paper's 10M steps: days
    python hasac_smacv2.py --map terran_5_vs_5 --total-timesteps 200000               # watch it learn, an hour or two
    python hasac_smacv2.py --resume runs/NAME                                         # go on after Ctrl-C or a crash
    python hasac_smacv2.py --evaluate runs/NAME/policy.pt --eval-episodes 1000        # test what was learnt

Soft actor-critic for a team whose agents share no weights: twin critics Q(s, u_1, ..., u_N), and for each agent an
actor without memory that sees its own observation only. Actors are updated one after another, in a random order, each
against those already updated. A baseline of Soft-QMIX (Chen, Huang, Schneider 2024, arXiv 2406.13930).

"Liu" is Liu et al.; table and algorithm numbers are Chen et al.'s. In shape comments: E environments, B steps of a
batch, N agents, A actions, S state, O observation, H units of a layer; R of the B steps bootstrap, M is any number.
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
    seed: int = 1  # fixes networks, battles, sampled actions and replay
    cuda: bool = True  # use the GPU if there is one
    track: bool = False  # log to Weights & Biases, too
    wandb_project_name: str = "softqmix"  # its project
    wandb_entity: str | None = None  # its team or user
    run_dir: str | None = None  # this run's folder; default runs/{map}__{exp_name}__{backend}__{seed}__{time}-{process}
    resume: str | None = None  # go on in this run folder; only steps, test and save intervals and device may change
    evaluate: str | None = None  # only evaluate this policy.pt, or that of this run folder
    capture_video: bool = False  # film battles of the last test, on the simulator
    check_env: bool = False  # only look for StarCraft II, play one battle, and print sizes, speed and versions
    total_timesteps: int = 10_050_000  # environment steps of all environments together, as in the other scripts (10M)
    num_envs: int = 8  # battles stepped as one batch (Table 7)
    learning_starts: int = 10_000  # environment steps, played at random, before the first update (Table 7)
    updates_per_step: float = 1.0  # updates per step of all environments (Table 7's two numbers mean 50 in 50 steps)
    batch_size: int = 1000  # environment steps in an update (Table 7)
    buffer_size: int = 1_000_000  # environment steps in the replay (Table 7), whose memory is printed at the start
    learning_rate: float = 3e-4  # of Adam, for the actors (Table 7)
    critic_learning_rate: float = 5e-4  # of Adam, for both critics (Table 7)
    alpha_learning_rate: float = 3e-4  # of Adam, for the logarithms of the temperatures (Table 7)
    gamma: float = 0.99  # discount factor (Table 7)
    n_step: int = 20  # rewards in a target before it bootstraps (Table 7)
    tau: float = 0.005  # after each update the target critics move this fraction of the way (Table 7)
    auto_alpha: bool = True  # learn the temperatures, one for each agent and one for the critics (Table 7)
    alpha: float = 1.0  # temperatures at the start; with --no-auto-alpha throughout
    target_entropy: float = 0.0  # c: auto_alpha aims at c log(available actions) nats; 0, as released: alphas only fall
    sequential: bool = True  # agents later in the order see the new actions of those before; otherwise the old ones
    eval_interval: int = 10_000  # environment steps between evaluations
    eval_episodes: int = 32  # greedy battles in an evaluation; on the simulator its largest divisor up to 64 at a time
    checkpoint_interval: int = 500_000  # environment steps between checkpoints; there is one at the end and on Ctrl-C


RANGES = {"seed": (0, 2**31 - 1), "gamma": (0, 1), "tau": (1e-9, 1), "target_entropy": (0, 1)}
RANGES |= {"learning_starts": (0, 2**31 - 1), "n_step": (1, 10_000)}
MAY_CHANGE = {"total_timesteps", "eval_interval", "checkpoint_interval", "cuda", "capture_video"}  # in a resumed run
MAY_CHANGE |= {"run_dir", "resume", "evaluate", "check_env", "track", "wandb_project_name", "wandb_entity"}
SIZES = ("obs_size", "num_agents", "num_actions")  # of the agent network


def make_env(args: Args, num_envs: int, seed: int) -> SMACv2Sim | StarCraft2:
    """Battles as one batch, behind the interface that envs/__init__.py states; ValueError for a wrong option."""
    if args.backend == "auto":
        args.backend = "starcraft2" if is_installed(args.map) else "sim"
    return {"sim": SMACv2Sim, "starcraft2": StarCraft2}[args.backend](args.map, num_envs, seed, **args.env_options)


# --- Networks (Liu; Table 7) ------------------------------------------------------------------------------------------
class Agent(nn.Module):
    """The actors pi_1, ..., pi_N: own observation -> a logit for each action. LayerNorm -> Linear, three times, with
    ReLUs in between. No two agents share a weight; those of all are stacked, agent by agent, in the same tensors."""

    def __init__(self, obs_size: int, num_agents: int, num_actions: int):
        super().__init__()
        self.hidden_size, sizes = 0, (obs_size, 256, 256, num_actions)  # no memory
        self.weights = nn.ParameterList()
        for features, units, gain in zip(sizes[:-1], sizes[1:], (2**0.5, 2**0.5, 0.01), strict=True):
            scale, shift = torch.ones(num_agents, features), torch.zeros(num_agents, features)  # LayerNorm's
            weight = [nn.init.orthogonal_(torch.empty(features, units), gain) for _ in range(num_agents)]
            self.weights.extend([scale, shift, torch.stack(weight), torch.zeros(num_agents, units)])

    @staticmethod
    def logits(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        """Of an agent with these weights: obs (M, O) -> (M, A)."""
        for layer in range(0, len(weights), 4):
            scale, shift, weight, bias = weights[layer : layer + 4]
            x = F.layer_norm(F.relu(x) if layer else x, scale.shape, scale, shift)
            x = torch.addmm(bias, x, weight)
        return x

    def forward(self, obs: torch.Tensor, last_action=None, hidden: torch.Tensor | None = None):
        """All agents at once: obs (M, N, O) -> logits (M, N, A), hidden. Last action and hidden state are not used."""
        return torch.vmap(self.logits, in_dims=(1, 0), out_dims=1)(obs, list(self.weights)), hidden


class Critic(nn.Module):
    """Q_1 and Q_2: state and joint action (one-hot) -> the team's soft return."""

    def __init__(self, env: SMACv2Sim | StarCraft2):
        super().__init__()
        self.state_size, inputs = env.state_size, env.state_size + env.num_agents * env.num_actions
        layers = ([nn.Linear(inputs, 256), nn.Linear(256, 256), nn.Linear(256, 1)] for _ in range(2))
        self.twins = nn.ModuleList(map(nn.ModuleList, layers))

    def encode(self, state: torch.Tensor) -> list[torch.Tensor]:
        """The state's part in each critic's first layer, which does not depend on actions: (M, S) -> two of (M, H)."""
        return [F.linear(state, fc1.weight[:, : self.state_size], fc1.bias) for fc1, _, _ in self.twins]

    def forward(self, encoded: list[torch.Tensor], joint: torch.Tensor) -> torch.Tensor:
        """encoded (M, H) twice, one-hot joint actions (M, N, A) -> Q_1 and Q_2 (2, M)."""
        values = []
        for x, (fc1, fc2, fc_out) in zip(encoded, self.twins, strict=True):
            x = F.relu(torch.addmm(x, joint.flatten(1), fc1.weight[:, self.state_size :].T))
            values.append(fc_out(F.relu(fc2(x))).squeeze(-1))
        return torch.stack(values)


class Networks(nn.Module):
    """All networks of a run: actors, critics, the critics' target copies, log alpha of each agent, then the critics."""

    def __init__(self, env: SMACv2Sim | StarCraft2, args: Args):
        super().__init__()
        self.actor = Agent(env.obs_size, env.num_agents, env.num_actions)
        self.critic = Critic(env)
        self.target = copy.deepcopy(self.critic)
        self.log_alpha = nn.Parameter(torch.full((env.num_agents + 1,), math.log(args.alpha)))

    def parameter_groups(self, args: Args) -> list[dict]:
        """What Adam trains: each agent's part of the actors' weights, as tensors of their own in the same memory, so
        that it can be trained by itself; then the critics and the temperatures."""
        N = len(self.actor.weights[0])
        parts = [[weight.data[i].requires_grad_() for weight in self.actor.weights] for i in range(N)]
        parts += [list(self.critic.parameters()), [self.log_alpha]]
        rates = [args.learning_rate] * N + [args.critic_learning_rate, args.alpha_learning_rate]
        return [{"params": part, "lr": rate} for part, rate in zip(parts, rates, strict=True)]


def has_choice(mask: torch.Tensor) -> torch.Tensor:
    """Agents with more than one available action. On SMACv2: those alive. (..., A) -> (...)."""
    return mask.sum(-1) > 1


def greedy_action(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Decentralised execution: the best available action of the agent network alone, (..., A) -> (...)."""
    return values.masked_fill(~mask, -torch.inf).argmax(-1)


def masked_log_policy(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log softmax over available actions, -inf for the others: logits, mask (..., A) -> (..., A)."""
    return F.log_softmax(logits.masked_fill(~mask, -torch.inf), dim=-1)


def gumbel_softmax(log_policy: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Draw by the Gumbel-max trick, never an unavailable action, as one-hot vectors with the gradient of the
    Gumbel-softmax at temperature 1 (straight-through): (..., A) -> (..., A)."""
    gumbel = -torch.empty_like(log_policy).exponential_().clamp(min=1e-30).log()  # a 0 would make the softmax NaN
    perturbed = (log_policy + gumbel).masked_fill(~mask, -torch.inf)
    soft = F.softmax(perturbed, dim=-1)
    return F.one_hot(perturbed.argmax(-1), mask.shape[-1]) + (soft - soft.detach())


@torch.no_grad()
def act(networks: Networks, row: dict[str, torch.Tensor], uniform: bool) -> torch.Tensor:
    """Sample, independently for each environment and agent, from the actors or uniformly: actions (E, N)."""
    logits = networks.actor(row["obs"])[0]  # (E, N, A)
    log_policy = masked_log_policy(torch.zeros_like(logits) if uniform else logits, row["mask"])
    return gumbel_softmax(log_policy, row["mask"]).argmax(-1)


# --- Replay: a ring of steps ------------------------------------------------------------------------------------------
def make_row(obs, info: dict) -> dict[str, torch.Tensor]:
    """What all environments show: obs (E, N, O), state (E, S) and mask (E, N, A)."""
    row = {"obs": obs, "state": info["state"], "mask": info["action_mask"]}
    return {name: torch.from_numpy(array) for name, array in row.items()}


def n_step_returns(reward, ended, left, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """R_t = sum_{j<m} gamma^j r_{t+j}, and m (B,); reward, ended (n, B) are of steps t..t+n-1. m is less than n if the
    episode ends before, or the replay does: `left` (B,) steps are in it from t on."""
    j = torch.arange(len(reward)).unsqueeze(1)
    counted = (ended.cumsum(0) - ended.int() == 0) & (j < left)  # nothing has ended before
    return (gamma**j * reward).masked_fill(~counted, 0).sum(0), counted.sum(0)


class Replay:
    """A ring of K slots, each a step of all environments: row k * E + e of a column is environment e in slot k. What
    a step led to stands in the next slot or, where it was cut off, in `final`. The slot after the newest step has the
    current view, which has no action yet and is never drawn. Memory is taken only as rows are written."""

    def __init__(self, env: SMACv2Sim | StarCraft2, args: Args):
        N, A = env.num_agents, env.num_actions
        self.E, self.K = args.num_envs, args.buffer_size // args.num_envs + 1
        columns = {"obs": ((N, env.obs_size), torch.float), "state": ((env.state_size,), torch.float)}
        columns |= {"mask": ((N, A), torch.bool), "action": ((N,), torch.int64), "reward": ((), torch.float)}
        columns |= {name: ((), torch.bool) for name in ("terminated", "ended", "valid")}
        self.columns = {name: torch.empty(self.K * self.E, *size, dtype=kind) for name, (size, kind) in columns.items()}
        self.final: dict[int, dict[str, torch.Tensor]] = {}  # row -> the view that its step led to
        self.now, self.size = 0, 0  # the current view's slot; steps stored, in each environment

    def add(self, step: dict, row: dict, truncated: np.ndarray, final: dict | None) -> None:
        """A step of all environments, the views that it led to, and the last views of those that were cut off."""
        for e in np.flatnonzero(truncated).tolist():
            self.final[self.now * self.E + e] = {name: column[e].clone() for name, column in final.items()}
        old, self.now, self.size = self.now, (self.now + 1) % self.K, min(self.size + 1, self.K - 1)
        for slot, columns in ((old, step), (self.now, row)):
            for name, column in columns.items():
                self.columns[name][slot * self.E : (slot + 1) * self.E] = column
        for e in range(self.E):  # whose oldest steps were just written over
            self.final.pop(self.now * self.E + e, None)

    def forget(self, e: int) -> None:
        """Environment e lost its game in the newest step: nothing of that episode may be learnt any more."""
        for age in range(1, self.size + 1):
            row = (self.now - age) % self.K * self.E + e
            if age > 1 and self.columns["ended"][row]:
                break
            self.columns["valid"][row] = False

    def sample(self, args: Args, device: torch.device) -> SimpleNamespace:
        """A batch of steps, uniformly with replacement, with R_t of their n steps and, where these did not end in a
        terminal state, the view to bootstrap from. The few that belong to lost games are left out."""
        age, e = torch.randint(1, self.size + 1, (args.batch_size,)), torch.randint(self.E, (args.batch_size,))
        valid = self.columns["valid"][(self.now - age) % self.K * self.E + e]
        age, e = age[valid], e[valid]  # the newest step's age is 1
        window = (self.now - age + torch.arange(args.n_step).unsqueeze(1)) % self.K * self.E + e  # (n, B)
        returns, m = n_step_returns(self.columns["reward"][window], self.columns["ended"][window], age, args.gamma)
        last, following = ((self.now - age + steps) % self.K * self.E + e for steps in (m - 1, m))
        bootstraps = (~self.columns["terminated"][last]).nonzero().squeeze(1)  # (R,) of (B,)
        last, following = last[bootstraps].tolist(), following[bootstraps]
        cut = [i for i, row in enumerate(last) if row in self.final]
        batch = {name: self.columns[name][window[0]] for name in ("obs", "state", "mask", "action")}
        for name in ("obs", "state", "mask"):
            batch[f"next_{name}"] = self.columns[name][following]
            if cut:
                batch[f"next_{name}"][cut] = torch.stack([self.final[last[i]][name] for i in cut])
        batch |= {"returns": returns, "bootstraps": bootstraps, "discount": args.gamma ** m[bootstraps]}
        return SimpleNamespace(**{name: column.to(device) for name, column in batch.items()})

    def get_state(self) -> dict:
        """For checkpoints: what has been written; by way of numpy, as torch.save stores all memory behind a slice."""
        columns = {name: torch.from_numpy(x.numpy()[: (self.size + 1) * self.E]) for name, x in self.columns.items()}
        return {"columns": columns, "final": self.final, "now": self.now, "size": self.size}

    def set_state(self, state: dict) -> None:
        for name, column in state["columns"].items():
            self.columns[name][: len(column)] = column
        self.final, self.now, self.size = state["final"], state["now"], state["size"]


# --- Learning ---------------------------------------------------------------------------------------------------------
def sample_actions(obs, mask, weights: list[list[torch.Tensor]]) -> tuple[torch.Tensor, list, list]:
    """u_i ~ pi_i for all agents: one-hot (M, N, A); and for each agent the rows in which it has a choice and its log
    policy there. Agents without a choice need no computing: their mask is their one action, and log pi is 0."""
    joint, rows, log_policies = mask.float(), [], []
    for i, own in enumerate(weights):
        chosen = has_choice(mask[:, i]).nonzero().squeeze(1)
        own_mask = mask[chosen, i]
        log_policy = masked_log_policy(Agent.logits(obs[chosen, i], own), own_mask)
        joint[chosen, i] = gumbel_softmax(log_policy.detach(), own_mask)
        rows.append(chosen)
        log_policies.append(log_policy.masked_fill(~own_mask, 0))  # as 0 * -inf is not 0
    return joint, rows, log_policies


@torch.no_grad()
def compute_targets(networks: Networks, weights: list, batch) -> torch.Tensor:
    """y_t = R_t + gamma^m (min Qbar(s_{t+m}, u') - alpha_c sum_i log pi_i(u'_i)), R_t alone after an end: (B,)."""
    joint, rows, log_policies = sample_actions(batch.next_obs, batch.next_mask, weights)
    value = networks.target(networks.target.encode(batch.next_state), joint).amin(0)  # (R,)
    for i, (chosen, log_policy) in enumerate(zip(rows, log_policies, strict=True)):
        value[chosen] -= networks.log_alpha[-1].exp() * (joint[chosen, i] * log_policy).sum(-1)
    return batch.returns.index_add(0, batch.bootstraps, batch.discount * value)


def update_policies(networks: Networks, optimizer: torch.optim.Adam, weights: list, batch, args: Args) -> tuple:
    """The actors, one after another in a random order: L_i = mean(alpha_i log pi_i(z_i) - min Q(s, u_1, .., z_i, ..))
    over the steps in which i has a choice, one step of Adam, and new actions u_i for those that follow.
    Returns log pi_i(z_i) (B, N), 0 where i has no choice, and L_i (N,)."""
    joint, rows, log_policies = sample_actions(batch.obs, batch.mask, weights)  # (B, N, A)
    alpha, encoded = networks.log_alpha.detach().exp(), [x.detach() for x in networks.critic.encode(batch.state)]
    log_prob, losses = torch.zeros_like(joint[..., 0]), torch.zeros_like(alpha[:-1])
    for i in torch.randperm(len(weights)).tolist():
        chosen, log_policy, own = rows[i], log_policies[i], slice(i, i + 1)
        if len(chosen) == 0:
            continue
        actions = joint[chosen]
        actions[:, i] = z = gumbel_softmax(log_policy, batch.mask[chosen, i])
        log_z = (z * log_policy).sum(-1)
        loss = (alpha[i] * log_z - networks.critic([x[chosen] for x in encoded], actions).amin(0)).mean()
        loss.backward(inputs=weights[i])  # nobody else's gradient, and not the critics'
        optimizer.step()
        optimizer.zero_grad()
        log_prob[chosen, i], losses[i] = log_z.detach(), loss.detach()
        if args.sequential:
            with torch.no_grad():
                joint[chosen, own] = sample_actions(batch.obs[chosen, own], batch.mask[chosen, own], weights[own])[0]
    return log_prob, losses


def update(networks: Networks, optimizer: torch.optim.Adam, batch, args: Args) -> dict[str, torch.Tensor]:
    """A step of the critics, of each actor and of the temperatures. One optimiser does for all of them, as Adam passes
    over what has no gradient. Returns the logs; a batch of lost games only has none."""
    if len(batch.returns) == 0:
        return {}
    weights = [group["params"] for group in optimizer.param_groups[:-2]]  # of each agent
    y = compute_targets(networks, weights, batch)
    q = networks.critic(networks.critic.encode(batch.state), F.one_hot(batch.action, batch.mask.shape[-1]).float())
    loss_q = (q - y).square().mean(1).sum()
    loss_q.backward()
    optimizer.step()
    optimizer.zero_grad()
    log_prob, losses = update_policies(networks, optimizer, weights, batch, args)
    if args.auto_alpha:  # L = -log alpha mean(log pi + target), agent i's mean over the steps in which it has a choice
        shortfall = log_prob + args.target_entropy * batch.mask.sum(-1).log()  # (B, N), 0 for those without a choice
        means = [*(shortfall.sum(0) / has_choice(batch.mask).sum(0).clamp(min=1)), shortfall.sum(1).mean()]
        (-networks.log_alpha * torch.stack(means)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    move_target(networks, args.tau)
    entropy = -log_prob.sum() / has_choice(batch.mask).sum().clamp(min=1)
    return {"td": loss_q.detach(), "q": q.detach().mean(), "policy": losses.mean(), "entropy": entropy}


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
    if args.buffer_size < max(args.batch_size, args.num_envs):
        raise InputError(f"--buffer-size {args.buffer_size} is smaller than --batch-size or --num-envs: raise it.")
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
    torch.manual_seed(args.seed + (saved["step"] if saved else 0))  # on a GPU a resumed run draws new random numbers
    networks = Networks(env, args).to(device)
    optimizer = torch.optim.Adam(networks.parameter_groups(args), fused=True)
    replay = Replay(env, args)
    E = args.num_envs
    if saved:
        step, episodes, updates, seconds, metrics, row, returns = saved["loop"]
        networks.load_state_dict(saved["networks"])
        optimizer.load_state_dict(saved["optimizer"])
        replay.set_state(saved.pop("replay"))
        torch.set_rng_state(saved["rng"])
    else:
        step, episodes, updates, seconds, metrics = 0, 0, 0, 0.0, []
        returns = torch.zeros(E, dtype=torch.float64)  # so far, of the episodes that have not ended
        row = make_row(*env.reset())
    if args.track:
        names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "id": run_dir.name}
        importlib.import_module("wandb").init(**names, config=about, sync_tensorboard=True, resume="allow")
    write(run_dir / (f"resumed_{step}.json" if saved else "config.json"), json.dumps(about, indent=2))
    writer = SummaryWriter(str(run_dir), purge_step=step + 1 if saved else None)
    writer.add_text("config", f"{env.title}\n```\n{json.dumps(about, indent=2)}\n```")
    print(f"{env.title}\n{env.name}, seed {args.seed}, {device}, from step {step:,} -> {run_dir}", flush=True)
    size = sum(column.nbytes for column in replay.columns.values()) / 1e9
    print(f"A full replay takes {size:.2g} GB of memory, and as much in checkpoint.pt: see --buffer-size.", flush=True)
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
                charts = {"SPS": times["sps"], "env_restarts": env.restarts + eval_env.restarts}
                alpha = networks.log_alpha.detach().exp()
                charts |= {"alpha": alpha[:-1].mean(), "alpha_critic": alpha[-1]}
                for name, value in (charts | result).items():
                    writer.add_scalar(f"{'charts' if name in charts else 'eval'}/{name}", value, step)
                bar.set_postfix_str(f"return {result['return_mean']:.1f}, wins {result['win_rate']:.2f}", refresh=False)
            except ConnectionError as error:  # StarCraft II failed for good
                failure = error
        ends = done or failure or (stop and stop.is_set())
        if ends or step // args.checkpoint_interval > (step - E) // args.checkpoint_interval:
            write(run_dir / "checkpoint.pt", {
                "kind": f"{ALGORITHM} checkpoint 2", **about, "step": step, "rng": torch.get_rng_state(),
                "loop": [step, episodes, updates, time.monotonic() - start, metrics, row, returns],
                "networks": networks.state_dict(), "optimizer": optimizer.state_dict(),
                "env": {name: torch.from_numpy(value) for name, value in env.get_state().items()},
                "replay": replay.get_state(),
            })  # fmt: skip
            agent = {name: value.cpu() for name, value in networks.actor.state_dict().items()}
            write(run_dir / "policy.pt", {"kind": f"{ALGORITHM} policy 2", **about, "step": step, "agent": agent})
        if ends:
            break

        # Act in all environments
        inputs = {name: column.to(device) for name, column in row.items()}
        action = act(networks, inputs, step < args.learning_starts).cpu()
        try:
            obs, reward, terminated, truncated, info = env.step(action.numpy())
        except ConnectionError as error:  # a resumed run begins new battles
            failure = error
            continue
        step += E
        bar.update(E)

        # Store the step, and what it led to
        lost = np.broadcast_to(info.get("invalid", False), E)  # with its game
        ended = terminated | truncated | lost
        outcome = {"reward": reward, "terminated": terminated | lost, "ended": ended, "valid": ~lost}
        outcome = {name: torch.from_numpy(column) for name, column in outcome.items()}
        final = make_row(info["final_obs"], info["final_info"]) if truncated.any() else None
        stored, row = row | outcome | {"action": action}, make_row(obs, info)
        replay.add(stored, row, truncated, final)
        for e in np.flatnonzero(lost):
            replay.forget(e)
        returns += outcome["reward"]
        for e in np.flatnonzero(terminated | truncated):
            episodes += 1
            writer.add_scalar("charts/episodic_return", returns[e], step)
        returns[ended] = 0

        # Learn
        done_before, due = (int(n * args.updates_per_step) for n in (step // E - 1, step // E))
        for _ in range(due - done_before if step >= args.learning_starts else 0):
            logs = update(networks, optimizer, replay.sample(args, device), args)
            updates += 1
            if not math.isfinite(sum(logs.values())):
                raise FloatingPointError(f"A loss is not finite at step {step}: try a lower --learning-rate.")
            for name, value in logs.items() if updates % 100 == 0 else ():
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
        print(f"Nothing was learnt: {step} steps are too few for --learning-starts and --updates-per-step.")
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
        advice = "out of memory; lower --buffer-size, --batch-size or --num-envs: " if memory else ""
        tqdm.write(f"error: {advice}{error}", file=sys.stderr)  # not within the bar
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    for fd, name in ((1, "stdout"), (2, "stderr")):
        fd = fd if getattr(sys, name) else os.open(os.devnull, os.O_WRONLY)  # closed, as by >&- in a shell
        buffer = io.BufferedWriter(Unbroken(fd, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, errors="backslashreplace", line_buffering=True))
    sys.exit(main())
