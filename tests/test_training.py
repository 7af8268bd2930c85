"""train() of all four scripts, event by event, in an environment whose episodes are known in advance."""

import copy
from typing import NamedTuple

import fake_cuda
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import qmix_mpe
import qmix_smacv2
import softqmix_mpe
import softqmix_smacv2

SMACV2, MPE = (softqmix_smacv2, qmix_smacv2), (softqmix_mpe, qmix_mpe)
SOFT = (softqmix_smacv2, softqmix_mpe)
E, LENGTHS = 3, np.array([2, 3, 4])  # environment e plays episodes of LENGTHS[e] steps
ITERATIONS = 120
EPISODES = int((ITERATIONS // LENGTHS).sum())


class Clockwork:
    """Episodes of a fixed length, those of the last environment cut off. What agents see is the number of steps so far.

    An episode's first view shows a half more than the last view of the one before. The reward is the sum of the
    actions.
    """

    num_envs, num_agents, num_actions, obs_size, state_size, episode_limit = E, 2, 3, 1, 1, 4

    def look(self, begun):
        now = (self.clock + begun / 2).astype(np.float32)  # (E,)
        obs = np.tile(now[:, None, None], (1, self.num_agents, 1))
        return obs, {"state": now[:, None], "action_mask": np.ones((E, self.num_agents, self.num_actions), bool)}

    def reset(self, seed=None):
        self.clock = np.zeros(E)
        return self.look(np.ones(E))

    def step(self, action):
        self.clock += 1
        ends, is_last = self.clock % LENGTHS == 0, np.arange(E) == E - 1
        final_obs, final_info = self.look(np.zeros(E))
        obs, info = self.look(ends)
        info |= {"final_obs": final_obs, "final_info": final_info | {"battle_won": ends}}
        return obs, action.sum(1), ends & ~is_last, ends & is_last, info

    def get_state(self):
        return {"clock": self.clock}

    def set_state(self, state):
        self.clock = state["clock"].copy()

    def close(self):
        pass


class Event(NamedTuple):
    name: str
    step: int  # environment steps, summed over environments, before it
    arguments: tuple
    result: object


def make_args(script, **changes):
    settings = dict(backend="mpe2") if script in MPE else dict(backend="sim")
    settings |= dict(alpha=0.7) if script in SOFT else dict(epsilon_start=0.9, epsilon_finish=0.1)
    settings |= dict(num_envs=E, total_timesteps=E * ITERATIONS, eval_interval=100, checkpoint_interval=150)
    settings |= dict(batch_size=6, buffer_size=200, episodes_per_update=3, target_update_interval=5)
    settings |= {} if script in SOFT else dict(epsilon_anneal_time=90)
    return script.Args(**(settings | changes))


def train(script, args, listen=lambda name, function: function) -> None:
    """In the clockwork, without tests: MPE's know Spread's episodes only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "make_env", lambda *_: Clockwork())
        metrics = dict.fromkeys(("return_mean", "return_std", "return_se", "win_rate"), 0.0)
        patch.setattr(script, "evaluate", listen("evaluate", lambda *_: metrics))
        script.train(args)


def record(script, run_dir, **changes) -> list[Event]:
    """Train; returns what happened, in order of completion."""
    events: list[Event] = []

    def listen(name, function):
        def wrapper(*arguments):
            step = E * sum(event.name == "act" for event in events)
            result = function(*arguments)
            events.append(Event(name, step, arguments, copy.deepcopy(result)))  # the loop writes into what act returned
            return result

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in ("act", "update", "move_target", "save_checkpoint"):
            patch.setattr(script, name, listen(name, getattr(script, name)))
        patch.setattr(script.Replay, "add", listen("add", script.Replay.add))
        train(script, make_args(script, run_dir=str(run_dir), **changes), listen)
    return events


def stored_episodes(events) -> list[dict]:
    """The replay has room for all of them, in the order in which they ended."""
    replay = next(event for event in events if event.name == "add").arguments[0]
    return [{name: value.numpy() for name, value in episode.items()} for episode in replay.episodes]


@pytest.fixture(scope="module", params=SMACV2 + MPE, ids=lambda script: script.__name__)
def run(request, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    return request.param, run_dir, record(request.param, run_dir)


def test_updates_and_target_copies_follow_the_number_of_episodes(run):
    """An update per 3 episodes once 6 are stored, and a copy per 5."""
    expected = []
    for n in range(1, EPISODES + 1):
        expected += ["add"] + ["update"] * (n >= 6 and n % 3 == 0) + ["move_target"] * (n % 5 == 0)
    happened = [event for event in run[2] if event.name in ("add", "update", "move_target")]
    assert [event.name for event in happened] == expected
    assert {event.arguments[1] for event in happened if event.name == "move_target"} == {1.0}


@pytest.mark.parametrize("script", SMACV2 + MPE, ids=lambda script: script.__name__)
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
        _, _, last_action, hidden, _ = act.arguments
        begins = torch.tensor(i % LENGTHS == 0)
        before = torch.where(begins[:, None], -1, acts[i - 1].result[0])
        assert torch.equal(last_action, before)
        assert torch.equal((hidden == 0).all(2), begins[:, None].expand(E, 2))


def test_exploration_follows_its_schedule(run):
    script, _, events = run
    acts = [event for event in events if event.name == "act"]
    expected = [0.7 if script in SOFT else max(0.1, 0.9 - 0.8 * act.step / 90) for act in acts]
    assert [act.arguments[-1] for act in acts] == pytest.approx(expected)


def test_stored_episodes_are_those_that_were_played(run):
    events = run[2]
    actions = np.stack([event.result[0].numpy() for event in events if event.name == "act"])  # (iterations, E, N)
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


def test_tests_and_checkpoints_come_at_the_first_step_after_their_interval(run):
    steps = {name: [event.step for event in run[2] if event.name == name] for name in ("evaluate", "save_checkpoint")}
    assert steps == {"evaluate": [0, 102, 201, 300, 360], "save_checkpoint": [150, 300, 360]}


def test_tensorboard_gets_returns_exploration_and_losses(run):
    script, run_dir, events = run
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
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


@pytest.mark.parametrize("device", ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("script", SMACV2 + MPE, ids=lambda script: script.__name__)
def test_training_by_cuda_graphs_is_training(script, device, tmp_path, monkeypatch):
    """As if the same padded batches were learnt as usual; and a run can be resumed with the option, or without it."""
    if device == "emulated":
        monkeypatch.setattr(script, "check_args", lambda _: None)  # it would find no GPU
        fake_cuda.install(monkeypatch)
    networks, record = [], script.CUDAGraphs
    for name in ("recorded", "as usual"):
        monkeypatch.setattr(script, "CUDAGraphs", record if name == "recorded" else lambda function: function)
        run_dir, begun = str(tmp_path / name), {}
        for cudagraphs, iterations in ((False, 40), (True, 110), (False, ITERATIONS)):
            options = dict(run_dir=run_dir, cudagraphs=cudagraphs, total_timesteps=E * iterations)
            train(script, make_args(script, **options, **begun))
            begun = {"resume": run_dir}
        checkpoint = tmp_path / name / "checkpoints" / str(E * ITERATIONS)
        networks.append(torch.load(checkpoint / "training.pt", map_location="cpu")["networks"])
        policy = torch.load(checkpoint / "policy.pt", weights_only=True)
        assert {value.device.type for value in policy["agent"].values()} == {"cpu"}
    torch.testing.assert_close(*networks, rtol=0, atol=1e-6 if device == "emulated" else 1e-3)
    if device == "emulated":
        assert fake_cuda.FakeCUDAGraph.replays > 70


@pytest.mark.parametrize("pad", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("replay_device", ["cpu", "meta"])
@pytest.mark.parametrize("script", SMACV2, ids=lambda script: script.__name__)
def test_nothing_is_computed_on_another_device(script, replay_device, pad):
    """Updates and acting on the meta device, which as a GPU does refuses to compute with a CPU's tensors."""
    device, args, env = torch.device("meta"), script.Args(tau=0.5), Clockwork()
    script.check_args(args)
    networks = script.Networks(env, args).to(device)
    optimizer = torch.optim.Adam(networks.parameter_groups())
    replay = script.Replay(E, torch.device(replay_device))
    for length in LENGTHS:
        rows = dict.fromkeys(replay.VIEW, length + 1) | dict.fromkeys(replay.FIELDS[len(replay.VIEW) :], length)
        shapes = {"obs": (2, 1), "state": (1,), "mask": (2, 3), "action": (2,), "reward": (), "terminated": ()}
        kinds = {"mask": bool, "terminated": bool, "action": np.int64}
        replay.add({name: np.ones((n, *shapes[name]), kinds.get(name, np.float32)) for name, n in rows.items()})
    batch = replay.sample(E, device, pad)
    logs = script.update(networks, optimizer, batch, args)
    view = {name: getattr(batch, name)[:E] for name in replay.VIEW}
    exploration = torch.ones((), device=device) if script not in SOFT else args.alpha
    action, hidden = script.act(networks, view, batch.action[:E], torch.zeros(E, 2, 64, device=device), exploration)
    assert {x.device for x in (action, hidden, *logs.values())} == {device}


class Counter:
    """An agent that remembers how many steps it has made."""

    hidden_size = 1

    def __init__(self):
        self.inputs = []

    def step(self, obs, last_action, hidden):
        self.inputs.append((last_action, hidden))
        return torch.zeros(E, Clockwork.num_agents, Clockwork.num_actions), hidden + 1


@pytest.mark.parametrize("script", SMACV2, ids=lambda script: script.__name__)
def test_evaluation_starts_each_battle_without_memory(script):
    agent = Counter()
    script.evaluate(agent, Clockwork(), 2 * E, 0, torch.device("cpu"))
    assert len(agent.inputs) == 2 * LENGTHS.max()
    for i, (last_action, hidden) in enumerate(agent.inputs):
        age = torch.tensor(i % LENGTHS)[:, None].expand(E, 2)
        assert torch.equal(hidden[:, :, 0], age.float())
        assert torch.equal(last_action, torch.where(age == 0, -1, 0))
