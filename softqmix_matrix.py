"""Soft-QMIX on one-step matrix games (section 5.1 of Chen, Huang, Schneider 2024, arXiv 2406.13930): all of it, small.

    python softqmix_matrix.py                                  # 16 seeds of Table 1's game, under a minute on a CPU
    python softqmix_matrix.py --payoff climbing --alpha 3      # another game: table1, released, climbing, penalty
    python softqmix_matrix.py --payoff my_game.csv             # or your own: n lines of m numbers

Two agents choose a row and a column at the same time and both receive that cell of the payoff. What is learnt is
printed in the layout of Table 2, with the number of seeds whose greedy joint action pays most. Expect nearly all seeds
to find the optimum, and next to it the same seeds at --td-weight 1, the loss as the paper writes it: few of them do.
The optimistic weight does the work on this game, not the entropy; results/matrix.md has the figures.

Equation, table and appendix numbers are the paper's. Letters in shape comments: K independent rows (one seed at one
weight), B transitions of a batch, E environments, N = 2 agents, A actions, J = n * m joint actions, S = 1 state.
"""

import io
import json
import math
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

GAMES = {
    "table1": ((8, -12, -12), (-12, 0, 0), (-12, 0, 0)),
    "released": ((12, -0.1, -0.1), (-0.1, 0, 0), (-0.1, 0, 0)),  # the payoff in the authors' published code
    "climbing": ((11, -30, 0), (-30, 7, 6), (0, 0, 5)),  # Claus and Boutilier 1998
    "penalty": ((10, 0, -100), (0, 2, 0), (-100, 0, 10)),  # the same authors, k = -100; two optima
}


@dataclass
class Args:
    exp_name: str = "softqmix_matrix"  # name of this experiment, part of the run's name
    payoff: str = "table1"  # table1, released, climbing, penalty, or a CSV file: a line for each of agent 1's actions
    seed: int = 1  # the first seed; each fixes the networks, exploration and replay of its own row
    num_seeds: int = 16  # independent seeds, trained side by side as one batch
    run_dir: str | None = None  # folder of this run; default runs/{payoff}__{exp_name}__{seed}__{time}
    total_timesteps: int = 10_000  # games played by each seed (section 5.1)
    num_envs: int = 4  # games played before each update (Table 8)
    batch_size: int = 128  # games in an update (Table 8); the first update waits for this many
    buffer_size: int = 5000  # games in the replay (Table 8)
    learning_rate: float = 1e-3  # of Adam (Table 8)
    max_grad_norm: float = 10.0  # gradient norm is clipped to this, separately for each seed and each loss
    td_weight: float = 0.1  # of squared TD errors where Q_tot exceeds its target; 1, the paper's Eq. 13, is trained too
    mixer: Literal["qmix", "vdn"] = "qmix"  # qmix: the monotonic network; vdn: the plain sum of Q_i
    eval_interval: int = 500  # games between tests of the greedy joint action
    alpha: float = 1.0  # temperature of the policy, in units of Q_tot
    use_g: bool = True  # transform the agents' values by g_i (Table 4: without it, "+function f")
    use_f: bool = True  # transform Q_i by f_i (Table 4: without g and f, "+entropy"); else alpha is in units of Q_i


class InputError(ValueError):
    """Something the user can put right, told in one sentence. On the command line: exit code 2, no traceback."""


def check_args(args: Args) -> None:
    """Raise InputError for impossible settings."""
    counts = ("num_seeds", "total_timesteps", "num_envs", "batch_size", "buffer_size", "eval_interval")
    lowest = dict.fromkeys(counts, 1) | dict.fromkeys(("learning_rate", "max_grad_norm", "alpha"), 1e-9)
    for name, low in (lowest | {"seed": 0, "td_weight": 0}).items():
        if not low <= getattr(args, name) <= 1e9:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be in [{low:g}, 1e9].")
    if max(args.batch_size, args.num_envs) > min(args.buffer_size, args.total_timesteps):
        raise InputError("--batch-size and --num-envs must not be larger than --buffer-size or --total-timesteps.")


def load_payoff(name: str):
    """The payoff of that name or in that CSV file, as rows of numbers."""
    try:
        lines = [] if name in GAMES else Path(name).read_text(encoding="utf-8-sig").splitlines()
        rows = GAMES.get(name) or [[float(value) for value in line.split(",")] for line in lines if line.strip()]
    except (OSError, ValueError):
        rows = []
    if len(set(map(len, rows))) != 1 or not all(abs(value) <= 1e6 for row in rows for value in row):
        file = "a readable file of lines with equally many numbers up to 1e6, separated by commas"
        raise InputError(f"--payoff {name} is neither one of {', '.join(GAMES)} nor {file}.")
    return rows


class Game:
    """Two agents, a payoff (n, m), one step. An agent with fewer actions than the other has the rest masked."""

    def __init__(self, payoff):
        self.payoff = torch.as_tensor(payoff, dtype=torch.get_default_dtype())  # (n, m)
        n, m = self.payoff.shape
        self.mask = torch.arange(max(n, m)) < torch.tensor([[n], [m]])  # (N, A)
        self.joint_actions = torch.cartesian_prod(torch.arange(n), torch.arange(m))  # (J, N)
        self.names = [[chr(ord("A") + u) if u < 26 else str(u) for u in range(size)] for size in (n, m)]  # of actions

    def joint(self, action: torch.Tensor) -> torch.Tensor:
        """action (..., N) -> which of the J joint actions (...)."""
        return action[..., 0] * self.payoff.shape[1] + action[..., 1]


class Agent(nn.Module):
    """f^stage1: linear, ReLU, GRU, linear, shared by both agents; all that execution needs.

    In a one-step game nothing precedes: there is no last action, and the GRU starts from a zero hidden state, which
    leaves of it the gates written out here (a plain ReLU network instead finds other solutions: results/matrix.md).
    """

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


class VDNMixer(nn.Module):
    """Q_tot as the plain sum of Q_i: value decomposition networks (Sunehag et al. 2017)."""

    def forward(self, q: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """q (R, N), state (R, S), unused -> Q_tot (R,)."""
        return q.sum(1)


class TransformG(nn.Module):
    """g_i(x, s) = x + |W2_i(s)| elu(|W1_i(s)| x + b1_i(s)) + b2_i(s) (Eq. 8), for each action's value x by itself.

    One set of generated weights per agent. The residual x (appendix G) has slope 1, so the order is kept strictly.
    """

    def __init__(self, state_size: int, num_agents: int, embed: int = 32):
        super().__init__()
        self.num_agents = num_agents
        self.w1 = hypernetwork(state_size, num_agents * embed)
        self.b1 = nn.Linear(state_size, num_agents * embed)
        self.w2 = hypernetwork(state_size, num_agents * embed)
        self.b2 = hypernetwork(state_size, num_agents)

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """x (R, N, K): values of K actions, state (R, S) -> Q_i (R, N, K)."""
        w1 = self.w1(state).abs().view(len(x), self.num_agents, 1, -1)  # (R, N, 1, embed)
        b1 = self.b1(state).view_as(w1)
        w2 = self.w2(state).abs().view(len(x), self.num_agents, -1, 1)  # (R, N, embed, 1)
        hidden = F.elu(torch.addcmul(b1, x.unsqueeze(-1), w1), inplace=True)  # (R, N, K, embed)
        return x + (hidden @ w2).squeeze(-1) + self.b2(state).unsqueeze(-1)


class TransformF(nn.Module):
    """f_i(q, s) = |w_i(s)| q + b_i(s) (appendix G): keeps the order of actions, weakly, since w_i may be 0."""

    def __init__(self, state_size: int, num_agents: int):
        super().__init__()
        self.w = hypernetwork(state_size, num_agents)
        self.b = hypernetwork(state_size, num_agents)

    def forward(self, q: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """q (R, N, K), state (R, S) -> logits times alpha (R, N, K)."""
        return self.w(state).abs().unsqueeze(-1) * q + self.b(state).unsqueeze(-1)


class Values(NamedTuple):
    """All that the networks say of the game; with a leading K once the seeds are batched."""

    stage1: torch.Tensor  # (N, A) f^stage1
    q_tot: torch.Tensor  # (J,) Q_tot of each joint action
    logits: torch.Tensor  # (N, A) f_i(Q_i), or Q_i without f: times 1 / alpha, the policy's logits
    f_sum: torch.Tensor  # (J,) sum of f_i(Q_i) for each joint action


class Networks(nn.Module):
    """theta, trained by L_Q (Eq. 13): agent, g and mixer; phi, trained by L_pi (Eq. 14): f."""

    def __init__(self, game: Game, args: Args):
        super().__init__()
        self.joint_actions = game.joint_actions
        self.agent = Agent(*game.mask.shape)
        self.mixer = Mixer(1, 2) if args.mixer == "qmix" else VDNMixer()
        self.g = TransformG(1, 2) if args.use_g else lambda x, state: x
        self.f = TransformF(1, 2) if args.use_f else lambda q, state: q

    def forward(self) -> Values:
        agents, state = torch.arange(2), torch.ones(1, 1)  # (1, S), the constant that the hypernetworks see
        stage1 = self.agent(torch.ones(2, 1))  # (N, A)
        q_i = self.g(stage1[None], state)[0]  # (N, A)
        q_tot = self.mixer(q_i[agents, self.joint_actions], state)  # (J, N), one state for all -> (J,)
        logits = self.f(q_i.detach()[None], state)[0]  # (N, A); L_pi stops here
        return Values(stage1, q_tot, logits, logits[agents, self.joint_actions].sum(1))


def masked_log_policy(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log softmax over available actions, -inf for the others: logits, mask (..., A) -> (..., A)."""
    return F.log_softmax(logits.masked_fill(~mask, -torch.inf), dim=-1)


def greedy_action(stage1: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Decentralised execution: the best available action of the agent network alone, (..., A) -> (...)."""
    return stage1.masked_fill(~mask, -torch.inf).argmax(-1)


def policy(values: Values, game: Game, args: Args) -> torch.Tensor:
    """pi_i(u | o_i, s) = softmax(f_i(Q_i(o_i, u)) / alpha) (Eq. 15): (K, N, A)."""
    return masked_log_policy(values.logits / args.alpha, game.mask).exp()


def act(values: Values, game: Game, args: Args, generators: list[torch.Generator]) -> torch.Tensor:
    """Sample from the policy, independently for each environment and agent, by the Gumbel-max trick: (K, E, N)."""
    log_policy = masked_log_policy(values.logits / args.alpha, game.mask).unsqueeze(1)  # (K, 1, N, A)
    shape = (args.num_envs, *game.mask.shape)  # (E, N, A)
    exponential = torch.stack([torch.empty(shape).exponential_(generator=generator) for generator in generators])
    return (log_policy - exponential.log()).masked_fill(~game.mask, -torch.inf).argmax(-1)


def compute_losses(values: Values, joint: torch.Tensor, reward: torch.Tensor, td_weight: torch.Tensor):
    """L_Q (Eq. 13) and L_pi (Eq. 14) of every seed, (K,) each: joint, reward (K, B), td_weight (K,).

    The game ends with its first step, so the target is the reward: no bootstrap, no entropy, no target networks.
    """
    q_tot = values.q_tot.gather(1, joint)  # (K, B)
    td_error = q_tot - reward
    weight = torch.where(td_error > 0, td_weight.unsqueeze(1), 1.0)
    loss_q = 0.5 * (weight * td_error.square()).mean(1)
    loss_pi = 0.5 * (values.f_sum.gather(1, joint) - q_tot.detach()).square().mean(1)  # trains f alone
    return {"losses/td": loss_q, "losses/policy": loss_pi}


def clip_grad_norm(parameters: list[torch.Tensor], max_norm: float) -> None:
    """Scale the gradients (K, ...) of each seed by themselves, so that their norm is at most max_norm."""
    norm = torch.stack([p.grad.flatten(1).square().sum(1) for p in parameters]).sum(0).sqrt()  # (K,)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1)
    for p in parameters:
        p.grad.mul_(scale.view(-1, *[1] * (p.ndim - 1)))


class Seeds:
    """Networks, exploration and replay of K independent seeds, each of which draws from its own random numbers alone.

    So a seed learns the same by itself or beside others, but for the rounding of batched matrix products.
    """

    def __init__(self, game: Game, args: Args, seeds: list[int], td_weight: list[float]):
        self.game, self.args, self.step, self.td_weight = game, args, 0, torch.tensor(td_weight)  # (K,)
        models, self.generators = [], [torch.Generator() for _ in seeds]
        for seed, generator in zip(seeds, self.generators, strict=True):
            torch.manual_seed(seed)
            models.append(Networks(game, args))
            generator.set_state(torch.get_rng_state())  # exploration and replay go on where initialisation stopped
        self.networks = vmap(lambda parameters: functional_call(models[0], parameters, ()))
        self.parameters, _ = stack_module_state(models)  # (K, ...) each
        groups = [[p for name, p in self.parameters.items() if name.startswith("f.") == is_f] for is_f in (False, True)]
        groups = [{"params": group} for group in groups if group]  # theta and phi
        self.optimizer = torch.optim.Adam(groups, args.learning_rate, fused=True)  # one for all: it is elementwise
        self.replay = torch.zeros(len(seeds), args.buffer_size, dtype=torch.long)  # joint actions; they fix the reward

    def values(self) -> Values:
        return self.networks(self.parameters)

    def advance(self) -> dict[str, torch.Tensor]:
        """Play num_envs games and learn once; returns what is to be logged, (K, ...) each."""
        values, args = self.values(), self.args  # one pass: acting and learning see the same networks
        payoff = self.game.payoff.flatten()  # (J,)
        played = self.game.joint(act(values, self.game, args, self.generators))  # (K, E)
        self.replay[:, torch.arange(self.step, self.step + args.num_envs) % args.buffer_size] = played
        self.step += args.num_envs
        losses = {}
        if self.step >= args.batch_size:
            size = min(self.step, args.buffer_size)
            chosen = torch.stack([torch.randint(size, (args.batch_size,), generator=g) for g in self.generators])
            joint = self.replay.gather(1, chosen)  # (K, B)
            losses = compute_losses(values, joint, payoff[joint], self.td_weight)
            self.optimizer.zero_grad()
            sum(losses.values()).sum().backward()
            for group in self.optimizer.param_groups:
                clip_grad_norm(group["params"], args.max_grad_norm)
            self.optimizer.step()
        return {"charts/episodic_return": payoff[played]} | losses

    @torch.no_grad()
    def test(self) -> dict[str, torch.Tensor]:
        """What was learnt: greedy joint actions (K, N), what they pay (K,), Q_tot (K, n, m), policies (K, N, A)."""
        values, payoff = self.values(), self.game.payoff
        greedy, pi = greedy_action(values.stage1, self.game.mask), policy(values, self.game, self.args)
        pays = payoff.flatten()[self.game.joint(greedy)]
        return {"greedy": greedy, "pays": pays, "q_tot": values.q_tot.unflatten(1, payoff.shape), "policy": pi}


def wilson_interval(wins: float, n: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927)."""
    z, p = 1.959964, wins / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def summarise(tested: dict[str, torch.Tensor], game: Game, seeds: list[int], td_weight: float) -> dict:
    """Of the seeds at one weight: how many found an optimal joint action, and what each has learnt."""
    learnt = {name: value.tolist() for name, value in tested.items()}
    pays, (n, m) = learnt["pays"], game.payoff.shape
    wins = pays.count(game.payoff.max().item())
    shown = seeds[pays.index(max(pays, key=pays.count))]  # the first of the seeds that earn what most seeds earn
    learnt["policy"] = [[row[:n], column[:m]] for row, column in learnt["policy"]]
    result = {"td_weight": td_weight, "success_rate": wins / len(seeds), "successes": wins, "seeds": seeds}
    return result | {"interval": wilson_interval(wins, len(seeds)), "representative": shown, **learnt}


def report(game: Game, results: list[dict], title: str) -> Figure:
    """Print Q_tot and policies of the representative seeds in the layout of Table 2; draw them beside the payoff."""
    panels = [("payoff", game.payoff.tolist(), *game.names)]
    for r in results:
        k, n, (low, high) = r["seeds"].index(r["representative"]), len(r["seeds"]), r["interval"]
        q_tot, policies = r["q_tot"][k], r["policy"][k]
        name = f"Q_tot of seed {r['representative']}, td-weight {r['td_weight']:g}"
        rows, columns = ([f"{u} {p:.2f}" for u, p in zip(game.names[i], policies[i], strict=True)] for i in range(2))
        panels.append((name, q_tot, rows, columns))
        print(f"\n--- {name}, its policies on the margins ---\n{'':8}" + "".join(f"{label:>8}" for label in columns))
        for label, values in zip(rows, q_tot, strict=True):
            print(f"{label:>8}" + "".join(f"{value:8.2f}" for value in values))
        greedy = ", ".join(game.names[i][u] for i, u in enumerate(r["greedy"][k]))
        print(f"greedy joint action ({greedy}) pays {r['pays'][k]:g}, the most frequent outcome")
        print(f"optimal joint action in {r['successes']} of {n} seeds (95 % interval {low:.2f} to {high:.2f})")
    figure = Figure(figsize=(4.2 * len(panels), 4.4), layout="constrained")
    figure.suptitle(title)
    for axes, (name, matrix, rows, columns) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.imshow(matrix, alpha=0.6, vmin=game.payoff.min().item(), vmax=game.payoff.max().item())
        axes.set(title=name, xticks=range(len(columns)), xticklabels=columns, yticks=range(len(rows)), yticklabels=rows)
        for i, j in game.joint_actions.tolist():
            axes.text(j, i, f"{round(matrix[i][j], 2):g}", ha="center", va="center")
    return figure


def write_file(path: Path, content: str | bytes) -> None:
    """Write under a temporary name and rename, so that no file is ever left half written."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


def train(args: Args) -> dict:
    """Run the experiment at args.td_weight and at weight 1 and return what summary.json holds."""
    check_args(args)
    game = Game(load_payoff(args.payoff))
    name = f"{Path(args.payoff).stem}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.run_dir or f"runs/{name}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.json").touch(exist_ok=False)
    except OSError as error:
        raise InputError(f"--run-dir {run_dir} already holds a run or cannot be written ({error.strerror}).") from None
    about = {"args": vars(args), "python": sys.version.split()[0], "torch": torch.__version__}
    write_file(run_dir / "config.json", json.dumps(about, indent=2))
    seeds, weights = list(range(args.seed, args.seed + args.num_seeds)), list(dict.fromkeys((args.td_weight, 1.0)))
    title = f"Soft-QMIX on {args.payoff}, alpha {args.alpha:g}, seeds {seeds[0]} to {seeds[-1]}"
    print(f"{title} -> {run_dir}", flush=True)

    learners = Seeds(game, args, seeds * len(weights), [w for w in weights for _ in seeds])  # K rows, weight by weight
    writers = [SummaryWriter(str(run_dir / f"td_weight_{w:g}")) for w in weights]
    start_time, table = time.time(), []
    bar = tqdm(range(0, args.total_timesteps, args.num_envs), unit="step", unit_scale=args.num_envs, mininterval=1)
    for _ in bar:
        logs, step = learners.advance(), learners.step
        if step < args.total_timesteps and (step < args.batch_size or step % args.eval_interval >= args.num_envs):
            continue
        tested, results, sps = learners.test(), [], round(step * args.num_seeds / (time.time() - start_time))
        if not tested["q_tot"].isfinite().all():
            raise FloatingPointError(f"Q_tot is not finite at step {step}: lower --learning-rate.")
        logs |= {"losses/q_tot": tested["q_tot"], "losses/entropy": torch.special.entr(tested["policy"]).sum((1, 2))}
        logs |= {"eval/return_mean": tested["pays"], "eval/success_rate": tested["pays"] == game.payoff.max()}
        for i, (weight, writer) in enumerate(zip(weights, writers, strict=True)):
            rows = slice(i * args.num_seeds, (i + 1) * args.num_seeds)
            results.append(summarise({name: value[rows] for name, value in tested.items()}, game, seeds, weight))
            means = {name: value[rows].double().mean().item() for name, value in logs.items()} | {"charts/SPS": sps}
            for name, mean in means.items():
                writer.add_scalar(name, mean, step)
            table.append({"step": step, "td_weight": weight, **{name.split("/")[1]: m for name, m in means.items()}})
        lines = [",".join(map(str, line)) for line in (table[0], *(row.values() for row in table))]
        write_file(run_dir / "metrics.csv", "\n".join(lines) + "\n")
        bar.set_postfix({f"optimal at weight {r['td_weight']:g}": f"{r['successes']}/{len(seeds)}" for r in results})

    figure, picture = report(game, results, title), io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_file(run_dir / "q_tot.png", picture.getvalue())
    writers[0].add_figure("q_tot", figure, step)
    for writer in writers:
        writer.close()
    seconds = round(time.time() - start_time, 1)
    summary = about | {"payoff": game.payoff.tolist(), **results[0], "weight_1": results[-1], "seconds": seconds}
    write_file(run_dir / "summary.json", json.dumps(summary, indent=2))
    print(f"\nPicture: {run_dir / 'q_tot.png'}")
    return summary


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)  # the matrices are tiny: more threads would only wait for each other
    threading.excepthook = lambda _: None  # TensorBoard's thread fails on a full disk: train() is told, too
    try:
        train(args)
    except (InputError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise  # PyTorch says it in words only
        print(f"error: out of memory; lower --num-seeds, --batch-size or --buffer-size. ({error})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
