"""Time of one full update (sample, forward, targets, losses, backward, clip, step), and its distance from the limit.

    python benchmarks/learner.py                              # three sizes; fixed, short and long-tailed lengths
    python benchmarks/learner.py --sizes protoss_5_vs_5 --threads 1 --compile --json learner.json
    python benchmarks/learner.py --compile --cudagraphs       # on a GPU: as usual, compiled, replayed, and both

Sizes: MPE Spread (128 episodes of 25 steps), protoss 5 against 5 (60 steps), protoss 10 against 10 (100 steps). Mixed
lengths are those of simulator battles under random play; trained ones follow the replay of a run of 500,000 steps,
whose few long battles make the longest of a batch twice as long as the mean.

Three figures tell how much could be gained: the floating-point operations of all matrix products, counted by PyTorch,
at the rate measured for one large product; the bytes that all operations read and write, at the bandwidth measured for
one large copy (the cache is faster); and the number of operations, each of which takes a few microseconds to launch,
whatever its size. Each case runs in a process of its own, its parts in turns; the minimum of --repeats counts. Timings
are noisy on shared machines: compare figures of one call only.
"""

import copy
import json
import multiprocessing
import platform
import resource
import sys
import time
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
from benchmarks.options import wrong_gpu_option, wrong_json
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
    sizes: tuple[Literal["mpe", "protoss_5_vs_5", "protoss_10_vs_10"], ...] = tuple(SIZES)
    """which problems"""
    batch_size: int = 128
    """episodes"""
    repeats: int = 7
    """the minimum of so many is printed"""
    threads: int = 0
    """CPU threads of PyTorch; 0: its default"""
    cuda: bool = True
    """use the GPU if there is one"""
    compile: bool = False
    """also time the update as with the scripts' --compile"""
    cudagraphs: bool = False
    """also time the update as with the scripts' --cudagraphs"""
    json: str | None = None
    """also write the figures to this file"""


def find_error(args: Args) -> str | None:
    """What is wrong with the options, in one sentence."""
    for name, low in (("batch_size", 1), ("repeats", 1), ("threads", 0)):
        if getattr(args, name) < low:
            return f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {low}."
    return wrong_gpu_option(args) or wrong_json(args.json)


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


def random_replay(env, lengths: list[int], device: torch.device) -> script.Replay:
    """Random numbers in the shape of episodes of the given lengths; half of the actions are available."""
    rng, N, A = np.random.default_rng(0), env.num_agents, env.num_actions
    replay = script.Replay(len(lengths), device)
    for length in lengths:
        mask = rng.random((length + 1, N, A)) < 0.5
        mask[..., 0] |= ~mask.any(-1)
        replay.add({
            "obs": rng.random((length + 1, N, env.obs_size), np.float32), "mask": mask,
            "state": rng.random((length + 1, env.state_size), np.float32),
            "action": random_actions(mask[:-1], rng), "reward": rng.random(length, np.float32),
            "terminated": np.arange(length) == length - 1,
        })  # fmt: skip
    return replay


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
    best = dict.fromkeys(functions, float("inf"))
    for i in range(repeats + 2):
        for name, function in functions.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i >= 2:
                best[name] = min(best[name], 1000 * (time.perf_counter() - start))
    return best


def machine_limits(device: torch.device, threads: int) -> tuple[float, float]:
    """GFLOP/s of a large matrix product, GB/s of a large copy."""
    torch.set_num_threads(threads)
    x, w = torch.randn(8192, 512, device=device), torch.randn(512, 512, device=device)
    source, target = torch.randn(2, 2**26, device=device)  # 256 MB each
    best = measure(device, 10, {"product": lambda: x @ w, "copy": lambda: target.copy_(source)})
    return 2 * 8192 * 512 * 512 / 1e6 / best["product"], 2 * 2**28 / 1e6 / best["copy"]


def benchmark(env, lengths: list[int], args: Args, device: torch.device, rate: float, bandwidth: float) -> dict:
    """Milliseconds of an update and of its parts, what they could be, and the memory they take."""
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # as in training
    options = script.Args(batch_size=args.batch_size, alpha=0.03)
    replay = random_replay(env, lengths, device)
    networks = script.Networks(env, options).to(device)
    optimizer = torch.optim.Adam(networks.parameter_groups(), lr=options.learning_rate)
    batch = replay.sample(args.batch_size, device)
    now, after = batch.now, slice(args.batch_size, None)
    last_action = torch.full(batch.obs.shape[:2], -1, device=device)
    last_action[after] = batch.action
    agent, g, mixer = networks.critic.agent, networks.critic.g, networks.critic.mixer
    inputs = agent.encode(batch.obs, last_action)
    with torch.no_grad():
        stage1 = agent.unroll(inputs, batch.num_episodes)
        chosen = stage1[now].gather(-1, batch.action.unsqueeze(-1))
    with Counter() as counter:
        script.update(networks, optimizer, batch, options)

    def update():
        script.update(networks, optimizer, replay.sample(args.batch_size, device), options)

    @torch.no_grad()
    def policy():
        script.soft_log_policy(networks, stage1[after], batch.state[after], batch.mask[after], options.alpha)

    parts = {
        "update": update,
        "  sample": lambda: replay.sample(args.batch_size, device),
        "  agent, forward and backward": lambda: agent.unroll(inputs, batch.num_episodes).sum().backward(),
        "  target agent, forward": torch.no_grad()(lambda: agent.unroll(inputs, batch.num_episodes)),
        "  policy, all actions, forward": policy,
        "  g, chosen, forward and backward": lambda: g(chosen, batch.state[now]).sum().backward(),
        "  mixer, forward and backward": lambda: mixer(chosen.squeeze(-1), batch.state[now]).sum().backward(),
    }

    def variant(compiled: bool, cudagraphs: bool):
        own = copy.deepcopy(networks).to(device)  # to(): a copied GRU's weights lie scattered otherwise
        if compiled:
            script.compile_networks(own)
        adam = torch.optim.Adam(own.parameter_groups(), lr=options.learning_rate, capturable=cudagraphs)
        learn = script.CUDAGraphs(script.update) if cudagraphs else script.update
        return lambda: learn(own, adam, replay.sample(args.batch_size, device, cudagraphs), options)

    if args.compile:
        parts["update, compiled"] = variant(True, False)
    if args.cudagraphs:
        parts["update, padded"] = lambda: script.update(
            networks, optimizer, replay.sample(args.batch_size, device, pad=True), options
        )
        parts["update, CUDA graphs"] = variant(False, True)
    if args.compile and args.cudagraphs:
        parts["update, compiled, CUDA graphs"] = variant(True, True)
    row = measure(device, args.repeats, parts)
    # PyTorch does not count cuDNN's GRU: two products with 3 H x H weights per cell; forward twice (online, target),
    # and backward at twice the cost of one forward.
    cells, hidden = len(batch.obs) * env.num_agents, agent.hidden_size
    recurrent = 4 * cells * 2 * (2 * 3 * hidden * hidden) if device.type == "cuda" else 0
    row["matrix products at full speed"] = 1000 * (counter.operations + recurrent) / 1e9 / rate
    row["memory traffic, nothing cached"] = 1000 * counter.bytes / 1e9 / bandwidth
    row["operations"] = counter.launches
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row["peak memory, MB"] = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else peak
    return row


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    if error := find_error(args):
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    args.threads = args.threads or torch.get_num_threads()
    pool = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
    rate, bandwidth = pool.apply(machine_limits, (device, args.threads))
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    about = {"device": name, "threads": args.threads, "torch": str(torch.__version__)}
    about |= {"GFLOP/s": round(rate), "GB/s": round(bandwidth)}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    results = []
    for size in args.sizes:
        length, env = SIZES[size]
        cases = {"fixed": [length] * args.batch_size}
        if size != "mpe":
            cases["mixed"] = battle_lengths(size, args.batch_size)
        if size in TRAINED:
            cases["trained"] = (
                np.interp((np.arange(args.batch_size) + 0.5) / args.batch_size * 100, *TRAINED[size])
                .astype(int)
                .tolist()
            )
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
