"""Time of one full update (sample, forward, targets, losses, backward, clip, step), and its distance from the limit.

    python benchmarks/learner.py                              # three sizes; fixed, short and long-tailed lengths
    python benchmarks/learner.py --sizes protoss_5_vs_5 --threads 1 --json learner.json

Sizes: MPE Spread (128 episodes of 25 steps), protoss 5 against 5 (60 steps), protoss 10 against 10 (100 steps). Mixed
lengths are those of simulator battles under random play; trained ones follow the replay of a run of 500,000 steps,
whose few long battles make the longest of a batch twice as long as the mean.

Three figures tell how much could be gained: the floating-point operations of all matrix products, counted by PyTorch,
at the rate measured for one large product; the bytes that all operations read and write, at the bandwidth measured for
one large copy (the cache is faster); and the number of operations, each of which takes a few microseconds to launch,
whatever its size. Each case runs in a process of its own, its parts in turns; the minimum of --repeats counts. Timings
are noisy on shared machines: compare figures of one call only.
"""

import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import softqmix_smacv2 as script
from benchmarks.options import too_low, wrong_json
from envs.smacv2_sim import SMACv2Sim, random_actions

SIZES = {  # fixed length; agents, observation, state, actions
    "mpe": (25, SimpleNamespace(num_agents=3, obs_size=18, state_size=54, num_actions=5)),
    "protoss_5_vs_5": (60, SimpleNamespace(num_agents=5, obs_size=92, state_size=130, num_actions=11)),
    "protoss_10_vs_10": (100, SimpleNamespace(num_agents=10, obs_size=182, state_size=310, num_actions=16)),
}
# Percentiles of the lengths of the 5,000 battles in the replay of results/smacv2_sim.md's first Soft-QMIX run.
TRAINED = {
    "protoss_5_vs_5": ((0, 1, 5, 25, 50, 75, 95, 99, 99.5, 99.9, 100), (20, 32, 38, 45, 51, 59, 75, 91, 100, 128, 176))
}


@dataclass
class Args:
    sizes: tuple[Literal["mpe", "protoss_5_vs_5", "protoss_10_vs_10"], ...] = tuple(SIZES)  # which problems
    batch_size: int = 128  # episodes
    repeats: int = 7  # the minimum of so many is printed
    threads: int = 2  # of PyTorch on the CPU; the scripts take one
    cuda: bool = True  # use the GPU if there is one
    json: str | None = None  # also write the figures to this file


def battle_lengths(map_name: str, count: int) -> list[int]:
    """Lengths of the first battles of `count` environments under random play."""
    env, rng = SMACv2Sim(map_name, count, seed=0), np.random.default_rng(0)
    _, info = env.reset()
    lengths, step = np.zeros(count, int), 0
    while (lengths == 0).any():
        step += 1
        _, _, terminated, _, info = env.step(random_actions(info["action_mask"], rng))
        lengths[terminated & (lengths == 0)] = step
    return lengths.tolist()


def random_episode(env, length: int, rng) -> dict[str, torch.Tensor]:
    """Random numbers in the shape of an episode of the replay, length + 1 rows; half of the actions are available."""
    mask = rng.random((length + 1, env.num_agents, env.num_actions)) < 0.5
    mask[..., 0] |= ~mask.any(-1)
    columns = {
        "obs": rng.random((length + 1, env.num_agents, env.obs_size), np.float32),
        "state": rng.random((length + 1, env.state_size), np.float32),
        "mask": mask,
        "last_action": np.concatenate([np.full((1, env.num_agents), -1), random_actions(mask[:-1], rng)]),
        "reward": rng.random(length + 1, np.float32),
        "terminated": np.arange(length + 1) == length,
    }
    return {name: torch.from_numpy(column) for name, column in columns.items()}


class Counter(TorchDispatchMode):
    """Counts operations, the floating-point ones of matrix products, and the bytes that all of them read and write."""

    def __init__(self):
        super().__init__()
        self.launches = self.operations = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.operations += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        if not func.is_view:
            self.launches += 1
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return result


def measure(device: torch.device, repeats: int, functions: dict) -> dict[str, float]:
    """Milliseconds of each, the minimum of `repeats` rounds after two to warm up."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = dict.fromkeys(functions, float("inf"))
    for i in range(repeats + 2):
        for name, function in functions.items():
            wait()
            start = time.perf_counter()
            function()
            wait()
            if i >= 2:
                best[name] = min(best[name], 1000 * (time.perf_counter() - start))
    return best


def machine_limits(device: torch.device) -> tuple[float, float]:
    """GFLOP/s of a large matrix product, GB/s of a large copy."""
    x, w = torch.randn(8192, 512, device=device), torch.randn(512, 512, device=device)
    source, target = torch.randn(2, 2**26, device=device)  # 256 MB each
    best = measure(device, 10, {"product": lambda: x @ w, "copy": lambda: target.copy_(source)})
    return 2 * 8192 * 512 * 512 / 1e6 / best["product"], 2 * 2**28 / 1e6 / best["copy"]


def benchmark(env, lengths: list[int], args: Args, device: torch.device, rate: float, bandwidth: float) -> dict:
    """Milliseconds of an update and of its parts, what they could be, and the memory they take."""
    torch.backends.cudnn.allow_tf32 = False  # as in training
    options, rng = script.Args(batch_size=args.batch_size, alpha=0.03), np.random.default_rng(0)
    replay = deque(random_episode(env, length, rng) for length in lengths)
    networks = script.Networks(env, options).to(device)
    optimizer = torch.optim.Adam(networks.parameter_groups(), lr=options.learning_rate)
    batch = script.sample_batch(replay, args.batch_size, device)
    B, state, critic = args.batch_size, batch.state[batch.now], networks.critic
    with torch.no_grad():
        stage1, _ = critic.agent(batch.obs, batch.last_action, sizes=batch.sizes)
        chosen = stage1[batch.now].gather(-1, batch.last_action[B:].unsqueeze(-1))
    with Counter() as counter:
        script.update(networks, optimizer, batch, options)

    def sample():
        return script.sample_batch(replay, args.batch_size, device)

    def agent():
        return critic.agent(batch.obs, batch.last_action, sizes=batch.sizes)[0].sum()

    @torch.no_grad()
    def policy():
        size = 8192 if device.type == "cuda" else 1024  # as in compute_losses
        for rows in zip(*(x.split(size) for x in (stage1[B:], batch.state[B:], batch.mask[B:])), strict=True):
            script.soft_log_policy(networks, *rows, options.alpha)

    row = measure(device, args.repeats, {
        "update": lambda: script.update(networks, optimizer, sample(), options),
        "  sample": sample,
        "  agent, forward and backward": lambda: agent().backward(),
        "  target agent, forward": torch.no_grad()(agent),
        "  policy, all actions, forward": policy,
        "  g, chosen, forward and backward": lambda: critic.g(chosen, state).sum().backward(),
        "  mixer, forward and backward": lambda: critic.mixer(chosen.squeeze(-1), state).sum().backward(),
    })  # fmt: skip
    # PyTorch does not count cuDNN's GRU: two products with 3 H x H weights per cell; forward twice (online, target),
    # and backward at twice the cost of one forward.
    cells, hidden = len(batch.obs) * env.num_agents, critic.agent.hidden_size
    recurrent = 4 * cells * 2 * (2 * 3 * hidden * hidden) if device.type == "cuda" else 0
    row["matrix products at full speed"] = 1000 * (counter.operations + recurrent) / 1e9 / rate
    row["memory traffic, nothing cached"] = 1000 * counter.bytes / 1e9 / bandwidth
    row["operations"] = counter.launches
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row["peak memory, MB"] = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else peak
    return row


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    counts = {name: ([getattr(args, name)], 1) for name in ("batch_size", "repeats", "threads")}
    if error := too_low(**counts) or wrong_json(args.json):
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the measuring processes
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the scripts
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    about, results = {"device": name, "threads": args.threads, "torch": str(torch.__version__)}, []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rate, bandwidth = pool.apply(machine_limits, (device,))
        about |= {"GFLOP/s": round(rate), "GB/s": round(bandwidth)}
        print(", ".join(f"{key} {value}" for key, value in about.items()))
        for size in args.sizes:
            length, env = SIZES[size]
            cases = {"fixed": [length] * args.batch_size}
            if size != "mpe":
                cases["mixed"] = battle_lengths(size, args.batch_size)
            if size in TRAINED:
                percent = (np.arange(args.batch_size) + 0.5) / args.batch_size * 100
                cases["trained"] = np.interp(percent, *TRAINED[size]).astype(int).tolist()
            for kind, lengths in cases.items():
                row = pool.apply(benchmark, (env, lengths, args, device, rate, bandwidth))
                results.append({"size": size, "lengths": kind, "steps": sum(lengths), "longest": max(lengths), **row})
                print(f"\n{size}, {kind} lengths: {sum(lengths)} steps, the longest battle {max(lengths)}")
                for part, value in row.items():
                    unit = "" if "MB" in part or part == "operations" else " ms"
                    print(f"  {part:36}{value:9.1f}{unit}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({**about, "results": results}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
