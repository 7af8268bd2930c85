"""What the tests ask of the scripts: every call that depends on how a script is written stands here, once.

An episode of L steps is, for the tests, a dictionary of arrays: obs (L+1, N, O), state (L+1, S), mask (L+1, N, A),
action (L, N), reward (L,) and terminated (L,).
"""

import csv
import importlib.util
import json
import signal
import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fop_smacv2
import qmix_smacv2
import softqmix_smacv2

SMACV2, MPE = (softqmix_smacv2, qmix_smacv2), ()
if importlib.util.find_spec("mpe2"):  # which an environment of requirements-smacv2.txt cannot hold
    import qmix_mpe
    import softqmix_mpe

    MPE = (softqmix_mpe, qmix_mpe)
FOP = (fop_smacv2,)  # whose mathematics has tests of its own
SOFT, PLAIN = (softqmix_smacv2, *MPE[:1]), (qmix_smacv2, *MPE[1:])
CPU = torch.device("cpu")
SIZES = SimpleNamespace(num_agents=3, num_actions=5, obs_size=4, state_size=6)  # all that networks know of a game
ROOT = Path(__file__).parent.parent


def over(scripts):
    """The test runs once for each of these scripts."""
    return pytest.mark.parametrize("script", scripts, ids=lambda script: script.__name__)


# --- Episodes and networks ---


def random_episode(length: int, rng, ended=True, game=SIZES, choice=True) -> dict[str, np.ndarray]:
    """Any numbers, and masks with at least one available action, of which one is taken; without choice exactly one."""
    mask = rng.random((length + 1, game.num_agents, game.num_actions)) < (0.4 if choice else 0)
    mask[..., 1] |= ~mask.any(-1)
    terminated = np.zeros(length, bool)
    terminated[-1] = ended
    return {
        "obs": rng.normal(size=(length + 1, game.num_agents, game.obs_size)).astype(np.float32),
        "state": rng.normal(size=(length + 1, game.state_size)).astype(np.float32),
        "mask": mask,
        "action": (rng.random(mask.shape) * mask)[:-1].argmax(-1),
        "reward": rng.normal(size=length).astype(np.float32),
        "terminated": terminated,
    }


def random_episodes(lengths, seed=0, cut_off=(), **settings) -> list[dict]:
    """Those with the numbers in cut_off have not ended for good."""
    rng = np.random.default_rng(seed)
    return [random_episode(n, rng, ended=i not in cut_off, **settings) for i, n in enumerate(lengths)]


def make_args(script, **changes):
    """Options as a run has them: checked, and what depends on the map filled in."""
    args = script.Args(**({"backend": "sim"} if script in SMACV2 else {}) | changes)
    script.prepare(args)
    return args


def make_networks(script, args, dtype=torch.float32, game=SIZES):
    """Untrained networks, their target a different one."""
    networks = script.Networks(game, args)
    networks.target = script.Critic(game, args)
    return networks.to(dtype)


def parts(networks) -> dict[str, torch.nn.Module]:
    """The networks that there are: agent, g, mixer, their targets, and f. What is switched off is a plain function."""
    found = {"f": getattr(networks, "f", None)}
    for prefix, critic in (("", networks.critic), ("target ", networks.target)):
        found |= {prefix + name: getattr(critic, name, None) for name in ("agent", "g", "mixer")}
    return {name: part for name, part in found.items() if isinstance(part, torch.nn.Module)}


def new_optimizer(script, networks, kind=torch.optim.Adam, **settings):
    return kind(networks.parameter_groups(), **settings)


def step_agent(agent, obs, last_action, hidden):
    """One step of each environment: obs (E, N, O), last_action (E, N), hidden (E, N, H) -> values (E, N, A), hidden."""
    return agent(obs, last_action, hidden)


class StandIn:
    """An agent that computes values and the next hidden state by this function."""

    def __init__(self, function, hidden_size=64):
        self.function, self.hidden_size = function, hidden_size

    def __call__(self, obs, last_action, hidden):
        return self.function(obs, last_action, hidden)


def walk_agent(agent, episode) -> list[torch.Tensor]:
    """The agent's values (N, A) at t = 0..L of an episode, step by step from no last action and a zero hidden state."""
    obs, action = torch.tensor(episode["obs"]).to(agent.fc_in.weight.dtype), torch.tensor(episode["action"])
    last, hidden, values = torch.full_like(action[:1], -1), obs.new_zeros(1, obs.shape[1], 64), []
    for t in range(len(obs)):
        value, hidden = step_agent(agent, obs[t : t + 1], last, hidden)
        values.append(value[0])
        last = action[t : t + 1]
    return values


def unroll_agent(agent, batch) -> list[torch.Tensor]:
    """The agent's values (L+1, N, A) of each of a batch's episodes, computed at once."""
    return episode_by_episode(agent(batch.obs, batch.last_action, sizes=batch.sizes)[0], batch.sizes)


# --- Replay and learning ---


def to_rows(episode: dict) -> dict[str, torch.Tensor]:
    """What a script stores of an episode: L + 1 rows, each with the step that led there."""
    rows = {name: episode[name] for name in ("obs", "state", "mask")}
    for name, column, nothing in (
        ("last_action", "action", -1),
        ("reward",) * 2 + (0,),
        ("terminated",) * 2 + (False,),
    ):
        first = np.full_like(episode[column][:1], nothing)
        rows[name] = np.concatenate([first, episode[column]])
    return {name: torch.from_numpy(np.array(array)) for name, array in rows.items()}


def from_rows(rows: dict) -> dict[str, np.ndarray]:
    """The reverse. Nothing led to an episode's first row."""
    rows = {name: column.numpy() for name, column in rows.items()}
    episode = {name: rows[name] for name in ("obs", "state", "mask")}
    for name, column, nothing in (
        ("last_action", "action", -1),
        ("reward",) * 2 + (0,),
        ("terminated",) * 2 + (False,),
    ):
        assert (rows[name][0] == nothing).all()
        episode[column] = rows[name][1:]
    return episode


class Replay:
    """A script's replay."""

    def __init__(self, script, capacity: int, episodes=()):
        self.script, self.memory = script, deque(map(to_rows, episodes), maxlen=capacity)

    def __len__(self):
        return len(self.memory)

    def add(self, episode: dict) -> None:
        self.memory.append(to_rows(episode))

    def sample(self, batch_size: int, device=CPU):
        return self.script.sample_batch(self.memory, batch_size, device)

    def episodes(self) -> list[dict]:
        return list(map(from_rows, self.memory))


def episode_by_episode(rows: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """Rows in order of time -> each episode's rows."""
    times = rows.split(sizes)
    return [torch.stack([time[b] for time in times if b < len(time)]) for b in range(sizes[0])]


def order_of_time(columns: list[torch.Tensor]) -> torch.Tensor:
    """Each episode's rows, the longest episode first -> rows in order of time."""
    return torch.stack([c[t] for t in range(len(columns[0])) for c in columns if t < len(c)])


def make_batch(script, episodes: list[dict], dtype=torch.float32, device=CPU):
    """All of these episodes as one batch, and the episodes in the batch's order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", torch.arange)  # so that the order of episodes of one length is known
        batch = Replay(script, len(episodes), episodes).sample(len(episodes), device)
    for name in ("obs", "state", "reward"):
        setattr(batch, name, getattr(batch, name).to(dtype))
    return batch, sorted(episodes, key=lambda episode: len(episode["reward"]), reverse=True)


def batch_episodes(batch) -> list[dict]:
    """What is in a batch, episode by episode."""
    names = ("obs", "state", "mask", "last_action", "reward", "terminated")
    columns = {name: episode_by_episode(getattr(batch, name), batch.sizes) for name in names}
    return [from_rows({name: column[b] for name, column in columns.items()}) for b in range(batch.sizes[0])]


def no_dice(script, monkeypatch) -> None:
    """From now on u' and the actions of the soft policy are its most probable ones."""
    if script in SOFT:
        monkeypatch.setattr(script, "sample_action", lambda log_policy, mask: log_policy.argmax(-1))


def td_targets(script, columns: list[dict], gamma, td_lambda, alpha) -> list[torch.Tensor]:
    """y_t of episodes given by reward, terminated, next_q and next_log_policy (L,); the longest episode comes first."""
    lengths = [len(column["reward"]) for column in columns]
    sizes = [sum(t < n for n in lengths) for t in range(lengths[0])]
    names = ["reward", "terminated", "next_q"] + ["next_log_policy"] * (script in SOFT)
    rows = [order_of_time([column[name] for column in columns]) for name in names]
    y = script.td_lambda_targets(*rows, sizes, gamma, td_lambda, *([alpha] if script in SOFT else []))
    return episode_by_episode(y, sizes)


def compute_losses(script, networks, batch, args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss that is minimised, and what is logged of it."""
    return script.compute_losses(networks, batch, args)


def update(script, networks, optimizer, batch, args) -> dict:
    return script.update(networks, optimizer, batch, args)


def move_target(script, networks, tau: float) -> None:
    script.move_target(networks, tau)


def act(script, networks, view: dict, last_action, hidden, exploration: float):
    """Actions (E, N) and hidden state; exploration is alpha or epsilon."""
    actions, hidden = script.act(networks, view | {"last_action": last_action}, hidden, exploration)
    return torch.from_numpy(actions), hidden


def acting_on(arguments: tuple) -> tuple:
    """View, last action, hidden state and exploration, of the arguments that a script's act got."""
    _, row, hidden, exploration = arguments
    return {name: row[name] for name in ("obs", "state", "mask")}, row["last_action"], hidden, exploration


def log_policy(script, networks, values, state, mask, alpha: float) -> torch.Tensor:
    """Of the soft policy, for the agent network's values (R, N, A)."""
    return script.soft_log_policy(networks, values, state, mask, alpha)


# --- Runs ---


def evaluate(script, agent, env, episodes: int, seed: int = 7) -> dict:
    """Greedy test episodes."""
    if script in MPE:
        return script.evaluate(agent, env, episodes, CPU, seed)
    return script.evaluate(agent, env, episodes, [seed], CPU)


def small_args(script, run_dir, **changes):
    """A run of a second or two."""
    settings = dict(level="medium") if script in MPE else dict(map="terran_3_vs_2", backend="sim")
    settings |= dict(burn_in=8) if script in FOP else {}
    settings |= dict(total_timesteps=1200, batch_size=8, buffer_size=24, eval_interval=400, eval_episodes=4)
    settings |= dict(target_update_interval=8, checkpoint_interval=10**6, run_dir=str(run_dir))
    return script.Args(**(settings | changes))


def resumed_args(script, run_dir, **changes):
    """The options with which a run goes on."""
    return script.Args(**config_of(run_dir)["args"] | {"run_dir": None, "resume": str(run_dir)} | changes)


def train(script, args) -> dict:
    """A run; returns what summary.json holds."""
    return script.train(args)


def run_main(script, capsys, *options) -> tuple[int, str]:
    """The command line within this process: exit code, and what was printed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, options)])
            code = script.main()
    except SystemExit as exit:
        code = exit.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def one_sentence(code_and_output: tuple[int, str], code: int = 2) -> str:
    """What was printed, which must be one line and no traceback."""
    assert code_and_output[0] == code, code_and_output
    (sentence,) = code_and_output[1].strip().splitlines()
    return sentence


IMPOSSIBLE = [  # options of a SMACv2 script, and words of its refusal
    (dict(map="terran_5"), "terran_5"),
    (dict(env_options={"wind": 1}), "wind"),
    (dict(env_options={"seed": 3}), "use --map, --num-envs or --seed"),
    (dict(env_options={"num_envs": 2}, check_env=True), "--env-options cannot set map_name, num_envs"),
    (dict(resume="nowhere"), "there is no such file"),
    (dict(evaluate=300 * "x"), "there is no such file"),
    (dict(resume="a", evaluate="b"), "exclude each other"),
]


def refused_before_a_file_is_made(script, changes: dict, words: str, folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(script.InputError, match=words):
        train(script, script.Args(backend="sim", **changes))
    assert list(folder.iterdir()) == []


def evaluated_agent(arguments: tuple):
    """Of the arguments that a script's evaluate got."""
    return arguments[0]


def checkpoint_of(run_dir) -> SimpleNamespace:
    """A run's checkpoint: the networks' parameters, optimiser, replay, counts, and the policy written beside it."""
    saved = torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)
    step, episodes, updates, *_ = saved["loop"]
    networks = saved["networks"]
    assert step == saved["step"]
    return SimpleNamespace(
        saved=saved,
        counts=(step, episodes, updates),
        networks=networks,
        agent={name.removeprefix("critic.agent."): x for name, x in networks.items() if "critic.agent." in name},
        target_agent={name.removeprefix("target.agent."): x for name, x in networks.items() if "target.agent." in name},
        optimizer=saved["optimizer"],
        replay=saved["replay"],
        lengths=[rows - 1 for rows in saved["lengths"]],
        policy=torch.load(Path(run_dir) / "policy.pt", weights_only=True),
    )


def config_of(run_dir, name="config") -> dict:
    return json.loads((Path(run_dir) / f"{name}.json").read_text())


def read_metrics(run_dir, drop=("sps", "seconds")) -> list[dict[str, str]]:
    """The rows of metrics.csv, without these columns."""
    with open(Path(run_dir) / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if k not in drop} for row in csv.DictReader(file)]


def event_log(run_dir) -> EventAccumulator:
    """What TensorBoard has of this run, with all of its scalars."""
    return EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()


def logged_steps(run_dir, tag: str) -> list[int]:
    """The steps at which TensorBoard shows this scalar, in the order of its curve."""
    return [scalar.step for scalar in event_log(run_dir).Scalars(tag)]
