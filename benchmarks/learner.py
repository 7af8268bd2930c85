"""Time of one full update (sample, forward, targets, losses, backward, clip, step), and its distance from the limit.

    python benchmarks/learner.py                              # three sizes, fixed and mixed lengths
    python benchmarks/learner.py --sizes protoss_5_vs_5 --threads 2 --json learner.json

Sizes: MPE Spread (128 episodes of 25 steps), protoss 5 against 5 (60 steps), protoss 10 against 10 (100 steps). Mixed
lengths are those of simulator battles under random play. The floor is what the arithmetic alone would take: the
floating-point operations of all matrix products, counted by PyTorch, at the rate measured for one large product.
Minimum of --repeats; timings are noisy on shared machines, so compare figures of one call only.
"""

import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import softqmix_smacv2 as script
from smacv2_sim import SMACv2Sim, random_actions

SIZES = {  # fixed length; agents, observation, state, actions
    "mpe": (25, SimpleNamespace(num_agents=3, obs_size=18, state_size=54, num_actions=5)),
    "protoss_5_vs_5": (60, SimpleNamespace(num_agents=5, obs_size=92, state_size=130, num_actions=11)),
    "protoss_10_vs_10": (100, SimpleNamespace(num_agents=10, obs_size=182, state_size=310, num_actions=16)),
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
    json: str | None = None
    """also write the figures to this file"""


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


def measure(device: torch.device, repeats: int, function) -> float:
    """Milliseconds, the minimum of `repeats` after two calls to warm up."""
    times = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return min(times[2:])


def benchmark(env, lengths: list[int], args: Args, device: torch.device, matmul_rate: float) -> dict[str, float]:
    """Milliseconds of an update and of its parts, and its floor."""
    options = script.Args(batch_size=args.batch_size, alpha=0.03)
    replay = random_replay(env, lengths, device)
    networks = script.Networks(env, options).to(device)
    optimizer = torch.optim.Adam(networks.parameter_groups(), lr=options.learning_rate)
    batch = replay.sample(args.batch_size, device)
    now, after = batch.now, slice(args.batch_size, None)
    last_action = torch.full(batch.obs.shape[:2], -1, device=device)
    last_action[after] = batch.action
    inputs = networks.critic.agent.encode(batch.obs, last_action)
    agent, g, mixer = networks.critic.agent, networks.critic.g, networks.critic.mixer
    with torch.no_grad():
        stage1 = agent.unroll(inputs, batch.num_episodes)
        chosen = stage1[now].gather(-1, batch.action.unsqueeze(-1))
    counter = FlopCounterMode(display=False)
    with counter:
        script.update(networks, optimizer, batch, options)

    def update():
        script.update(networks, optimizer, replay.sample(args.batch_size, device), options)

    @torch.no_grad()
    def without_gradient(function):
        function()

    parts = {
        "update": update,
        "sample": lambda: replay.sample(args.batch_size, device),
        "losses forward": lambda: script.compute_losses(networks, batch, options),
        "agent forward + backward": lambda: agent.unroll(inputs, batch.num_episodes).sum().backward(),
        "agent forward": lambda: without_gradient(lambda: agent.unroll(inputs, batch.num_episodes)),
        "policy, all actions": lambda: without_gradient(
            lambda: script.soft_log_policy(networks, stage1[after], batch.state[after], batch.mask[after], 0.03)
        ),
        "g, chosen, forward + backward": lambda: g(chosen, batch.state[now]).sum().backward(),
        "mixer forward + backward": lambda: mixer(chosen.squeeze(-1), batch.state[now]).sum().backward(),
    }
    row = {name: measure(device, args.repeats, part) for name, part in parts.items()}
    # PyTorch does not count cuDNN's GRU: two products with 3 H x H weights per cell; forward twice (online, target),
    # and backward at twice the cost of one forward.
    cells, hidden = len(batch.obs) * env.num_agents, agent.hidden_size
    recurrent = 4 * cells * 2 * (2 * 3 * hidden * hidden) if device.type == "cuda" else 0
    row["steps"] = len(batch.reward)
    row["GFLOP"] = (counter.get_total_flops() + recurrent) / 1e9
    row["floor"] = 1000 * row["GFLOP"] / matmul_rate
    return row


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    x, w = torch.randn(8192, 512, device=device), torch.randn(512, 512, device=device)
    rate = 2 * 8192 * 512 * 512 / 1e9 / (measure(device, 10, lambda: x @ w) / 1000)  # GFLOP/s
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    about = {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "matmul GFLOP/s": rate,
    }
    print(
        ", ".join(
            f"{key} {value:.0f}" if isinstance(value, float) else f"{key} {value}" for key, value in about.items()
        )
    )
    results = []
    for size in args.sizes:
        length, env = SIZES[size]
        cases = {"fixed": [length] * args.batch_size}
        if size != "mpe":
            cases["mixed"] = battle_lengths(size, args.batch_size)
        for kind, lengths in cases.items():
            row = benchmark(env, lengths, args, device, rate)
            results.append({"size": size, "lengths": kind, **row})
            print(f"\n{size}, {kind} lengths: {row['steps']} steps, {row['GFLOP']:.1f} GFLOP")
            for part in [*list(row)[:-3], "floor"]:
                print(f"  {part:32}{row[part]:9.1f} ms")
    if args.json:
        Path(args.json).write_text(json.dumps({**about, "results": results}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
