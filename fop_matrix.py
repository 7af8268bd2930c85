# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "tyro>=0.9,<2", "tqdm>=4.66"]
# ///
"""FOP (Zhang, Li, Wang, Xie, Lu 2021, ICML) on one-step matrix games: the baseline of Table 2(b) of Chen, Huang,
Schneider 2024, arXiv 2406.13930, small.

    python fop_matrix.py                                                 # 16 seeds of Table 1's game, some minutes
    python fop_matrix.py --alpha 10 --epsilon-start 0 --epsilon-finish 0 # a constant temperature, no other exploration
    python fop_matrix.py --payoff my_game.csv                            # table1, released, climbing, penalty or a file

Two agents choose a row and a column at the same time, and both receive that cell of the payoff. Each has a policy and
values q_i; two critics join the values to Q_tot (FOP's Q_jt) by weights lambda that depend on the joint action. So
Q_tot can equal any payoff, and its best joint action need not be made of the actions that q_i, and so the policies,
prefer: nearly all seeds know the best cell and choose another. `diff softqmix_matrix.py fop_matrix.py` is what differs.

Shape comments: K seeds, B games of a batch, E environments, N = 2 agents, A actions, J = n * m joint actions, H hidden
units, S = 1 state, C = 2 critics. Table 10, appendix and other tables are those of Chen, Huang, Schneider."""

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
RANGES = {"seed": (0, 2**31 - 1), "num_seeds": (1, 10_000), "epsilon_start": (0, 1), "epsilon_finish": (0, 1)}
RANGES |= {"epsilon_anneal_time": (0, 2**31 - 1)}


@dataclass
class Args:
    exp_name: str = ALGORITHM  # name of this experiment, part of the run's name
    payoff: str = "table1"  # table1, released, climbing, penalty, or a CSV file: a line for each of agent 1's actions
    seed: int = 1  # the first seed; each fixes the networks, exploration and replay of its own row
    num_seeds: int = 16  # independent seeds, trained side by side as one batch
    run_dir: str | None = None  # new or empty folder; default runs/{payoff}__{exp_name}__{seed}__{time}-{process}
    total_timesteps: int = 10_000  # games played by each seed (section 5.1)
    num_envs: int = 1  # games played before each update (FOP's released code)
    batch_size: int = 32  # games in an update (FOP's released code)
    buffer_size: int = 5000  # games in the replay (Table 10)
    burn_in: int = 100  # games before the first update (Table 10: "Burn In Period")
    learning_rate: float = 5e-4  # of RMSprop (Table 10)
    max_grad_norm: float = 10.0  # gradient norm is clipped to this, separately for each seed, the actor and each critic
    num_heads: int = 4  # whose weights are added to lambda_i (Table 10)
    eval_interval: int = 500  # games between tests of the greedy joint action
    alpha: float | None = None  # temperature, in units of Q_tot; None: falls from .5 to .05 in 90,000 games (released)
    epsilon_start: float = 1.0  # chance of a random action at the start (Table 10)
    epsilon_finish: float = 0.05  # chance of a random action once annealed (Table 10)
    epsilon_anneal_time: int = 50_000  # games over which it falls (Table 10): 10,000 end at .81


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


class Critic(nn.Module):
    """q_i, a perceptron shared by both agents, and what joins q_i to Q_tot: lambda_i, and V of the state."""

    def __init__(self, num_agents: int, num_actions: int, num_heads: int, state_size: int = 1, hidden_size: int = 64):
        super().__init__()
        layers = nn.Linear(1 + num_agents, hidden_size), nn.ReLU(), nn.Linear(hidden_size, hidden_size), nn.ReLU()
        self.q = nn.Sequential(*layers, nn.Linear(hidden_size, num_actions))
        self.key = nn.Linear(state_size, num_heads)
        self.agent = nn.Linear(state_size, num_heads * num_agents)
        self.action = nn.Linear(state_size + num_agents * num_actions, num_heads * num_agents)
        self.v = nn.Sequential(nn.Linear(state_size, 32), nn.ReLU(), nn.Linear(32, 1))

    def weight(self, state: torch.Tensor, joint: torch.Tensor) -> torch.Tensor:
        """lambda_i = sum_k |key_k(s)| sigmoid(agent_ki(s)) sigmoid(action_ki(s, u)) >= 0: state (J, S), one-hot joint
        actions (J, N, A) -> (J, N)."""
        size = (len(joint), -1, joint.shape[1])  # (J, heads, N)
        agent, action = self.agent(state), self.action(torch.cat([state, joint.flatten(1)], dim=1))
        agent, action = agent.sigmoid().view(size), action.sigmoid().view(size)
        return (self.key(state).abs().unsqueeze(-1) * agent * action).sum(1)

    def forward(self, obs, state, joint, mask, alpha) -> tuple[torch.Tensor, torch.Tensor]:
        """obs (N, 1), state (J, S), one-hot joint actions (J, N, A), mask (N, A), alpha -> q_i (N, A), Q_tot (J,).
        The gradient of Q_tot reaches q_i with weight 1 and lambda through the advantage q_i - v_i, which is frozen."""
        q = self.q(torch.cat([obs, torch.eye(len(obs))], dim=-1)).masked_fill(~mask, 0)  # (N, A)
        v_i = alpha * (q.masked_fill(~mask, -torch.inf) / alpha).logsumexp(-1)  # (N,), the soft value
        q_i = (q * joint).sum(-1)  # (J, N), of the actions taken
        correction = (self.weight(state, joint) - 1) * (q_i - v_i).detach()
        return q, q_i.sum(1) + self.v(state).squeeze(1) + correction.sum(1)


class Networks(nn.Module):
    """All networks of a seed. Each critic is trained for itself; the actor learns from the lower of their q_i."""

    def __init__(self, payoff: torch.Tensor, args: Args):
        super().__init__()
        joint_actions = torch.cartesian_prod(*map(torch.arange, payoff.shape))  # (J, N)
        self.joint = F.one_hot(joint_actions, max(payoff.shape)).to(torch.get_default_dtype())  # (J, N, A)
        self.mask = self.joint.sum(0) > 0  # (N, A): who has which action
        self.actor = Agent(2, max(payoff.shape))
        self.critic_1 = Critic(2, max(payoff.shape), args.num_heads)
        self.critic_2 = Critic(2, max(payoff.shape), args.num_heads)

    def forward(self, alpha: float) -> tuple[torch.Tensor, ...]:
        """What a game needs at this temperature: logits (N, A), q_i (C, N, A), Q_tot (C, J)."""
        obs, state = torch.ones(2, 1), torch.ones(len(self.joint), 1)  # constants in a game without a state
        critics = [c(obs, state, self.joint, self.mask, alpha) for c in (self.critic_1, self.critic_2)]
        q, q_tot = map(torch.stack, zip(*critics, strict=True))
        return self.actor(obs), q, q_tot


def greedy_action(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Decentralised execution: the best available action of the agent network alone, (..., A) -> (...)."""
    return values.masked_fill(~mask, -torch.inf).argmax(-1)


def masked_log_policy(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log softmax over available actions, -inf for the others: logits, mask (..., A) -> (..., A)."""
    return F.log_softmax(logits.masked_fill(~mask, -torch.inf), dim=-1)


def epsilon_at(step: int, args: Args) -> float:
    """Probability of a random action, annealed linearly from epsilon_start to epsilon_finish."""
    progress = min(1.0, step / args.epsilon_anneal_time) if args.epsilon_anneal_time else 1.0
    return args.epsilon_start + progress * (args.epsilon_finish - args.epsilon_start)


def alpha_at(step: int, args: Args) -> float:
    """Temperature: constant if given, else from .5 to .05 over 90,000 games, as in FOP's released code."""
    return max(0.05, 0.5 - step / 200_000) if args.alpha is None else args.alpha


def acting_policy(logits: torch.Tensor, mask: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The policy in acting, with probability epsilon a random available action: logits, mask (..., A) -> (..., A)."""
    return (1 - epsilon) * masked_log_policy(logits, mask).exp() + epsilon * mask / mask.sum(-1, keepdim=True)


def act(logits: torch.Tensor, mask: torch.Tensor, num_envs: int, generators: list[torch.Generator]) -> torch.Tensor:
    """Sample by the Gumbel-max trick, independently for each environment and agent: (K, N, A) -> (K, E, N)."""
    log_policy = masked_log_policy(logits, mask).unsqueeze(1)  # (K, 1, N, A)
    noise = [torch.empty(num_envs, *mask.shape).exponential_(generator=generator) for generator in generators]
    return (log_policy - torch.stack(noise).log()).masked_fill(~mask, -torch.inf).argmax(-1)


def compute_losses(logits, q, q_tot, mask, joint, reward, alpha) -> dict[str, torch.Tensor]:
    """Of every seed, (K,) each: logits (K, N, A), q_i (K, C, N, A), Q_tot (K, C, J), mask (N, A), joint, reward (K, B).
    All games have the same observation, so the policy's loss needs none of the batch."""
    td_error = q_tot.gather(2, joint.unsqueeze(1).expand(-1, 2, -1)) - reward.unsqueeze(1)  # (K, C, B); no bootstrap
    log_policy = masked_log_policy(logits, mask)
    gain = (q.min(1).values.detach() - alpha * log_policy).masked_fill(~mask, 0)  # (K, N, A), of value and of entropy
    loss_pi = -(log_policy.exp() * gain).sum(-1).mean(1)  # in closed form; least for softmax(q_i / alpha)
    return {"td": td_error.square().mean(2).sum(1), "policy": loss_pi}


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
    if max(args.burn_in, args.num_envs) > min(args.buffer_size, args.total_timesteps):
        raise InputError("--burn-in and --num-envs must not be larger than --buffer-size or --total-timesteps.")
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
    """All seeds side by side as one batch; returns what summary.json holds."""
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
    seeds = list(range(args.seed, args.seed + args.num_seeds))
    models, generators = [], []  # for exploration and replay; they go on where initialisation stopped
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(Networks(payoff, args))
        generators.append(torch.Generator().set_state(torch.get_rng_state()))
    parameters, _ = stack_module_state(models)  # (K, ...) each
    networks = vmap(lambda parameters, alpha: functional_call(models[0], parameters, (alpha,)), in_dims=(0, None))
    groups = [[p for name, p in parameters.items() if name.startswith(n)] for n in ("actor", "critic_1", "critic_2")]
    optimizer = torch.optim.RMSprop([{"params": g} for g in groups], args.learning_rate, alpha=0.99, eps=1e-5)
    mask = models[0].mask  # (N, A)
    reward, best = payoff.flatten().to(models[0].joint), payoff.max()  # (J,), what an optimum pays
    replay = torch.zeros(len(models), args.buffer_size, dtype=torch.long)  # joint actions; they fix the reward
    start, table, rounds = time.monotonic(), [], range(0, args.total_timesteps, args.num_envs)
    for begin in tqdm(rounds, unit="step", unit_scale=args.num_envs, disable=None):  # None: a bar on terminals only
        alpha, epsilon = alpha_at(begin + args.num_envs, args), epsilon_at(begin, args)
        logits, q, q_tot = networks(parameters, alpha)  # one pass for acting and learning
        action = act(acting_policy(logits, mask, epsilon).log(), mask, args.num_envs, generators)  # (K, E, N)
        played = action[..., 0] * payoff.shape[1] + action[..., 1]  # (K, E)
        step, losses = begin + args.num_envs, {}
        replay[:, torch.arange(begin, step) % args.buffer_size] = played

        if step >= args.burn_in:
            size = min(step, args.buffer_size)
            chosen = torch.stack([torch.randint(size, (args.batch_size,), generator=g) for g in generators])
            joint = replay.gather(1, chosen)  # (K, B)
            losses = compute_losses(logits, q, q_tot, mask, joint, reward[joint], alpha)
            optimizer.zero_grad()
            sum(losses.values()).sum().backward()
            for group in optimizer.param_groups:
                clip_grad_norm(group["params"], args.max_grad_norm)
            optimizer.step()

        if step < args.total_timesteps and (step < args.burn_in or step % args.eval_interval >= args.num_envs):
            continue
        alpha, epsilon = alpha_at(step, args), epsilon_at(step, args)
        with torch.no_grad():
            logits, _, q_tot = networks(parameters, alpha)
        q_tot = q_tot.min(1).values  # (K, J): FOP's targets, where there are any, use the lower of both, too
        greedy, policy = greedy_action(logits, mask), masked_log_policy(logits, mask).exp()
        argmax = torch.stack(torch.unravel_index(q_tot.argmax(1), payoff.shape), dim=1)  # (K, N)
        pays, q_tot, seconds = payoff[greedy.unbind(1)], q_tot.unflatten(1, payoff.shape), time.monotonic() - start
        if not q_tot.isfinite().all():
            raise FloatingPointError(f"Q_tot is not finite at step {step}: lower --learning-rate.")
        logs = {"episodic_return": reward[played], **losses, "q_tot": q_tot}
        logs |= {"entropy": torch.special.entr(policy).sum((1, 2)), "return_mean": pays, "success_rate": pays == best}
        logs |= {"argmax_success_rate": payoff[argmax.unbind(1)] == best}
        means = {name: value.double().mean().item() for name, value in logs.items()}
        means |= {"alpha": alpha, "epsilon": epsilon, "SPS": round(step * len(seeds) / seconds)}
        table.append({"step": step, **means})
        lines = [table[0], *(line.values() for line in table)]
        write(run_dir / "metrics.csv", "".join(",".join(map(str, line)) + "\n" for line in lines))
    tested = {"greedy": greedy, "pays": pays, "q_tot": q_tot, "policy": policy}
    result, text = summarise(tested, payoff, seeds, {"alpha": alpha, "epsilon": epsilon})
    acting = [[[(1 - epsilon) * p + epsilon / len(pi) for p in pi] for pi in both] for both in result["policy"]]
    of_q_tot, _ = summarise(tested | {"greedy": argmax, "pays": payoff[argmax.unbind(1)]}, payoff, seeds, {})
    wins, (low, high) = of_q_tot["successes"], of_q_tot["interval"]
    result |= {"argmax": argmax.tolist(), "argmax_successes": wins, "argmax_interval": [low, high], "acting": acting}
    text += f"argmax of Q_tot optimal in {wins} of {len(seeds)} seeds (95 % interval {low:.2f} to {high:.2f})\n"
    agents = (" ".join(f"{p:.2f}" for p in policy) for policy in acting[seeds.index(result["representative"])])
    text += f"with its epsilon the agents play {', '.join(agents)}\n"
    summary = about | {"payoff": payoff.tolist(), **result, "seconds": round(seconds, 1)}
    write(run_dir / "summary.json", json.dumps(summary, indent=2))
    print(f"FOP on {args.payoff}, seeds {seeds[0]} to {seeds[-1]} -> {run_dir}", text, sep="\n")
    print(f"Picture: python plot.py '{run_dir}'", flush=True)
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
