# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "tyro>=0.9,<2", "tqdm>=4.66"]
# ///
"""Soft-QMIX on one-step matrix games (section 5.1 of Chen, Huang, Schneider 2024, arXiv 2406.13930), small.

    python softqmix_matrix.py                                  # 16 seeds of Table 1's game, under a minute on a CPU
    python softqmix_matrix.py --payoff climbing --alpha 3      # another game: table1, released, climbing, penalty
    python softqmix_matrix.py --payoff my_game.csv             # or your own: n lines of m numbers

Two agents choose a row and a column at the same time, and both receive that cell of the payoff. g_i refines an agent's
values, a monotonic mixer joins them to Q_tot, and f_i turns them into the logits of the agent's policy. All three keep
the order of its actions, so each agent's best action is part of the best joint action: execution needs none of them.
Nearly all seeds find the best cell, but few at --td-weight 1, the paper's loss, trained beside it (results/matrix.md).

Shape comments: K seeds (at one weight each; in g and f, actions), R rows of a module, B games of a batch, H hidden
units, E environments, N = 2 agents, A actions, J = n * m joint actions, S = 1 state. All numbers are the paper's."""

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports, which are slow
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends them without a traceback
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a waiting thread leaves its core to others
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # on matrices this small more gain little, and slow other runs down

import io
import json
import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.func import functional_call, stack_module_state, vmap
from tqdm import tqdm

ALGORITHM = Path(__file__).stem  # this file's name, by which its runs are known
GAMES = {
    "table1": ((8, -12, -12), (-12, 0, 0), (-12, 0, 0)),
    "released": ((12, -0.1, -0.1), (-0.1, 0, 0), (-0.1, 0, 0)),  # the payoff in the authors' published code
    "climbing": ((11, -30, 0), (-30, 7, 6), (0, 0, 5)),  # Claus and Boutilier 1998
    "penalty": ((10, 0, -100), (0, 2, 0), (-100, 0, 10)),  # the same authors, k = -100; two optima
}
RANGES = {"seed": (0, 2**31 - 1), "num_seeds": (1, 10_000), "td_weight": (0, 1e6)}


@dataclass
class Args:
    exp_name: str = ALGORITHM  # name of this experiment, part of the run's name
    payoff: str = "table1"  # table1, released, climbing, penalty, or a CSV file: a line for each of agent 1's actions
    seed: int = 1  # the first seed; each fixes the networks, exploration and replay of its own row
    num_seeds: int = 16  # independent seeds, trained side by side as one batch
    run_dir: str | None = None  # new or empty folder; default runs/{payoff}__{exp_name}__{seed}__{time}-{process}
    total_timesteps: int = 10_000  # games played by each seed (section 5.1)
    num_envs: int = 4  # games played before each update (Table 8)
    batch_size: int = 128  # games in an update (Table 8); the first update waits for this many
    buffer_size: int = 5000  # games in the replay (Table 8)
    learning_rate: float = 1e-3  # of Adam (Table 8)
    max_grad_norm: float = 10.0  # gradient norm is clipped to this, separately for each seed and each loss
    td_weight: float = 0.1  # of squared TD errors where Q_tot exceeds its target; 1, the paper's Eq. 13, is trained too
    mixer: Literal["qmix", "vdn"] = "qmix"  # the monotonic network, or the plain sum of Q_i
    eval_interval: int = 500  # games between tests of the greedy joint action
    alpha: float = 1.0  # temperature of the policy, in units of Q_tot
    use_g: bool = True  # transform the agents' values by g_i (Table 4: without it, "+function f")
    use_f: bool = True  # transform Q_i by f_i (Table 4: without g and f, "+entropy"); without, alpha is in units of Q_i


class Agent(nn.Module):
    """f^stage1: linear, ReLU, GRU, linear, shared by both agents; all that execution needs. In a one-step game there is
    no last action, and the GRU starts from a zero hidden state, which leaves of it the gates written out here."""

    def __init__(self, num_agents: int, num_actions: int, hidden_size: int = 64):
        super().__init__()
        self.fc_in = nn.Linear(1 + num_agents, hidden_size)
        self.gru = nn.Linear(hidden_size, 3 * hidden_size)
        self.gru_hidden_bias = nn.Parameter(torch.empty(3 * hidden_size).uniform_(-1, 1) / hidden_size**0.5)
        self.fc_out = nn.Linear(hidden_size, num_actions)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """obs (N, 1), a constant -> values (N, A)."""
        x = F.relu(self.fc_in(torch.cat([obs, torch.eye(len(obs))], dim=-1)))  # (N, H)
        (reset, keep, new), biases = self.gru(x).chunk(3, -1), self.gru_hidden_bias.chunk(3)  # (N, H), (H,) each
        new = torch.tanh(new + torch.sigmoid(reset + biases[0]) * biases[2])
        return self.fc_out((1 - torch.sigmoid(keep + biases[1])) * new)


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


class TransformG(nn.Module):
    """g_i(x, s) = x + |W2_i(s)| elu(|W1_i(s)| x + b1_i(s)) + b2_i(s) (Eq. 8), for each action's value x by itself.
    One set of weights per agent. The residual x (appendix G) has slope 1, so the order of actions is kept strictly."""

    def __init__(self, state_size: int, num_agents: int, embed: int = 32):
        super().__init__()
        self.w1 = hypernetwork(state_size, num_agents * embed)
        self.b1 = nn.Linear(state_size, num_agents * embed)
        self.w2 = hypernetwork(state_size, num_agents * embed)
        self.b2 = hypernetwork(state_size, num_agents)

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """x (R, N, K): values of K actions, state (R, S) -> Q_i (R, N, K)."""
        w1, b1, w2 = (make(state).view(*x.shape[:2], 1, -1) for make in (self.w1, self.b1, self.w2))  # (R, N, 1, embed)
        hidden = F.elu(torch.addcmul(b1, x.unsqueeze(-1), w1.abs()), inplace=True)  # (R, N, K, embed)
        return x + (hidden @ w2.abs().mT).squeeze(-1) + self.b2(state).unsqueeze(-1)


class TransformF(nn.Module):
    """f_i(q, s) = |w_i(s)| q + b_i(s) (appendix G): keeps the order of actions, weakly, since w_i may be 0."""

    def __init__(self, state_size: int, num_agents: int):
        super().__init__()
        self.w = hypernetwork(state_size, num_agents)
        self.b = hypernetwork(state_size, num_agents)

    def forward(self, q: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """q (R, N, K), state (R, S) -> logits times alpha (R, N, K)."""
        return self.w(state).abs().unsqueeze(-1) * q + self.b(state).unsqueeze(-1)


class Networks(nn.Module):
    """All networks of a seed: agent, g and mixer (theta, trained by L_Q, Eq. 13), and f (phi, by L_pi, Eq. 14)."""

    def __init__(self, payoff: torch.Tensor, args: Args):
        super().__init__()
        self.joint_actions = torch.cartesian_prod(*map(torch.arange, payoff.shape))  # (J, N)
        self.agent = Agent(2, max(payoff.shape))
        self.mixer = Mixer(1, 2) if args.mixer == "qmix" else lambda q, state: q.sum(1)
        self.g = TransformG(1, 2) if args.use_g else lambda q, state: q
        self.f = TransformF(1, 2) if args.use_f else lambda q, state: q

    def forward(self) -> tuple[torch.Tensor, ...]:
        """What a game needs: f^stage1 (N, A), Q_tot (J,), logits times alpha (N, A), the sum of f_i(Q_i) (J,)."""
        agents, state = torch.arange(2), torch.ones(1, 1)  # (1, S), the constant that the hypernetworks see
        stage1 = self.agent(torch.ones(2, 1))  # (N, A)
        q_i = self.g(stage1[None], state)[0]  # (N, A)
        q_tot = self.mixer(q_i[agents, self.joint_actions], state)  # (J, N), one state for all -> (J,)
        logits = self.f(q_i.detach()[None], state)[0]  # (N, A); L_pi stops here
        return stage1, q_tot, logits, logits[agents, self.joint_actions].sum(1)


def greedy_action(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Decentralised execution: the best available action of the agent network alone, (..., A) -> (...)."""
    return values.masked_fill(~mask, -torch.inf).argmax(-1)


def masked_log_policy(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log softmax over available actions, -inf for the others: logits, mask (..., A) -> (..., A)."""
    return F.log_softmax(logits.masked_fill(~mask, -torch.inf), dim=-1)


def act(logits: torch.Tensor, mask: torch.Tensor, num_envs: int, generators: list[torch.Generator]) -> torch.Tensor:
    """Sample by the Gumbel-max trick, independently for each environment and agent: (K, N, A) -> (K, E, N)."""
    log_policy = masked_log_policy(logits, mask).unsqueeze(1)  # (K, 1, N, A)
    noise = [torch.empty(num_envs, *mask.shape).exponential_(generator=generator) for generator in generators]
    return (log_policy - torch.stack(noise).log()).masked_fill(~mask, -torch.inf).argmax(-1)


def compute_losses(q_tot, f_sum, joint, reward, td_weight) -> dict[str, torch.Tensor]:
    """L_Q (Eq. 13) and L_pi (Eq. 14) of every seed, (K,) each: q_tot, f_sum (K, J), joint, reward (K, B)."""
    q_tot = q_tot.gather(1, joint)  # (K, B)
    td_error = q_tot - reward  # the game ends with its first step: no bootstrap, no entropy, no target networks
    weight = torch.where(td_error > 0, td_weight.unsqueeze(1), 1.0)
    loss_q = 0.5 * (weight * td_error.square()).mean(1)
    loss_pi = 0.5 * (f_sum.gather(1, joint) - q_tot.detach()).square().mean(1)  # trains f alone
    return {"td": loss_q, "policy": loss_pi}


def clip_grad_norm(parameters: list[torch.Tensor], max_norm: float) -> None:
    """Scale the gradients (K, ...) of each seed by themselves, so that their norm is at most max_norm."""
    norm = torch.stack([p.grad.flatten(1).square().sum(1) for p in parameters]).sum(0).sqrt()  # (K,)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1)
    for p in parameters:
        p.grad.mul_(scale.view(-1, *[1] * (p.ndim - 1)))


def summarise(tested: dict, payoff: torch.Tensor, seeds: list[int], settings: dict) -> tuple[dict, str]:
    """What the seeds at these settings have learnt: all of it, and as Table 2 one seed of the most frequent outcome."""
    learnt = {name: value.tolist() for name, value in tested.items()}
    learnt["policy"] = [[p[:size] for p, size in zip(both, payoff.shape, strict=True)] for both in learnt["policy"]]
    pays, wins, n, z = learnt["pays"], learnt["pays"].count(payoff.max()), len(seeds), 1.959964
    k = pays.index(max(pays, key=pays.count))  # the first of the seeds that earn what most seeds earn
    centre, half = wins + z * z / 2, z * math.sqrt(wins * (n - wins) / n + z * z / 4)  # Wilson's 95 % interval
    low, high = (centre - half) / (n + z * z), (centre + half) / (n + z * z)
    result = {**settings, "success_rate": wins / n, "successes": wins, "seeds": seeds}
    result |= {"interval": [low, high], "representative": seeds[k], **learnt}
    names = [chr(ord("A") + u) if u < 26 else str(u) for u in range(max(payoff.shape))]  # of actions
    rows, columns = ([f"{names[u]} {p:.2f}" for u, p in enumerate(policy)] for policy in learnt["policy"][k])
    cells = [[row, *map("{:.2f}".format, q_tot)] for row, q_tot in zip(rows, learnt["q_tot"][k], strict=True)]
    width = max(8, *(len(cell) + 2 for line in [columns, *cells] for cell in line))
    title = "".join(f", {name.replace('_', '-')} {value:g}" for name, value in settings.items())
    text = f"\n--- Q_tot of seed {seeds[k]}{title}, its policies on the margins ---\n"
    text += "".join("".join(cell.rjust(width) for cell in line) + "\n" for line in [["", *columns], *cells])
    greedy = ", ".join(names[u] for u in learnt["greedy"][k])
    text += f"greedy joint action ({greedy}) pays {pays[k]:.9g}, the most frequent outcome\n"
    text += f"optimal joint action in {wins} of {n} seeds (95 % interval {low:.2f} to {high:.2f})\n"
    return result, text


class InputError(ValueError):
    """Something the user can put right, told in one sentence. On the command line: exit code 2, no traceback."""


def write(path: Path, text: str) -> None:
    """Under a temporary name, then renamed, so that no file is ever left half written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # on a full disk


def prepare(args: Args) -> torch.Tensor:
    """The payoff (n, m); InputError for whatever the user got wrong, before a file is made."""
    for name, value in vars(args).items():
        low, high = RANGES.get(name, (1, 2**31 - 1) if type(value) is int else (1e-9, 1e6))
        if type(value) in (int, float) and not low <= value <= high:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be in [{low:g}, {high:g}].")
    if max(args.batch_size, args.num_envs) > min(args.buffer_size, args.total_timesteps):
        raise InputError("--batch-size and --num-envs must not be larger than --buffer-size or --total-timesteps.")
    try:
        lines = [] if args.payoff in GAMES else Path(args.payoff).read_text(encoding="utf-8-sig").splitlines()
        rows = [[float(value) for value in line.split(",")] for line in lines if line.strip()]
        payoff = torch.tensor(GAMES.get(args.payoff, rows), dtype=torch.float64)  # for which 1000000 is not 999999.99
    except (OSError, ValueError):
        payoff = torch.empty(0)
    if not payoff.numel() or not (payoff.abs() <= 1e6).all():
        raise InputError(f"--payoff {args.payoff} is none of {', '.join(GAMES)}, nor a CSV table of numbers up to 1e6.")
    return payoff


def train(args: Args) -> dict:
    """All seeds, at args.td_weight and at weight 1, side by side as one batch; returns what summary.json holds."""
    payoff = prepare(args)
    name = f"{Path(args.payoff).stem}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    run_dir = Path(args.run_dir or f"runs/{name}")
    try:
        run_dir.mkdir(parents=True, exist_ok=not any(run_dir.glob("*")))  # a new folder, or an empty one
        (run_dir / "config.json").touch(exist_ok=False)  # of two runs that start at once, one fails here
    except OSError as error:
        raise InputError(f"--run-dir {run_dir} already holds a run or files, or: {error.strerror}.") from None
    about = {"algorithm": ALGORITHM, "args": vars(args), "python": sys.version.split()[0], "torch": torch.__version__}
    write(run_dir / "config.json", json.dumps(about | {"payoff": payoff.tolist()}, indent=2))
    seeds, weights = list(range(args.seed, args.seed + args.num_seeds)), list(dict.fromkeys((args.td_weight, 1.0)))
    td_weight = torch.tensor([w for w in weights for _ in seeds])  # (K,), weight by weight
    models, generators = [], []  # for exploration and replay; they go on where initialisation stopped
    for seed in seeds * len(weights):
        torch.manual_seed(seed)
        models.append(Networks(payoff, args))
        generators.append(torch.Generator().set_state(torch.get_rng_state()))
    parameters, _ = stack_module_state(models)  # (K, ...) each
    networks = vmap(lambda parameters: functional_call(models[0], parameters, ()))
    groups = [[p for name, p in parameters.items() if name.startswith("f.") == is_f] for is_f in (False, True)]
    optimizer = torch.optim.Adam([{"params": g} for g in groups if g], args.learning_rate, fused=True)
    mask = torch.arange(max(payoff.shape)) < torch.tensor(payoff.shape).unsqueeze(1)  # (N, A): who has which action
    reward, best = payoff.flatten().to(td_weight), payoff.max()  # (J,), (): of each joint action, of an optimal one
    replay = torch.zeros(len(models), args.buffer_size, dtype=torch.long)  # joint actions; they fix the reward
    start, table, rounds = time.monotonic(), [], range(0, args.total_timesteps, args.num_envs)
    for begin in tqdm(rounds, unit="step", unit_scale=args.num_envs, disable=None):  # None: a bar on terminals only
        _, q_tot, logits, f_sum = networks(parameters)  # one pass for acting and learning
        action = act(logits / args.alpha, mask, args.num_envs, generators)  # (K, E, N)
        played = action[..., 0] * payoff.shape[1] + action[..., 1]  # (K, E)
        step, losses = begin + args.num_envs, {}
        replay[:, torch.arange(begin, step) % args.buffer_size] = played

        if step >= args.batch_size:
            size = min(step, args.buffer_size)
            chosen = torch.stack([torch.randint(size, (args.batch_size,), generator=g) for g in generators])
            joint = replay.gather(1, chosen)  # (K, B)
            losses = compute_losses(q_tot, f_sum, joint, reward[joint], td_weight)
            optimizer.zero_grad()
            sum(losses.values()).sum().backward()
            for group in optimizer.param_groups:
                clip_grad_norm(group["params"], args.max_grad_norm)
            optimizer.step()

        if step < args.total_timesteps and (step < args.batch_size or step % args.eval_interval >= args.num_envs):
            continue
        with torch.no_grad():
            stage1, q_tot, logits, _ = networks(parameters)
        greedy, policy = greedy_action(stage1, mask), masked_log_policy(logits / args.alpha, mask).exp()
        pays, q_tot, seconds = payoff[greedy.unbind(1)], q_tot.unflatten(1, payoff.shape), time.monotonic() - start
        if not q_tot.isfinite().all():
            raise FloatingPointError(f"Q_tot is not finite at step {step}: lower --learning-rate.")
        logs = {"episodic_return": reward[played], **losses, "q_tot": q_tot}
        logs |= {"entropy": torch.special.entr(policy).sum((1, 2)), "return_mean": pays, "success_rate": pays == best}
        for i, weight in enumerate(weights):
            means = {name: value.chunk(len(weights))[i].double().mean().item() for name, value in logs.items()}
            table.append({"step": step, "td_weight": weight, **means, "SPS": round(step * len(seeds) / seconds)})
        lines = [table[0], *(line.values() for line in table)]
        write(run_dir / "metrics.csv", "".join(",".join(map(str, line)) + "\n" for line in lines))
    tested = {"greedy": greedy, "pays": pays, "q_tot": q_tot, "policy": policy}
    blocks = [{name: value.chunk(len(weights))[i] for name, value in tested.items()} for i in range(len(weights))]
    pairs = [summarise(b, payoff, seeds, {"td_weight": w}) for b, w in zip(blocks, weights, strict=True)]
    summary = about | {"payoff": payoff.tolist(), **pairs[0][0], "weight_1": pairs[-1][0], "seconds": round(seconds, 1)}
    write(run_dir / "summary.json", json.dumps(summary, indent=2))
    print(f"Soft-QMIX on {args.payoff}, alpha {args.alpha:g}, seeds {seeds[0]} to {seeds[-1]} -> {run_dir}")
    print("".join(text for _, text in pairs), f"Picture: python plot.py '{run_dir}'", sep="\n", flush=True)
    return summary


def main() -> int:
    """The command line. Exit codes: 2 for what the user can put right, 1 for other failures."""
    try:
        train(tyro.cli(Args, description=__doc__))
    except BrokenPipeError:  # nobody reads on; the files are written
        os._exit(1)
    except (OSError, InputError, FloatingPointError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # which is PyTorch's lack of memory
            raise
        advice = "out of memory; lower --num-seeds or --buffer-size: "
        tqdm.write(f"error: {advice if isinstance(error, MemoryError | RuntimeError) else ''}{error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()  # if closed by the caller
    sys.exit(main())
