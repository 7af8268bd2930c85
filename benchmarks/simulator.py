"""Environment steps per second of envs/smacv2_sim.py, beside SMAX where that is installed.

    python benchmarks/simulator.py                                          # every map, about ten minutes
    python benchmarks/simulator.py --maps protoss_5_vs_5 --battles 64 --seconds 5
    python benchmarks/simulator.py --json results/simulator.json

One environment step is one battle's half second: observations, states, masks, rewards and the new battles' starts
included. Actions are random available ones, drawn outside the timing. Battles are played on until the time is over, on
one core and on all. "CPU" figures are per second of processor time and hardly suffer from other work on the machine;
"wall" figures do.

SMAX (JaxMARL's simplification of SMACv2, PyPI jaxmarl 0.2.0) is a different game, so its figures say what its users get
per second, not that the work is the same. It is measured where `import jaxmarl` works, in a process of its own per core
setting, with its actions drawn from its masks inside the compiled loop, its fastest way; compilation is left out for
both. The ratios are wall to wall and CPU to CPU at the same number of battles, cores and units, in this run.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.options import wrong_json, wrong_maps  # noqa: E402

SIZES = ["5_vs_5", "10_vs_10", "10_vs_11", "20_vs_20", "20_vs_23"]
MAPS = [f"{race}_{size}" for size in SIZES for race in ("protoss", "terran", "zerg")]
SMAX_MAPS = {"5_vs_5": "smacv2_5_units", "10_vs_10": "smacv2_10_units"}
SMAX_STEPS = 100  # env steps in one compiled call; fewer for many battles


def find_error(args):
    """Say what is wrong with the options. Returns: one sentence, or None."""
    if not 0 < args.seconds < math.inf:
        return f"--seconds is {args.seconds}; it must be positive and finite."
    if min(args.battles) < 1:
        return f"--battles has {min(args.battles)}; each number must be at least 1."
    return wrong_maps(args.maps) or wrong_json(args.json)


def measure_simulator(map_name, num_envs, seconds):
    """Step random battles for `seconds` of step time. Returns: dict of env steps per wall and per CPU second."""
    import numpy as np

    from envs.smacv2_sim import SMACv2Sim, random_actions

    env = SMACv2Sim(map_name, num_envs, seed=0)
    rng = np.random.default_rng(0)
    _, info = env.reset()
    for _ in range(20):  # compiles, and gets past the first walk
        *_, info = env.step(random_actions(info["action_mask"], rng))
    wall = cpu = 0.0
    steps = 0
    while wall < seconds:
        actions = random_actions(info["action_mask"], rng)
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        *_, info = env.step(actions)
        wall += time.perf_counter() - wall_start
        cpu += time.process_time() - cpu_start
        steps += num_envs
    return {"wall": steps / wall, "cpu": steps / cpu}


def measure_smax(map_name, num_envs, seconds):
    """The same for SMAX's HeuristicEnemySMAX. Returns: dict as measure_simulator."""
    import jax
    import jax.numpy as jnp
    from jaxmarl import make
    from jaxmarl.environments.smax import map_name_to_scenario

    env = make("HeuristicEnemySMAX", scenario=map_name_to_scenario(map_name))
    steps = SMAX_STEPS if num_envs <= 64 else SMAX_STEPS // 5

    def one_step(carry, key):
        env_state = carry
        action_key, step_key = jax.random.split(key)
        masks = jax.vmap(env.get_avail_actions)(env_state)
        action_keys = jax.random.split(action_key, len(env.agents))
        actions = {
            agent: jax.random.categorical(k, jnp.where(masks[agent] > 0, 0.0, -1e9), axis=-1)
            for agent, k in zip(env.agents, action_keys, strict=True)
        }
        obs, env_state, reward, _, _ = jax.vmap(env.step)(jax.random.split(step_key, num_envs), env_state, actions)
        return env_state, sum(o.sum() for o in obs.values()) + sum(r.sum() for r in reward.values())

    @jax.jit
    def play(env_state, key):
        return jax.lax.scan(one_step, env_state, jax.random.split(key, steps))

    _, env_state = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.PRNGKey(0), num_envs))
    for warm_up in range(2):  # the first call's result has other types than reset's, so the second compiles again
        env_state, total = play(env_state, jax.random.PRNGKey(1000 + warm_up))
        total.block_until_ready()
    calls, wall_start, cpu_start = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - wall_start < seconds:
        env_state, total = play(env_state, jax.random.PRNGKey(calls))
        total.block_until_ready()
        calls += 1
    wall, cpu = time.perf_counter() - wall_start, time.process_time() - cpu_start
    done = calls * steps * num_envs
    return {"wall": done / wall, "cpu": done / cpu}


def measure_in_process(program, map_name, num_envs, seconds, cores):
    """Measure in a fresh process bound to `cores` of the machine's cores. Returns: the dict of the measure function."""
    allowed = sorted(os.sched_getaffinity(0))[:cores] if hasattr(os, "sched_getaffinity") else None
    environment = os.environ | {"NUMBA_NUM_THREADS": str(cores), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--measure", program, map_name, str(num_envs), str(seconds)]

    def bind():
        if allowed:
            os.sched_setaffinity(0, allowed)

    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=bind)
    return json.loads(run.stdout.splitlines()[-1])


def describe_machine():
    """Name the processor, its cores, the load, and the versions that matter."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    versions = {}
    for package in ("numpy", "numba", "jaxmarl", "jax"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": versions,
    }


def main():
    """Measure everything asked for, print a table line by line, and write the JSON file. Returns: the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", nargs="+", default=MAPS, metavar="MAP", help="default: all fifteen")
    parser.add_argument("--battles", nargs="+", type=int, default=[1, 4, 16, 64, 1024], help="numbers of battles")
    parser.add_argument("--seconds", type=float, default=2.0, help="step time per measurement")
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        program, map_name, num_envs, seconds = args.measure
        measure = {"simulator": measure_simulator, "smax": measure_smax}[program]
        print(json.dumps(measure(map_name, int(num_envs), float(seconds))))
        return 0
    if error := find_error(args):
        print(f"error: {error}", file=sys.stderr)
        return 2

    machine = describe_machine()
    found = ", ".join(f"{name} {version or 'not installed'}" for name, version in machine["versions"].items())
    print(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']}, Python {machine['python']}, {found}")
    has_smax = importlib.util.find_spec("jaxmarl") is not None
    smax_head = "   SMAX wall       CPU  ratios" if has_smax else ""
    print(f"{'env steps per second':20} {'battles':>7} {'cores':>5} {'wall':>9} {'CPU':>9}{smax_head}")
    rows, smax_figures = [], {}
    for map_name in args.maps:
        for num_envs in args.battles:
            for cores in sorted({1, os.cpu_count()}):
                row = {"map": map_name, "battles": num_envs, "cores": cores}
                row |= measure_in_process("simulator", map_name, num_envs, args.seconds, cores)
                smax_map = SMAX_MAPS.get(map_name.split("_", 1)[1]) if has_smax else None
                if smax_map:
                    key = smax_map, num_envs, cores  # once for the three races
                    if key not in smax_figures:
                        smax_figures[key] = measure_in_process("smax", smax_map, num_envs, args.seconds, cores)
                    smax = smax_figures[key]
                    row |= {"smax": smax, "ratio": {clock: row[clock] / smax[clock] for clock in smax}}
                rows.append(row)
                line = f"{map_name:20} {num_envs:7} {cores:5} {row['wall']:9,.0f} {row['cpu']:9,.0f}"
                if smax_map:
                    line += f"   {smax['wall']:9,.0f} {smax['cpu']:9,.0f}"
                    line += f" {row['ratio']['wall']:4.1f} {row['ratio']['cpu']:4.1f}"
                print(line, flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine, "results": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
