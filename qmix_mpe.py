# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "numpy>=2,<3", "tyro>=0.9,<2", "pettingzoo>=1.25", "mpe2==1.1.1", "pillow>=10.1",
#   "tensorboard>=2.18", "tqdm>=4.66", "filelock>=3.12"]
# ///
"""QMIX on MPE Spread (Rashid et al. 2018, arXiv 1803.11485), one file, top to bottom: the twin of softqmix_mpe.py.

    python qmix_mpe.py --level hard                                                   # the paper's run, 10M steps
    python qmix_mpe.py --level simple --total-timesteps 200000                        # watch it learn
    python qmix_mpe.py --resume runs/NAME                                             # go on after Ctrl-C or a crash
    python qmix_mpe.py --evaluate runs/NAME/policy.pt --capture-video                 # test and draw what was learnt

QMIX learns Q_tot(s, u) = Mixer(Q_1, ..., Q_n; s), monotonic in every Q_i, so that each agent's greedy action is part of
the greedy joint action: the baseline of Soft-QMIX (Chen, Huang, Schneider 2024, arXiv 2406.13930), whose contribution
`diff qmix_mpe.py softqmix_mpe.py` shows. Epsilon-greedy exploration, double-Q targets, TD(lambda).
In Spread, three agents are to cover three landmarks without colliding. Test returns on simple / medium / hard: random
play -218 / -279 / -342, scripted -118 / -140 / -170; Table 3: QMIX -112 / -138 / -172, Soft-QMIX -111 / -135 / -169.

Equation, table and appendix numbers are Soft-QMIX's. In shape comments: B episodes of a batch, N agents, A actions,
E environments, S state, O observation, H hidden state; M rows of a batch with t = 0..L, R of them with t < L.
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

from envs.pettingzoo_batch import PettingZooBatch
from envs.spread import Spread, SpreadMPE2

ALGORITHM = Path(__file__).stem  # this file's name, by which its runs, checkpoints and policies are known


@dataclass
class Args:
    exp_name: str = ALGORITHM  # name of this experiment, part of the run's name
    level: Literal["simple", "medium", "hard"] = "hard"  # start distances in Spread: MPE's, times 1.5, times 2 (app. I)
    backend: Literal["batched", "mpe2"] = "batched"  # all environments at once, or mpe2's own, equal to float precision
    env: str | None = None  # instead of Spread: a cooperative PettingZoo environment, a module or module:function
    env_options: dict[str, bool | int | float | str] = field(default_factory=dict)  # of --env, such as team_reward mean
    seed: int = 1  # fixes networks, start states, exploration and replay
    cuda: bool = True  # use the GPU if there is one
    track: bool = False  # log to Weights & Biases, too
    wandb_project_name: str = "softqmix"  # its project
    wandb_entity: str | None = None  # its team or user
    run_dir: str | None = None  # this run's folder; default runs/{env}__{exp_name}__{backend}__{seed}__{time}-{process}
    resume: str | None = None  # go on in this run folder; only steps, test and save intervals and device may change
    evaluate: str | None = None  # only evaluate this policy.pt, or that of this run folder
    capture_video: bool = False  # film three episodes of the last test, in Spread
    total_timesteps: int = 10_000_000  # environment steps of all environments together (section 5.2)
    num_envs: int = 4  # episodes stepped as one batch (Table 8)
    episodes_per_update: int = 4  # an update per this many finished episodes, whatever num_envs is (Table 8: 4 at once)
    batch_size: int = 128  # episodes in an update (Table 8); the first update waits for this many
    buffer_size: int = 5000  # episodes in the replay (Table 8)
    learning_rate: float = 1e-3  # of Adam (Table 8)
    max_grad_norm: float = 10.0  # gradient norm is clipped to this
    gamma: float = 0.99  # discount factor
    td_lambda: float = 0.4  # lambda of TD(lambda) (Table 8, Eq. 24)
    td_weight: float = 1.0  # of squared TD errors where Q_tot exceeds its target; 1: the paper, less: optimistic Q_tot
    target_update_interval: int = 200  # episodes between copies of the networks to their targets (Table 8)
    tau: float = 1.0  # below 1: after each update targets move this fraction of the way instead (Algorithm 1)
    mixer: Literal["qmix", "vdn"] = "qmix"  # the monotonic network, or the plain sum of Q_i
    epsilon_start: float = 1.0  # probability of a random action at step 0 (Table 8)
    epsilon_finish: float = 0.05  # probability of a random action after the annealing (Table 8)
    epsilon_anneal_time: int = 500_000  # environment steps over which epsilon falls linearly (Table 8)
    eval_interval: int = 20_000  # environment steps between evaluations
    eval_episodes: int = 1000  # greedy episodes in an evaluation, always from the same start states
    checkpoint_interval: int = 500_000  # environment steps between checkpoints; there is one at the end and on Ctrl-C


RANGES = {"seed": (0, 2**31 - 1), "gamma": (0, 1), "td_lambda": (0, 1), "td_weight": (0, 1e6), "tau": (1e-9, 1)}
RANGES |= {"epsilon_start": (0, 1), "epsilon_finish": (0, 1)}
MAY_CHANGE = {"total_timesteps", "eval_interval", "checkpoint_interval", "cuda"}  # in a resumed run
MAY_CHANGE |= {"run_dir", "resume", "evaluate", "capture_video", "track", "wandb_project_name", "wandb_entity"}
SIZES = ("obs_size", "num_agents", "num_actions")  # of the agent network


def make_env(args: Args, num_envs: int, seed: int) -> Spread | PettingZooBatch:
    """Episodes as one batch, behind the interface that envs/__init__.py states; ValueError for a wrong option."""
    if args.env:
        return PettingZooBatch(args.env, num_envs, seed, **args.env_options)
    return {"batched": Spread, "mpe2": SpreadMPE2}[args.backend](args.level, num_envs, seed, **args.env_options)


# --- Networks (Tables 5 and 8, appendix G) ----------------------------------------------------------------------------
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


class Critic(nn.Module):
    """theta: the agent network and the mixer, trained by L_Q (Eq. 13). Q_i means the agent network's output."""

    def __init__(self, env: Spread | PettingZooBatch, args: Args):
        super().__init__()
        self.agent = Agent(env.obs_size, env.num_agents, env.num_actions)
        self.mixer = Mixer(env.state_size, env.num_agents) if args.mixer == "qmix" else lambda q, state: q.sum(1)


class Networks(nn.Module):
    """All networks of a run: the critic theta and its target copy theta-bar."""

    def __init__(self, env: Spread | PettingZooBatch, args: Args):
        super().__init__()
        self.critic = Critic(env, args)
        self.target = copy.deepcopy(self.critic)

    def parameter_groups(self) -> list[dict]:
        """What Adam trains; the gradient norm is clipped for each group by itself."""
        return [{"params": list(self.critic.parameters())}]


def greedy_action(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Decentralised execution: the best available action of the agent network alone, (..., A) -> (...)."""
    return values.masked_fill(~mask, -torch.inf).argmax(-1)


def epsilon_at(step: int, args: Args) -> float:
    """Probability of a random action, annealed linearly from epsilon_start to epsilon_finish (Table 8)."""
    return float(np.interp(step, [0, args.epsilon_anneal_time], [args.epsilon_start, args.epsilon_finish]))


def epsilon_greedy(stage1: torch.Tensor, mask: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Each agent by itself: with probability epsilon a random available action, else the best: (..., A) -> (...)."""
    random_action = torch.rand_like(stage1).masked_fill(~mask, -1).argmax(-1)
    explore = torch.rand_like(stage1[..., 0]) < epsilon
    return torch.where(explore, random_action, greedy_action(stage1, mask))


@torch.no_grad()
def act(networks: Networks, row: dict[str, torch.Tensor], hidden: torch.Tensor, epsilon: float):
    """Epsilon-greedy, independently for each environment and agent: actions (E, N), hidden (E, N, H)."""
    stage1, hidden = networks.critic.agent(row["obs"], row["last_action"], hidden)  # (E, N, A)
    return epsilon_greedy(stage1, row["mask"], epsilon).cpu().numpy(), hidden


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


def td_lambda_targets(reward, terminated, next_q, sizes, gamma, td_lambda) -> torch.Tensor:
    """TD(lambda) targets y_t with the greedy u' in place of the action taken (Peng's Q(lambda)):
      y_t = r_t + gamma [Qbar_tot(s_{t+1}, u') + lambda (y_{t+1} - Qbar_tot(s_{t+1}, u'))]
      y_L = Qbar_tot(s_L, u')
    Columns are (R,), sizes[t] rows of each t < L. Nothing follows a terminated step."""
    y = reward + gamma * next_q.masked_fill(terminated, 0)
    following = y[:0]  # y_{t+1} of the episodes that have one: the longest, which come first
    for y_t, q in zip(reversed(y.split(sizes)), reversed(next_q.split(sizes)), strict=True):
        y_t[: len(following)] += gamma * td_lambda * (following - q[: len(following)])
        following = y_t
    return y


def compute_losses(networks: Networks, batch, args: Args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L_Q (Eq. 13), and what to log: L_Q and the mean of Q_tot."""
    critic, target = networks.critic, networks.target
    B, state = batch.sizes[0], batch.state[batch.now]  # (R, S)
    next_state, next_mask = batch.state[B:], batch.mask[B:]  # (R, S), (R, N, A)
    action = batch.last_action[B:].unsqueeze(-1)  # (R, N, 1), taken at time t

    stage1, _ = critic.agent(batch.obs, batch.last_action, sizes=batch.sizes)  # (M, N, A)
    q_i = stage1[batch.now].gather(-1, action)  # (R, N, 1)
    q_tot = critic.mixer(q_i.squeeze(-1), state)  # (R,)

    with torch.no_grad():
        # Double Q: the online network chooses u' among available actions, the target network values it.
        next_action = greedy_action(stage1[B:], next_mask).unsqueeze(-1)  # (R, N, 1), u'
        next_stage1, _ = target.agent(batch.obs, batch.last_action, sizes=batch.sizes)  # (M, N, A)
        next_q_i = next_stage1[B:].gather(-1, next_action).squeeze(-1)  # (R, N)
        next_q = target.mixer(next_q_i, next_state)  # (R,)
        columns = (batch.reward[B:], batch.terminated[B:], next_q)
        y = td_lambda_targets(*columns, batch.sizes[1:], args.gamma, args.td_lambda)  # (R,)

    td_error = q_tot - y
    weight = torch.where(td_error > 0, args.td_weight, 1.0)
    loss_q = 0.5 * (weight * td_error.square()).mean()  # the mean is over steps, not over weights
    logs = {"td": loss_q, "q_tot": q_tot.mean()}
    return loss_q, {name: value.detach() for name, value in logs.items()}


def update(networks: Networks, optimizer: torch.optim.Adam, batch, args: Args) -> dict[str, torch.Tensor]:
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


@torch.no_grad()
def evaluate(agent: Agent, env, episodes: int, device: torch.device, seed: int = 2**31) -> dict[str, float]:
    """Greedy, decentralised episodes: `episodes` / E in each environment, fixed by a seed that no training has."""
    E, quota = env.num_envs, episodes // env.num_envs
    obs, info = env.reset(seed=seed)
    hidden = torch.zeros(E, env.num_agents, agent.hidden_size, device=device)
    last_action = torch.full((E, env.num_agents), -1, device=device)
    returns, running_return = [[] for _ in range(E)], np.zeros(E)
    while min(map(len, returns)) < quota:
        values, hidden = agent(torch.from_numpy(obs).to(device), last_action, hidden)
        last_action = greedy_action(values, torch.from_numpy(info["action_mask"]).to(device))
        obs, reward, terminated, truncated, info = env.step(last_action.cpu().numpy())
        running_return += reward
        for e in np.flatnonzero(terminated | truncated):
            if len(returns[e]) < quota:
                returns[e].append(running_return[e])
        for e in np.flatnonzero(terminated | truncated | info.get("invalid", False)):  # invalid: lost with its game
            running_return[e], hidden[e], last_action[e] = 0, 0, -1
    values = np.concatenate(returns)
    std = float(values.std(ddof=1)) if episodes > 1 else math.nan
    return {"return_mean": float(values.mean()), "return_std": std, "return_se": std / math.sqrt(episodes)}


def describe(result: dict[str, float]) -> str:
    return f"return {result['return_mean']:.2f} +- {result['return_se']:.2f} (standard error)"


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
    if args.batch_size > args.buffer_size:
        raise InputError(f"--batch-size {args.batch_size} is larger than --buffer-size {args.buffer_size}: lower it.")
    if {"num_envs", "seed", *(() if args.env else ("level",))} & args.env_options.keys():
        raise InputError("--env-options cannot set level, num_envs or seed: use --level, --num-envs or --seed.")
    if args.track and not importlib.util.find_spec("wandb"):
        raise InputError("--track needs the package wandb: pip install wandb, or leave the option out.")
    if args.env and args.capture_video:
        raise InputError("--capture-video films Spread only, not --env: leave it out.")
    if (args.run_dir, args.resume, args.evaluate).count(None) < 2:
        raise InputError("--run-dir, --resume and --evaluate exclude each other: give one of them.")
    saved = load(args.resume, "checkpoint") if args.resume else args.evaluate and load(args.evaluate, "policy")
    for name in sorted(vars(args).keys() - MAY_CHANGE) if args.resume else ():
        if (ours := getattr(args, name)) != (theirs := saved["args"].get(name, ours)):
            raise InputError(f"{name} is {ours}, but was {theirs} in {args.resume}: leave the option out.")
    if args.resume and saved["step"] >= args.total_timesteps and Path(args.resume, "summary.json").exists():
        raise InputError(f"{args.resume} has made its {saved['step']} steps: give more --total-timesteps.")
    try:
        env = make_env(args, args.num_envs, args.seed)
        most = 32 if args.env else args.eval_episodes  # Spread's run all at once
        eval_env = make_env(args, max(n for n in range(1, most + 1) if args.eval_episodes % n == 0), args.seed)
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
    about |= {"torch": str(torch.__version__), "numpy": np.__version__, "args": asdict(args)}
    about |= {"level": None if args.env else args.level} | {name: getattr(env, name) for name in SIZES}
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False  # a GRU in float32 on a GPU, too
    torch.manual_seed(args.seed + (saved["step"] if saved else 0))  # on a GPU a resumed run draws new random numbers
    networks = Networks(env, args).to(device)
    optimizer = torch.optim.Adam(networks.parameter_groups(), lr=args.learning_rate)
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
        hidden = torch.zeros(E, N, networks.critic.agent.hidden_size)
    if args.track:
        names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "id": run_dir.name}
        importlib.import_module("wandb").init(**names, config=about, sync_tensorboard=True, resume="allow")
    write(run_dir / (f"resumed_{step}.json" if saved else "config.json"), json.dumps(about, indent=2))
    writer = SummaryWriter(str(run_dir), purge_step=step + 1 if saved else None)
    writer.add_text("config", f"{env.title}\n```\n{json.dumps(about, indent=2)}\n```")
    print(f"{env.title}\n{env.name}, seed {args.seed}, {device}, from step {step:,} -> {run_dir}", flush=True)
    every = 0.5 if sys.stderr.isatty() else 60  # seconds
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", unit_scale=True, miniters=1, mininterval=every)
    start = time.monotonic() - seconds
    while True:
        # Test, and save for --resume and --evaluate: at intervals and at the end
        done, tested = step >= args.total_timesteps, metrics and metrics[-1]["step"] == step
        if done or (not tested and step // args.eval_interval > (step - E) // args.eval_interval):  # at step 0, too
            result = evaluate(networks.critic.agent, eval_env, args.eval_episodes, device)
            seconds = time.monotonic() - start
            times = {"sps": round(step / seconds, 1), "seconds": round(seconds, 1)}
            line = {"step": step, "episodes": episodes, "updates": updates} | result | times
            metrics = [*(metrics[:-1] if tested else metrics), line]  # a repeated last test replaces the first
            lines = [metrics[0], *(line.values() for line in metrics)]
            write(run_dir / "metrics.csv", "".join(",".join(map(str, line)) + "\n" for line in lines))
            charts = {"SPS": times["sps"], "epsilon": epsilon_at(step, args)}
            for name, value in (charts | result).items():
                writer.add_scalar(f"{'charts' if name in charts else 'eval'}/{name}", value, step)
            text = f"return {result['return_mean']:.1f} +- {result['return_se']:.1f}"
            bar.set_postfix_str(text, refresh=False)
        ends = done or (stop and stop.is_set())
        if ends or step // args.checkpoint_interval > (step - E) // args.checkpoint_interval:
            write(run_dir / "checkpoint.pt", {
                "kind": f"{ALGORITHM} checkpoint 2", **about, "step": step, "rng": torch.get_rng_state(),
                "loop": [step, episodes, updates, time.monotonic() - start, metrics, row, played, hidden],
                "networks": networks.state_dict(), "optimizer": optimizer.state_dict(),
                "env": {name: torch.from_numpy(value) for name, value in env.get_state().items()},
                "lengths": [len(episode["reward"]) for episode in replay],
                "replay": {name: torch.cat([episode[name] for episode in replay]) for name in (row if replay else ())},
            })  # fmt: skip
            agent = {name: value.cpu() for name, value in networks.critic.agent.state_dict().items()}
            write(run_dir / "policy.pt", {"kind": f"{ALGORITHM} policy 2", **about, "step": step, "agent": agent})
        if ends:
            break

        # Act in all environments
        inputs = {name: column.to(device) for name, column in row.items()}
        action, hidden = act(networks, inputs, hidden.to(device), epsilon_at(step, args))
        obs, reward, terminated, truncated, info = env.step(action)
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
            if len(replay) >= args.batch_size and episodes % args.episodes_per_update == 0:
                logs = update(networks, optimizer, sample_batch(replay, args.batch_size, device), args)
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
            bar.set_postfix_str(f"{len(replay)} of {args.batch_size} episodes until the first update", refresh=False)

    bar.close()
    if done:
        if not args.env:
            mpe2_env = SpreadMPE2(args.level, args.eval_episodes)
            about["eval_mpe2"] = evaluate(networks.critic.agent, mpe2_env, args.eval_episodes, device)
        summary = {**about, "env_steps": step, **metrics[-1], "eval": {"episodes": args.eval_episodes, **result}}
        write(run_dir / "summary.json", json.dumps(summary, indent=2))
        if args.capture_video:
            eval_env.save_film(run_dir, step)
    for end in (writer.close, env.close, eval_env.close, lock.release):
        end()
    if not done:
        raise KeyboardInterrupt("Resume by " + shlex.join(["python", sys.argv[0], "--resume", str(run_dir)]))
    in_mpe2 = "" if args.env else f"; in mpe2: {describe(about['eval_mpe2'])}"
    print(f"{step:,} steps: test {describe(result)}{in_mpe2} -> {run_dir}")
    if updates == 0:
        print(f"Nothing was learnt: the first update waits for {args.batch_size} episodes, and {episodes} were played.")
    return summary


def evaluate_policy(args: Args) -> None:
    """Test the agent network of a policy.pt, in Spread by args.backend and by mpe2, and print the results."""
    _, eval_env, device, policy = prepare(args)
    agent = Agent(*(policy[name] for name in SIZES)).to(device)
    agent.load_state_dict(policy["agent"])
    in_mpe2 = [] if args.env or args.backend == "mpe2" else [SpreadMPE2(args.level, args.eval_episodes)]
    for env in (eval_env, *in_mpe2):
        result = evaluate(agent, env, args.eval_episodes, device)
        print(f"{env.title}: {describe(result)}, {args.eval_episodes} episodes")
        env.close()
    if args.capture_video:
        eval_env.save_film(args.evaluate, policy["step"])


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
        if args.evaluate:
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
