"""What did it learn? Plays one greedy test episode of a trained run and writes down what its networks say at each step.

    python explain.py runs/NAME                          # battle.csv and battle.png in the run's folder
    python explain.py runs/NAME --seed 7 --out pictures  # another battle, into another folder

Of a QMIX or Soft-QMIX run on SMACv2 or in MPE, of the networks in its checkpoint.pt. battle.csv has a row per step and
agent: the action, as number and name; stage1, its value by the agent network; q_i, that value after g; f, the same
after f; probability and entropy (nats) of the agent's soft policy softmax(f / alpha); Q_tot of the joint action and the
team's reward. QMIX has neither g, f nor a soft policy: there, q_i is the agent network's output. battle.png draws it.
The return-to-go is discounted, as Q_tot is; Soft-QMIX's Q_tot adds alpha times the entropies of the policy it trains
with, and the episode here is greedy, as tests are.
"""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback, during the imports, too

import csv
import importlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ALGORITHMS = ("softqmix_smacv2", "qmix_smacv2", "softqmix_mpe", "qmix_mpe")
SIGNS = {"north": "↑", "south": "↓", "east": "→", "west": "←", "no-op": "", "stop": "■", "stay": "■"}
COLORS = {"north": "#9ecae1", "south": "#4292c6", "east": "#a1d99b", "west": "#41ab5d", "no-op": "#f2f2f2"}
COLORS |= {"stop": "#969696", "stay": "#969696"}
ATTACKS = ["#ffe14d", "#ff9f1c", "#e85d04", "#d00000", "#7f0000", "#ff6fb5", "#c2185b", "#8e6c8a", "#6d4c41", "#1e1e1e"]


class InputError(ValueError):
    """Something the user can put right, told in one sentence: exit code 2, no traceback."""


@dataclass
class Args:
    folder: tyro.conf.Positional[str]
    """the run's folder, with its config.json and checkpoint.pt"""
    seed: int = 0
    """of the episode"""
    out: str | None = None
    """folder for battle.csv and battle.png, made if need be; default: the run's"""


def load_run(folder: str) -> tuple:
    """The script that trained this run, what its checkpoint holds, its options, one environment, and its networks."""
    try:
        config = json.loads(Path(folder, "config.json").read_text())
        algorithm = config.get("algorithm") or config["args"]["exp_name"]  # older runs do not name it
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder} is no run's folder: it has no config.json; a policy.pt has no mixer.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{folder}/config.json is damaged, or not a training script's.") from None
    if algorithm not in ALGORITHMS:
        raise InputError(f"{folder} is a run of {algorithm!a}; what can be explained is {', '.join(ALGORITHMS)}.")
    script = importlib.import_module(algorithm)
    try:
        saved = script.load(folder, "checkpoint")
        args = script.Args(**saved["args"] | dict.fromkeys(["run_dir", "resume", "evaluate"]))
        env = script.make_env(args, 1, 0)
        networks = script.Networks(env, args)
        networks.load_state_dict(saved["networks"])
    except script.InputError as error:
        raise InputError(error) from None
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # options or sizes of another game
        raise InputError(f"{folder} cannot be played: {' '.join(str(error).split())[:300]}") from None
    return script, saved, args, env, networks


def action_names(args, env) -> list[list[str]]:
    """Of each agent's actions at this moment."""
    if not hasattr(args, "map"):
        moves = ["stay", "push west", "push east", "push south", "push north"]  # FORCES of envs/spread.py
        return [[f"action {u}" for u in range(env.num_actions)] if args.env else moves] * env.num_agents
    from envs import smacv2_sim as sim

    moves = {sim.NO_OP: "no-op", sim.STOP: "stop"}
    moves |= {sim.NORTH: "move north", sim.SOUTH: "move south", sim.EAST: "move east", sim.WEST: "move west"}
    names = [moves[u] for u in range(sim.FIRST_TARGET)]
    units = env._world.units[0] if args.backend == "sim" else [{"type": None}] * env.num_agents
    verbs = ["heal" if units[i]["type"] == sim.MEDIVAC else "attack" for i in range(env.num_agents)]
    return [names + [f"{verb} {k}" for k in range(env.num_actions - len(names))] for verb in verbs]


@torch.no_grad()
def play(script, args, env, networks, seed: int) -> tuple[list[dict], str]:
    """A greedy episode: a row per step and agent, and how it ended, if the game can be won."""
    critic, soft, rows, rewards, ended = networks.critic, hasattr(networks, "f"), [], [], False
    obs, info = env.reset(seed=seed)
    hidden, last_action = None, torch.full((1, env.num_agents), -1)
    while not ended:
        state, mask = torch.from_numpy(info["state"]), torch.from_numpy(info["action_mask"])
        stage1, hidden = critic.agent(torch.from_numpy(obs), last_action, hidden)  # (1, N, A)
        last_action = script.greedy_action(stage1, mask)  # (1, N)
        values = {"q_i": stage1}
        if soft:
            q_i = critic.g(stage1, state)
            policy = script.soft_log_policy(networks, stage1, state, mask, args.alpha).exp()
            values = {"stage1": stage1, "q_i": q_i, "f": networks.f(q_i, state), "probability": policy}
        columns = {name: x.gather(-1, last_action.unsqueeze(-1)).squeeze(-1)[0] for name, x in values.items()}  # (N,)
        q_tot = critic.mixer(columns["q_i"].unsqueeze(0), state).item()
        columns |= {"entropy": torch.special.entr(policy).sum(-1)[0]} if soft else {}
        names = action_names(args, env)
        obs, reward, terminated, truncated, info = env.step(last_action.numpy())
        rewards.append(float(reward[0]))
        for i, u in enumerate(last_action[0].tolist()):
            row = {"step": len(rewards) - 1, "agent": i, "action": u, "name": names[i][u]}
            row |= {name: column[i].item() for name, column in columns.items()}
            rows.append(row | {"q_tot": q_tot, "reward": rewards[-1]})
        if np.any(info.get("invalid", False)):
            raise InputError("The game failed during the episode: try again.")
        ended = terminated[0] or truncated[0]
    for row in rows:
        ahead = rewards[row["step"] :]
        row["return_to_go"] = sum(r * args.gamma**k for k, r in enumerate(ahead))
    won = info["final_info"].get("battle_won")
    return rows, "" if won is None else ", won" if won[0] else ", not won"


def color_of(name: str) -> tuple:
    """Moves are blue or green, attacks warm, healing violet; other games' actions have any colours."""
    verb, word = name.split()[0], name.split()[-1]
    if word in COLORS:
        return matplotlib.colors.to_rgb(COLORS[word])
    if verb == "attack":
        return matplotlib.colors.to_rgb(ATTACKS[int(word) % len(ATTACKS)])
    palette, place = ("Purples", 0.25 + int(word) % 10 / 13) if verb == "heal" else ("tab20", int(word) % 20)
    return plt.get_cmap(palette)(place)[:3]


def draw(rows: list[dict], title: str) -> bytes:
    """A PNG: who did what when, what each agent thought of it, and what became of Q_tot."""
    T, N = rows[-1]["step"] + 1, rows[-1]["agent"] + 1
    table = {name: np.array([row[name] for row in rows], object).reshape(T, N) for name in rows[0]}
    alive, few = table["name"] != "no-op", T <= 70
    lines = {"q_i": "$Q_i$ of the action", "entropy": "policy's entropy, nats"}
    lines = {column: label for column, label in lines.items() if column in table}
    heights = [0.5 + 0.28 * N, *[2] * len(lines), 2]
    with plt.rc_context({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}):
        figure = plt.figure(figsize=(13, sum(heights) + 1.4), layout="constrained")
        top, *middle, bottom = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        beside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.06), "frameon": False}  # of a panel
        top.imshow([[color_of(table["name"][t, i]) for t in range(T)] for i in range(N)], aspect="auto")
        top.hlines(np.arange(N - 1) + 0.5, -0.5, T - 0.5, "white", linewidth=2)
        top.set_yticks(range(N), [f"agent {i}" for i in range(N)], weight="bold")
        for i, label in enumerate(top.get_yticklabels()):
            label.set_color(f"C{i}")
        for t, i in np.ndindex(T if few else 0, N):
            word = table["name"][t, i].split()[-1]
            color = "white" if sum(color_of(table["name"][t, i])) < 1.4 else "black"
            top.text(t, i, SIGNS.get(word, word), ha="center", va="center", fontsize=9, color=color)
        top.vlines(np.arange(T - 1 if few else 0) + 0.5, -0.5, N - 0.5, "white", linewidth=1)
        used = sorted(set(table["name"].flat), key=lambda name: (name[:4] == "heal", name[:6] == "attack", name))
        patches = [matplotlib.patches.Patch(color=color_of(name), label=name) for name in used]
        top.legend(handles=patches, ncols=1 + len(used) // 9, fontsize=10, handlelength=1, labelspacing=0.25, **beside)
        for axis, (column, label) in zip(middle, lines.items(), strict=True):
            for i in range(N):
                values = np.where(alive[:, i], table[column][:, i], np.nan).astype(float)
                axis.plot(values, "o-" if few else "-", color=f"C{i}", markersize=3, linewidth=1.8)
            axis.set_ylabel(label)
        bonus = ", with the\nbonus of entropy" if "entropy" in table else ""
        bottom.plot(table["q_tot"][:, 0], "k-", linewidth=2.2, label=f"$Q_{{tot}}${bonus}")
        bottom.plot(table["return_to_go"][:, 0], "r--", linewidth=2.2, label="return-to-go,\ndiscounted")
        bottom.legend(**beside)
        bottom.set(xlabel="step", ylabel="value", xlim=(-0.5, T - 0.5))
        for axis in (*middle, bottom):
            axis.grid(alpha=0.3)
        figure.suptitle(title, parse_math=False)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=200)
        plt.close(figure)
    return png.getvalue()


def write(path: Path, content: bytes) -> None:
    """Under a temporary name and renamed, so that no file is ever left half written; makes its folder."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        if temporary.exists():
            temporary.unlink()
        raise InputError(f"{path} cannot be written ({error.strerror}).") from None


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    try:
        if not 0 <= args.seed < 2**31:
            raise InputError(f"--seed is {args.seed}; it must be in [0, {2**31 - 1}].")
        folder = Path(args.out or args.folder)
        script, saved, options, env, networks = load_run(args.folder)
        rows, end = play(script, options, env, networks, args.seed)
        env.close()
        text = io.StringIO()
        table = csv.DictWriter(text, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows({k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        name = "Soft-QMIX" if saved["algorithm"].startswith("soft") else "QMIX"
        total = sum(row["reward"] for row in rows if row["agent"] == 0)
        title = f"{name} on {env.name} after {saved['step']:,} steps; episode {args.seed}: return {total:.3g}{end}"
        write(folder / "battle.csv", text.getvalue().encode())
        write(folder / "battle.png", draw(rows, title))
    except (InputError, ConnectionError) as error:  # the latter: StarCraft II failed for good
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    print(f"{title}\n{folder / 'battle.csv'}, {folder / 'battle.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
