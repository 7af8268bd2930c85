"""train() of all four scripts, event by event, in an environment whose episodes are known in advance."""

import copy
import dataclasses
import json
import re
import time
from collections import deque
from typing import NamedTuple

import common
import numpy as np
import pytest
import torch
from common import (
    FOP,
    MPE,
    SMACV2,
    SOFT,
    acting_on,
    checkpoint_of,
    config_of,
    evaluated_agent,
    event_log,
    over,
    read_metrics,
)

E, LENGTHS = 3, np.array([2, 3, 4])  # environment e plays episodes of LENGTHS[e] steps
ITERATIONS = 120
EPISODES = int((ITERATIONS // LENGTHS).sum())


class Clockwork:
    """Episodes of a fixed length, those of the last environment cut off. What agents see is the number of steps so far.

    An episode's first view shows a half more than the last view of the one before. The reward is the sum of the
    actions.
    """

    num_envs, num_agents, num_actions, obs_size, state_size, episode_limit = E, 2, 3, 1, 1, 4
    lengths = LENGTHS
    name = backend = title = "clockwork"
    about, restarts = {"backend": "clockwork"}, 0

    def look(self, begun):
        now = (self.clock + begun / 2).astype(np.float32)  # (E,)
        obs = np.tile(now[:, None, None], (1, self.num_agents, 1))
        mask = np.ones((self.num_envs, self.num_agents, self.num_actions), bool)
        return obs, {"state": now[:, None], "action_mask": mask}

    def __init__(self):
        self.seeds = []

    def reset(self, seed=None):
        self.seeds.append(seed)
        self.clock = np.zeros(self.num_envs)
        return self.look(np.ones(self.num_envs))

    def step(self, action):
        self.clock += 1
        ends, is_last = self.clock % self.lengths == 0, np.arange(self.num_envs) == self.num_envs - 1
        final_obs, final_info = self.look(np.zeros(self.num_envs))
        obs, info = self.look(ends)
        info |= {"final_obs": final_obs, "final_info": final_info | {"battle_won": ends}}
        return obs, action.sum(1).astype(np.float32), ends & ~is_last, ends & is_last, info

    def get_state(self):
        return {"clock": self.clock}

    def set_state(self, state):
        self.clock = state["clock"].copy()

    def close(self):
        pass


class Fragile(Clockwork):
    """In environment 1 every fifth episode is lost with its game."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        lost = terminated & (self.clock % (5 * self.lengths) == 0) & (np.arange(self.num_envs) == 1)
        return obs, reward, terminated & ~lost, truncated, info | {"invalid": lost}


class Infinite(Clockwork):
    """Its rewards are not numbers."""

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, np.full_like(reward, np.nan), *rest


class Event(NamedTuple):
    name: str
    step: int  # environment steps, summed over environments, before it
    arguments: tuple
    result: object


def make_args(script, **changes):
    settings = dict(backend="mpe2") if script in MPE else dict(backend="sim")
    settings |= dict(alpha=0.7) if script in SOFT else dict(epsilon_start=0.9, epsilon_finish=0.1)
    settings |= dict(num_envs=E, total_timesteps=E * ITERATIONS, eval_interval=100, checkpoint_interval=150)
    settings |= dict(learning_rate=2e-3, batch_size=6, buffer_size=200, episodes_per_update=3, target_update_interval=7)
    settings |= {} if script in SOFT else dict(epsilon_anneal_time=90)
    return script.Args(**(settings | changes))


class Clock:
    """In the place of the module time: a second for each step of training, and a little whenever somebody looks."""

    strftime = staticmethod(time.strftime)

    def __init__(self):
        self.now = 1e9

    def monotonic(self):
        self.now += 1e-4
        return self.now

    def game(self):
        """The clockwork, whose steps take a second each."""
        game, step = Clockwork(), Clockwork.step

        def timed(action):
            self.now += 1
            return step(game, action)

        game.step = timed
        return game


def results_of(agent, *_) -> dict:
    """In the place of evaluate: results that only this agent has."""
    mean = torch.cat([value.flatten() for value in agent.state_dict().values()]).double().mean().item()
    return dict.fromkeys(("return_mean", "return_std", "return_se", "win_rate"), mean)


def train(script, args, listen=lambda name, function: function, env=Clockwork, clock=None) -> dict:
    """In the clockwork, with tests that play nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "make_env", lambda *_: env())
        if script in MPE:
            patch.setattr(script, "SpreadMPE2", lambda *_: None)  # for the test of a finished run in mpe2
        patch.setattr(script, "evaluate", listen("evaluate", results_of))
        if clock:
            patch.setattr(script, "time", clock)
        return common.train(script, args)


def record(script, run_dir, env=Clockwork, clock=None, **changes) -> list[Event]:
    """Train; returns what happened, in order of completion."""
    events: list[Event] = []

    def listen(name, function):
        def wrapper(*arguments):
            step = E * sum(event.name == "act" for event in events)
            result = function(*arguments)
            seen = copy.deepcopy(result)  # the loop writes into what act returned
            if name == "evaluate":
                seen |= {"agent": copy.deepcopy(evaluated_agent(arguments).state_dict())}
            if arguments[1:2] != (None,):  # but for the test in mpe2
                events.append(Event(name, step, arguments, seen))
            return result

        return wrapper

    class Replay(deque):
        def append(self, episode):
            listen("add", super().append)(episode)

    write = script.write
    with pytest.MonkeyPatch.context() as patch:
        for name in ("act", "update", "move_target"):
            patch.setattr(script, name, listen(name, getattr(script, name)))
        save = listen("save_checkpoint", write)
        patch.setattr(script, "write", lambda path, x: (save if path.name == "checkpoint.pt" else write)(path, x))
        patch.setattr(script, "deque", Replay)
        folder = {} if "resume" in changes else {"run_dir": str(run_dir)}
        train(script, make_args(script, **folder, **changes), listen, env, clock)
    return events


def stored_episodes(events) -> list[dict]:
    """In the order in which they ended."""
    return [common.from_rows(event.arguments[0]) for event in events if event.name == "add"]


@pytest.fixture(scope="module", params=SMACV2 + MPE, ids=lambda script: script.__name__)
def run(request, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    return request.param, run_dir, record(request.param, run_dir)


def test_updates_and_target_copies_follow_the_number_of_episodes(run):
    """An update per 3 episodes once 6 are stored, and a copy per 7."""
    expected = []
    for n in range(1, EPISODES + 1):
        expected += ["add"] + ["update"] * (n >= 6 and n % 3 == 0) + ["move_target"] * (n % 7 == 0)
    happened = [event for event in run[2] if event.name in ("add", "update", "move_target")]
    assert [event.name for event in happened] == expected
    assert {event.arguments[1] for event in happened if event.name == "move_target"} == {1.0}


@over(SMACV2 + MPE)
def test_moving_average_takes_the_place_of_copies(script, tmp_path):
    events = record(script, tmp_path, tau=0.5, total_timesteps=60)
    moves = [(event.name, event.arguments[1]) for event in events if event.name == "move_target"]
    updates = sum(event.name == "update" for event in events)
    assert updates > 0
    assert moves == [("move_target", 0.5)] * updates


def test_agents_forget_exactly_when_their_episode_ends(run):
    acts = [event for event in run[2] if event.name == "act"]
    assert len(acts) == ITERATIONS
    for i, act in enumerate(acts):
        _, last_action, hidden, _ = acting_on(act.arguments)
        begins = torch.tensor(i % LENGTHS == 0)
        before = torch.where(begins[:, None], -1, torch.from_numpy(acts[i - 1].result[0]))
        assert torch.equal(last_action, before)
        assert torch.equal((hidden == 0).all(2), begins[:, None].expand(E, 2))


def test_exploration_follows_its_schedule(run):
    script, _, events = run
    acts = [event for event in events if event.name == "act"]
    expected = [0.7 if script in SOFT else max(0.1, 0.9 - 0.8 * act.step / 90) for act in acts]
    assert [acting_on(act.arguments)[-1] for act in acts] == pytest.approx(expected)


def test_stored_episodes_are_those_that_were_played(run):
    events = run[2]
    actions = np.stack([event.result[0] for event in events if event.name == "act"])  # (iterations, E, N)
    episodes = iter(stored_episodes(events))
    for end in range(1, ITERATIONS + 1):
        for e in np.flatnonzero(end % LENGTHS == 0):
            episode, begin = next(episodes), end - LENGTHS[e]
            seen = np.array([begin + 0.5, *range(begin + 1, end + 1)])
            assert (episode["obs"][:, :, 0] == seen[:, None]).all()
            assert (episode["state"][:, 0] == seen).all()
            assert (episode["action"] == actions[begin:end, e]).all()
            assert (episode["reward"] == actions[begin:end, e].sum(1)).all()
            assert episode["terminated"].tolist() == [False] * (LENGTHS[e] - 1) + [e < E - 1]
    assert next(episodes, None) is None


@pytest.mark.parametrize("script", [*SMACV2, *MPE, *FOP], ids=lambda script: script.__name__)
def test_nothing_of_an_episode_that_was_lost_is_stored_or_remembered(script, tmp_path):
    events = record(script, tmp_path, Fragile, **(dict(burn_in=6) if script in FOP else {}))
    episodes = iter(stored_episodes(events))
    for end in range(1, ITERATIONS + 1):
        for e in np.flatnonzero(end % LENGTHS == 0):
            if e != 1 or end % 15 != 0:
                begin = end - LENGTHS[e]
                assert next(episodes)["state"][:, 0].tolist() == [begin + 0.5, *range(begin + 1, end + 1)]
    assert next(episodes, None) is None
    for i, act in enumerate(event for event in events if event.name == "act"):
        assert torch.equal((acting_on(act.arguments)[2] == 0).all(2).all(1), torch.tensor(i % LENGTHS == 0))


@over(SMACV2 + MPE)
def test_a_seed_fixes_the_networks_and_another_gives_others(script, tmp_path):
    means = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(script, make_args(script, seed=seed, total_timesteps=E, run_dir=str(tmp_path / name)))
        means.append(read_metrics(tmp_path / name)[0]["return_mean"])  # of the parameters, by results_of
    assert means[0] == means[1] != means[2]


def test_tests_and_checkpoints_come_at_the_first_step_after_their_interval(run):
    steps = {name: [event.step for event in run[2] if event.name == name] for name in ("evaluate", "save_checkpoint")}
    assert steps == {"evaluate": [0, 102, 201, 300, 360], "save_checkpoint": [0, 150, 300, 360]}


def test_tensorboard_gets_returns_exploration_and_losses(run):
    script, run_dir, events = run
    log = event_log(run_dir)
    update = [event for event in events if event.name == "update"][24]
    losses = {"td", "q_tot", "policy", "entropy"} if script in SOFT else {"td", "q_tot"}
    assert {tag.removeprefix("losses/") for tag in log.Tags()["scalars"] if tag.startswith("losses/")} == losses
    for name in losses:
        logged = [(scalar.step, scalar.value) for scalar in log.Scalars(f"losses/{name}")]
        assert logged == [(update.step, pytest.approx(update.result[name].item()))]
    returns = [episode["reward"].sum() for episode in stored_episodes(events)]
    assert [scalar.value for scalar in log.Scalars("charts/episodic_return")] == returns
    charts = [scalar.value for scalar in log.Scalars("charts/alpha" if script in SOFT else "charts/epsilon")]
    assert charts == pytest.approx([0.7] * 5 if script in SOFT else [0.9] + [0.1] * 4)


def test_the_online_network_is_tested_and_written(run):
    """At the last step; the target, which was copied before the last updates, is another."""
    _, run_dir, events = run
    saved = checkpoint_of(run_dir)
    tested = [event for event in events if event.name == "evaluate"][-1].result["agent"]
    assert tested.keys() == saved.agent.keys() == saved.target_agent.keys() == saved.policy["agent"].keys()
    for name, value in saved.agent.items():
        assert torch.equal(tested[name], value)
        assert torch.equal(saved.policy["agent"][name], value)
        assert not torch.equal(saved.target_agent[name], value)
    sizes = {name: saved.policy[name] for name in ("obs_size", "num_agents", "num_actions")}
    assert sizes == {"obs_size": 1, "num_agents": 2, "num_actions": 3}


def test_checkpoints_hold_what_was_played_and_learnt(run):
    """Adam's moments of theta and phi after as many steps as there were updates, every episode, and the counts."""
    script, run_dir, events = run
    saved, updates = checkpoint_of(run_dir), sum(event.name == "update" for event in events)
    assert saved.counts == (360, EPISODES, updates)
    assert len(saved.optimizer["param_groups"]) == 1 + (script in SOFT)
    for group in saved.optimizer["param_groups"]:
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (2e-3, (0.9, 0.999), 1e-8, 0)
    for state in saved.optimizer["state"].values():
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert state["step"] == updates
    assert len(saved.optimizer["state"]) == sum("target." not in name for name in saved.networks)
    episodes = stored_episodes(events)
    assert saved.lengths == [len(episode["reward"]) for episode in episodes]
    for name in ("obs", "state", "mask"):
        assert np.array_equal(saved.replay[name], np.concatenate([episode[name] for episode in episodes]))


def test_metrics_have_a_row_for_every_test(run):
    _, run_dir, events = run
    rows, tests = read_metrics(run_dir), [event for event in events if event.name == "evaluate"]
    finished = [sum((event.step // E) // LENGTHS) for event in tests]
    updates = [sum(n >= 6 and n % 3 == 0 for n in range(1, done + 1)) for done in finished]
    for row, test, episodes, count in zip(rows, tests, finished, updates, strict=True):
        assert [int(row[name]) for name in ("step", "episodes", "updates")] == [test.step, episodes, count]
        for name in row.keys() & {"return_mean", "return_std", "return_se", "win_rate"}:
            assert float(row[name]) == test.result[name]
    assert len({row["return_mean"] for row in rows}) == len(rows)
    last = json.loads((run_dir / "summary.json").read_text())["eval"]
    assert all(last[name] == tests[-1].result[name] for name in last.keys() - {"episodes"})
    log = event_log(run_dir)
    for name in last.keys() - {"episodes"}:
        logged = [(scalar.step, scalar.value) for scalar in log.Scalars(f"eval/{name}")]
        assert logged == [(test.step, pytest.approx(test.result[name])) for test in tests]


@over(SMACV2 + MPE)
def test_a_resumed_run_goes_on_where_it_stopped_in_every_column_and_its_hours(script, tmp_path):
    """A second a step of the batch, and none for the time between the two runs; a third run resumes a resumed one."""
    clock = Clock()

    def part(name, iterations, **options):
        """What was seen and done: the events of acting."""
        settings = dict(total_timesteps=E * iterations, buffer_size=20, tau=0.9, checkpoint_interval=10**6)
        events = record(script, tmp_path / name, clock.game, clock, **settings, **options)
        clock.now += 10_000
        return [event for event in events if event.name == "act"]

    whole, parts = part("whole", 60), part("parts", 25)
    for iterations in (45, 60):
        parts += part("parts", iterations, resume=str(tmp_path / "parts"))
    for ours, theirs in zip(parts, whole, strict=True):
        done, expected = ((acting_on(event.arguments), event.result) for event in (ours, theirs))
        torch.testing.assert_close(done, expected, rtol=0, atol=0)
    rows, expected = (read_metrics(tmp_path / name, drop=()) for name in ("parts", "whole"))
    assert [row["step"] for row in rows] == ["0", "75", "102", "135", "180"]
    assert [row for row in rows if row["step"] not in ("75", "135")] == expected  # tests at the ends of the parts
    assert [float(row["seconds"]) for row in rows] == pytest.approx([int(row["step"]) / E for row in rows], abs=0.11)
    assert {float(row["sps"]) for row in rows[1:]} == {E}
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("parts", "whole")]
    for name in ("env_steps", "episodes", "updates", "seconds", "sps", "eval"):
        assert summaries[0][name] == summaries[1][name]
    ours, theirs = (checkpoint_of(tmp_path / name) for name in ("parts", "whole"))
    torch.testing.assert_close(ours.networks, theirs.networks, rtol=0, atol=0)
    torch.testing.assert_close(ours.optimizer["state"], theirs.optimizer["state"], rtol=0, atol=0)
    assert ours.lengths == theirs.lengths
    assert len(ours.lengths) == 20
    torch.testing.assert_close(ours.replay, theirs.replay, rtol=0, atol=0)


MAY_CHANGE = {
    "total_timesteps", "eval_interval", "checkpoint_interval", "cuda", "run_dir", "resume", "evaluate", "check_env",
    "capture_video", "track", "wandb_project_name", "wandb_entity",
}  # fmt: skip
OTHER = {"map": "zerg_5_vs_5", "backend": "batched", "level": "simple", "mixer": "vdn", "exp_name": "other"}
OTHER |= {"env": "agree:make", "env_options": {"enemy_wipe": True}, "seed": 2, "tau": 0.5, "td_lambda": 0.1}


@over(SMACV2 + MPE)
def test_a_resumed_run_takes_no_other_option_of_the_algorithm_or_game(script, tmp_path):
    """The refusal names it, also where the run has made its steps."""
    first = make_args(script, total_timesteps=60, run_dir=str(tmp_path))
    train(script, first)
    own = dataclasses.asdict(first) | {"run_dir": None, "resume": str(tmp_path)}
    for name, value in own.items():
        if name not in MAY_CHANGE:
            other = (
                OTHER[name] if name in OTHER else type(value)(not value) if value in (0, 1) else value // 2 or value / 2
            )
            assert other != value
            with pytest.raises(script.InputError, match=re.escape(f"{name} is {other}, but was {value} in")):
                train(script, script.Args(**own | {name: other}))


@over(SMACV2 + MPE)
def test_what_changes_in_a_resumed_run_is_recorded_beside_its_first_options(script, tmp_path):
    train(script, make_args(script, total_timesteps=60, run_dir=str(tmp_path)))
    first = (tmp_path / "config.json").read_bytes()
    train(script, make_args(script, total_timesteps=90, eval_interval=30, resume=str(tmp_path)))
    assert (tmp_path / "config.json").read_bytes() == first
    options, new = (config_of(tmp_path, name)["args"] for name in ("config", "resumed_60"))
    assert {name for name in options if options[name] != new[name]} == {
        "total_timesteps", "eval_interval", "resume", "run_dir",
    }  # fmt: skip
    assert {config_of(tmp_path, name)["algorithm"] for name in ("config", "resumed_60")} == {script.__name__}


@over(SMACV2 + MPE)
def test_seeds_of_test_episodes(script, tmp_path):
    """SMACv2: other battles in every test and every run. MPE: always the same, which no training has."""
    seeds = {}
    for seed in (1, 2):
        envs = []

        def make_env(args, num_envs, seed, *_, envs=envs):
            envs.append(Clockwork())
            envs[-1].made_with = seed
            return envs[-1]

        settings = dict(seed=seed, run_dir=str(tmp_path / str(seed)), total_timesteps=90, eval_episodes=E)
        settings |= dict(eval_interval=30)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "make_env", make_env)
            if script in MPE:
                patch.setattr(script, "SpreadMPE2", lambda *_: Clockwork())
            common.train(script, make_args(script, **settings))
        training, testing = envs
        assert training.seeds == [None]
        assert training.made_with == seed
        seeds[seed] = testing.seeds
        assert len(testing.seeds) == 4
    different = len({*seeds[1], *seeds[2]})
    assert different == (1 if script in MPE else 8)
    assert min(seeds[1]) >= (2**31 if script in MPE else 0)


@over(SMACV2 + MPE)
def test_nothing_is_computed_on_another_device(script, monkeypatch):
    """Updates and acting on the meta device, which as a GPU does refuses to compute with a CPU's tensors."""
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)  # of the actions, which alone leave the device
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: tensor)
    device, args = torch.device("meta"), common.make_args(script, tau=0.5)
    networks = script.Networks(Clockwork(), args).to(device)
    optimizer = torch.optim.Adam(networks.parameter_groups())
    batch, _ = common.make_batch(script, common.random_episodes(LENGTHS, game=Clockwork), device=device)
    logs = script.update(networks, optimizer, batch, args)
    row = {name: getattr(batch, name)[:E] for name in ("obs", "state", "mask", "last_action")}
    action, hidden = script.act(networks, row, torch.zeros(E, 2, 64, device=device), 0.5)
    assert {x.device for x in (action, hidden, *logs.values())} == {device}
