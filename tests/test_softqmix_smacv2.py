"""softqmix_smacv2.py: its mathematics against slow explicit versions, its files, and that it learns."""

import copy
import csv
import itertools
import json
import math
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_cuda
import numpy as np
import pytest
import torch

import softqmix_smacv2 as sq
from smacv2_sim import SMACv2Sim

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
GAMMA, LAMBDA, ALPHA = 0.97, 0.6, 0.3


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def small_args(run_dir, **changes) -> sq.Args:
    """A run of a few seconds."""
    settings = dict(map="terran_3_vs_2", total_timesteps=1200, batch_size=8, buffer_size=24, eval_interval=400)
    settings |= dict(eval_episodes=4, checkpoint_interval=10**6, target_update_interval=8, run_dir=str(run_dir))
    return sq.Args(**(settings | changes))


def make_networks(args: sq.Args, dtype=torch.float32):
    """Untrained networks, their target a different one, and the environment they are for."""
    sq.check_args(args)
    env = sq.make_env(args, 4, 0)
    networks = sq.Networks(env, args)
    networks.target = sq.Critic(env, args)
    return networks.to(dtype), env


def random_episode(env, length: int, rng, ended=True) -> dict[str, np.ndarray]:
    """Any numbers, and masks with at least one available action, of which one is taken."""
    N, A = env.num_agents, env.num_actions
    mask = rng.random((length + 1, N, A)) < 0.4
    mask[..., 0] |= ~mask.any(-1)
    terminated = np.zeros(length, bool)
    terminated[-1] = ended
    return {
        "obs": rng.normal(size=(length + 1, N, env.obs_size)).astype(np.float32),
        "state": rng.normal(size=(length + 1, env.state_size)).astype(np.float32),
        "mask": mask,
        "action": (rng.random(mask.shape) * mask)[:-1].argmax(-1),
        "reward": rng.normal(size=length).astype(np.float32),
        "terminated": terminated,
    }


def make_batch(env, lengths, rng, dtype=torch.float32, cut_off=(), pad=False) -> tuple[sq.Batch, list[dict]]:
    """A batch of all stored episodes, and these in the batch's order."""
    replay = sq.Replay(len(lengths), CPU)
    episodes = [random_episode(env, n, rng, ended=i not in cut_off) for i, n in enumerate(lengths)]
    for episode in episodes:
        replay.add(episode)
    batch = replay.sample(len(lengths), CPU, pad)
    for name in ("obs", "state", "reward"):
        setattr(batch, name, getattr(batch, name).to(dtype))
    return batch, sorted(episodes, key=lambda episode: len(episode["reward"]), reverse=True)


def episode_by_episode(rows: torch.Tensor, num_episodes: list[int]) -> list[torch.Tensor]:
    """Rows in order of time -> each episode's rows."""
    times = rows.split(num_episodes)
    return [torch.stack([time[b] for time in times if b < len(time)]) for b in range(num_episodes[0])]


# --- Targets ---


def explicit_targets(reward, terminated, next_q, next_log_policy) -> list[float]:
    """y_t of one episode as (1 - lambda) sum_k lambda^(k-1) G^(k), each k-step return with its entropy terms."""
    L = len(reward)
    alive = [0.0 if terminated[t] else 1.0 for t in range(L)]

    def k_step_return(t, k):
        rewards = sum(GAMMA**j * reward[t + j] for j in range(k))
        entropies = sum(-ALPHA * GAMMA ** (j + 1) * alive[t + j] * next_log_policy[t + j] for j in range(k))
        return rewards + entropies + GAMMA**k * alive[t + k - 1] * next_q[t + k - 1]

    targets = []
    for t in range(L):
        n = L - t
        early = sum(LAMBDA ** (k - 1) * k_step_return(t, k) for k in range(1, n))
        targets.append((1 - LAMBDA) * early + LAMBDA ** (n - 1) * k_step_return(t, n))
    return targets


@pytest.mark.parametrize("pad", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("ended", [(1, 1, 1, 1), (0, 0, 0, 0), (1, 0, 1, 0)], ids=["terminated", "cut off", "mixed"])
def test_targets_equal_the_explicit_sum_of_k_step_returns(ended, pad):
    lengths = [9, 6, 4, 1]
    batch, _ = make_batch(SMACv2Sim("zerg_2_vs_2", 1), lengths, np.random.default_rng(0), pad=pad)
    episodes = [torch.randn(3, n, dtype=torch.float64) for n in lengths]
    terminated = [torch.arange(n) == (n - 1 if end else n) for n, end in zip(lengths, ended, strict=True)]
    for episode, end in zip(episodes, ended, strict=True):
        if end:
            episode[1:, -1] = math.nan  # value and entropy of the state after the end: they must not matter

    def in_order_of_time(columns):
        """In padding, numbers that must not matter, either."""
        nothing = torch.tensor(math.nan).to(columns[0].dtype)
        times = range(len(batch.num_episodes) - 1)
        return torch.stack([c[t] if t < len(c) else nothing for t in times for c in columns if pad or t < len(c)])

    reward, next_q, next_log_policy = (in_order_of_time([episode[i] for episode in episodes]) for i in range(3))
    columns = (reward, in_order_of_time(terminated), next_q, next_log_policy)
    targets = sq.td_lambda_targets(*columns, batch, GAMMA, LAMBDA, ALPHA)
    for b, y in enumerate(episode_by_episode(targets, batch.num_episodes[1:])):
        reward, next_q, next_log_policy = episodes[b].nan_to_num().tolist()
        expected = explicit_targets(reward, terminated[b].tolist(), next_q, next_log_policy)
        torch.testing.assert_close(y[: lengths[b]].tolist(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("flags", [{}, {"use_g": False}, {"use_g": False, "use_f": False}, {"mixer": "vdn"}], ids=str)
@pytest.mark.parametrize(("td_weight", "pad"), [(1.0, False), (0.1, False), (0.1, True)])
def test_losses_equal_a_loop_over_episodes_and_steps(flags, td_weight, pad, monkeypatch):
    """Order of time, alignment, masks, gather, means: everything, against cell-by-cell Python."""
    args = small_args("unused", alpha=0.5, td_weight=td_weight, gamma=GAMMA, td_lambda=LAMBDA, **flags)
    networks, env = make_networks(args, torch.float64)
    critic, target, f = networks.critic, networks.target, networks.f
    lengths = [3, 17, 5, 5, 30, 1]
    batch, episodes = make_batch(env, lengths, np.random.default_rng(1), torch.float64, cut_off=(1, 4), pad=pad)
    monkeypatch.setattr(sq, "sample_action", lambda log_policy, mask: log_policy.argmax(-1))  # u' without dice
    loss, logs = sq.compute_losses(networks, batch, args)
    assert loss == logs["td"] + logs["policy"]

    squares_q, squares_pi, entropies, q_tots = [], [], [], []
    for episode in episodes:
        L = len(episode["reward"])
        obs, state = (torch.tensor(episode[name], dtype=torch.float64) for name in ("obs", "state"))
        mask, action = (torch.tensor(episode[name]) for name in ("mask", "action"))
        values = {}
        for name, network in (("online", critic), ("target", target)):
            hidden, last, values[name] = torch.zeros(1, env.num_agents, 64).double(), -torch.ones_like(action[:1]), []
            for t in range(L + 1):
                q, hidden = network.agent.step(obs[t : t + 1], last, hidden)
                values[name].append(q)
                last = action[t : t + 1] if t < L else None
        next_q, next_log_policy, q_tot, f_sum = [], [], [], []
        for t in range(L):
            s, s_next = state[t : t + 1], state[t + 1 : t + 2]
            q_i = critic.local_q(values["online"][t], s).gather(-1, action[t, :, None][None])
            q_tot.append(critic.mixer(q_i[..., 0], s).item())
            f_sum.append(f(q_i, s).sum().item() if f is not None else q_tot[-1])
            logits = critic.local_q(values["online"][t + 1], s_next)
            logits = f(logits, s_next) if f is not None else logits
            policy = [torch.softmax(logits[0, i][mask[t + 1, i]] / 0.5, 0) for i in range(env.num_agents)]
            entropies.append(sum(-(p * p.log()).sum().item() for p in policy))
            next_log_policy.append(sum(p.max().log().item() for p in policy))
            best = [mask[t + 1, i].nonzero()[p.argmax()] for i, p in enumerate(policy)]
            bar = target.local_q(values["target"][t + 1].gather(-1, torch.stack(best)[None]), s_next)
            next_q.append(target.mixer(bar[..., 0], s_next).item())
        monkeypatch.setattr(sys.modules[__name__], "ALPHA", 0.5)
        y = explicit_targets(episode["reward"].tolist(), episode["terminated"], next_q, next_log_policy)
        squares_q += [0.5 * (td_weight if q > t else 1.0) * (q - t) ** 2 for q, t in zip(q_tot, y, strict=True)]
        squares_pi += [0.5 * (a - b) ** 2 for a, b in zip(f_sum, q_tot, strict=True)]
        q_tots += q_tot
    expected = [np.mean(x) for x in (squares_q, squares_pi, q_tots, entropies)]
    got = [logs[name].item() for name in ("td", "policy", "q_tot", "entropy")]
    np.testing.assert_allclose(got, expected, rtol=1e-6)  # the policy is float32 from the logits on


def test_padding_changes_no_gradient(monkeypatch):
    monkeypatch.setattr(sq, "sample_action", lambda log_policy, mask: log_policy.argmax(-1))
    networks, env = make_networks(args := small_args("unused"), torch.float64)
    gradients = []
    for pad in (False, True):
        batch, _ = make_batch(env, [3, 17, 5, 40], np.random.default_rng(1), torch.float64, cut_off=(1,), pad=pad)
        assert len(batch.reward) == (4 * 64 if pad else 3 + 17 + 5 + 40)
        loss = sq.compute_losses(networks, batch, args)[0]
        parameters = [*networks.critic.parameters(), *networks.f.parameters()]
        gradients.append([loss, *torch.autograd.grad(loss, parameters)])
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)  # the policy is float32 from the logits on
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients[0])


def test_gradients_stop_where_the_paper_says(monkeypatch):
    """L_pi moves f alone: theta's gradient does not depend on f, nor f's on the rewards; the target has none."""
    networks, env = make_networks(args := small_args("unused"))
    batch, _ = make_batch(env, [4, 7], np.random.default_rng(0))
    uniform = lambda networks, stage1, state, mask, alpha: sq.masked_log_policy(torch.zeros_like(stage1), mask)  # noqa: E731
    monkeypatch.setattr(sq, "soft_log_policy", uniform)  # else f would enter the target through the entropy
    monkeypatch.setattr(sq, "sample_action", lambda log_policy, mask: mask.float().argmax(-1))

    def gradients(part):
        networks.zero_grad()
        sq.compute_losses(networks, batch, args)[0].backward()
        assert all(p.grad is None for p in networks.target.parameters())
        return torch.cat([p.grad.flatten() for p in part.parameters()])

    theta, phi = gradients(networks.critic), gradients(networks.f)
    assert theta.abs().sum() > 0
    assert phi.abs().sum() > 0
    batch.reward += 1
    assert torch.equal(gradients(networks.f), phi)
    batch.reward -= 1
    random_parameters(networks.f, 0.5)
    torch.testing.assert_close(gradients(networks.critic), theta)


# --- Networks and policy ---


def random_parameters(network, scale):
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    return network


@pytest.mark.parametrize("scale", [0.03, 0.3, 3.0])
def test_g_and_f_keep_the_order_of_actions_and_the_mixer_is_monotonic(scale):
    N, S, A, R = 4, 7, 9, 200
    state = 5 * torch.randn(R, S).double()
    x = (10 * torch.randn(R, N, A)).double().sort(-1).values
    g = random_parameters(sq.TransformG(S, N).double(), scale)
    f = random_parameters(sq.TransformF(S, N).double(), scale)
    assert (g(x, state).diff(dim=-1) >= x.diff(dim=-1) * (1 - 1e-9)).all()  # the residual's slope is 1: strict
    assert (f(x, state).diff(dim=-1) >= 0).all()
    mixer = random_parameters(sq.Mixer(S, N).double(), scale)
    q = torch.randn(R, N).double()
    for i in range(N):
        more = q.clone()
        more[:, i] += 3 * torch.rand(R)
        assert (mixer(more, state) >= mixer(q, state) - 1e-9).all()


def test_each_agent_has_its_own_transformation():
    x, state = torch.randn(1, 1, 3).expand(6, 4, 3), torch.randn(6, 5)
    for transform in (sq.TransformG(5, 4), sq.TransformF(5, 4)):
        outputs = transform(x, state)
        assert all(not torch.allclose(outputs[:, i], outputs[:, j]) for i, j in itertools.combinations(range(4), 2))


def test_vdn_is_the_sum():
    q = torch.randn(5, 3)
    torch.testing.assert_close(sq.VDNMixer()(q, torch.randn(5, 2)), q[:, 0] + q[:, 1] + q[:, 2])


def test_unrolled_episodes_equal_stepping_cell_by_cell():
    networks, env = make_networks(small_args("unused"), torch.float64)
    agent = networks.critic.agent
    lengths = [40, 1, 7, 8, 9, 23]  # all different, so that the order in the batch is known
    batch, episodes = make_batch(env, lengths, np.random.default_rng(0), torch.float64)
    last_action = torch.full(batch.obs.shape[:2], -1)
    last_action[len(lengths) :] = batch.action
    unrolled = agent.unroll(agent.encode(batch.obs, last_action), batch.num_episodes)
    for episode, values in zip(episodes, episode_by_episode(unrolled, batch.num_episodes), strict=True):
        hidden = torch.zeros(1, env.num_agents, 64).double()
        last = torch.full((1, env.num_agents), -1)
        assert len(values) == len(episode["obs"])
        for t, expected in enumerate(values):
            q, hidden = agent.step(torch.tensor(episode["obs"][t : t + 1]).double(), last, hidden)
            torch.testing.assert_close(q[0], expected, rtol=0, atol=1e-12)
            last = torch.tensor(episode["action"][t : t + 1]) if t < len(episode["action"]) else None


@pytest.mark.parametrize("num_episodes", [[6, 6, 4, 1], [6, 6, 6, 6]], ids=["packed", "equal lengths"])
def test_unrolling_step_by_step_equals_the_gru_of_a_gpu(monkeypatch, num_episodes):
    """Values and gradients; a GPU's branches are run on the CPU, where nn.GRU takes packed sequences, too."""
    networks, env = make_networks(small_args("unused"), torch.float64)
    agent = networks.critic.agent
    x = torch.randn(sum(num_episodes), env.num_agents, agent.fc_in.in_features, dtype=torch.float64)
    results, calls = [], []
    agent.gru.register_forward_hook(lambda *_: calls.append("nn.GRU"))
    for is_cuda in (False, True):
        monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda)
        values = agent.unroll(x, num_episodes)
        assert len(calls) == is_cuda
        results.append([values, *torch.autograd.grad(values.square().sum(), list(agent.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_pieces_without_gradient_equal_the_whole():
    g = sq.TransformG(7, 3)
    x, state = torch.randn(300, 3, 5), torch.randn(300, 7)
    with torch.no_grad():
        in_pieces = g(x, state)
    torch.testing.assert_close(in_pieces, g(x, state).detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [10.0, 0.005, 1e-6])
def test_policy_never_takes_an_unavailable_action(alpha):
    mask = torch.rand(500, 5, 11) < 0.3
    mask[..., 4] |= ~mask.any(-1)
    log_policy = sq.masked_log_policy(30 * torch.randn(mask.shape) / alpha, mask)
    assert (log_policy.exp().sum(-1) - 1).abs().max() < 1e-4
    assert (log_policy[~mask] == -torch.inf).all()
    assert log_policy[mask].isfinite().all()
    for _ in range(20):
        assert mask.gather(-1, sq.sample_action(log_policy, mask).unsqueeze(-1)).all()
    assert mask.gather(-1, sq.greedy_action(torch.randn(mask.shape), mask).unsqueeze(-1)).all()


def test_samples_follow_the_policy():
    mask = torch.tensor([True, True, False, True])
    log_policy = sq.masked_log_policy(torch.tensor([0.0, 1.0, 9.0, -1.0]), mask)
    n = 40_000
    actions = sq.sample_action(log_policy.expand(n, 4), mask.expand(n, 4))
    frequency = torch.bincount(actions, minlength=4) / n
    assert (frequency - log_policy.exp()).abs().max() < 4 * math.sqrt(0.25 / n)


def test_a_dead_agent_adds_no_entropy():
    log_policy = sq.masked_log_policy(torch.randn(3, 6), torch.tensor([True] + 5 * [False]))
    action = sq.sample_action(log_policy, torch.tensor([True] + 5 * [False]).expand(3, 6))
    assert (log_policy.gather(-1, action.unsqueeze(-1)) == 0).all()


# --- Replay ---


def test_replay_returns_what_was_stored_through_wrap_around(tmp_path):
    env, rng = SMACv2Sim("zerg_2_vs_2", 1), np.random.default_rng(0)
    replay = sq.Replay(5, CPU)
    stored = [random_episode(env, int(rng.integers(1, 12)), rng, ended=bool(i % 2)) for i in range(13)]
    for i, episode in enumerate(stored):
        replay.add({name: array.copy() for name, array in episode.items()})
        assert len(replay) == min(i + 1, 5)
    torch.save(replay.state_dict(), tmp_path / "replay.pt")
    restored = sq.Replay(5, CPU)
    restored.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    another = random_episode(env, 4, rng)
    for memory in (replay, restored):
        memory.add(another)
        batch = memory.sample(5, CPU)
        expected = sorted([*stored[-4:], another], key=lambda episode: len(episode["reward"]), reverse=True)
        assert batch.num_episodes[0] == 5
        columns = {
            name: episode_by_episode(getattr(batch, name), batch.num_episodes[name not in memory.VIEW :])
            for name in memory.FIELDS
        }
        now = episode_by_episode(batch.now, batch.num_episodes[1:])
        places = episode_by_episode(torch.arange(len(batch.obs)), batch.num_episodes)
        assert all(torch.equal(rows, place[:-1]) for rows, place in zip(now, places, strict=True))
        unsplit = {id(e): False for e in expected}
        for b in range(5):  # episodes of equal length may stand in any order
            found = [e for e in expected if all(np.array_equal(columns[k][b].numpy(), e[k]) for k in memory.FIELDS)]
            assert len(found) == 1
            unsplit[id(found[0])] = True
        assert all(unsplit.values())
    numbers = sum(tensor.numel() for episode in replay.episodes for tensor in episode.values())
    assert numbers == sum(array.size for episode in [*stored[-4:], another] for array in episode.values())


@pytest.mark.parametrize(("lengths", "steps"), [([32, 5, 31], 32), ([33, 1], 64), ([7, 7, 7], 7)], ids=str)
def test_padding_repeats_an_episodes_last_rows(lengths, steps, monkeypatch):
    monkeypatch.setattr(torch, "randperm", torch.arange)  # so that the order of episodes of one length is known
    env = SMACv2Sim("zerg_2_vs_2", 1)
    batch, episodes = make_batch(env, lengths, np.random.default_rng(0), pad=True)
    assert batch.num_episodes == [len(lengths)] * (steps + 1)
    for name in sq.Replay.FIELDS:
        table = getattr(batch, name).unflatten(0, (-1, len(lengths)))
        for b, episode in enumerate(episodes):
            column, rows = table[:, b], torch.from_numpy(episode[name])
            assert torch.equal(column[: len(rows)], rows)
            assert torch.equal(column[len(rows) :], rows[-1:].expand_as(column[len(rows) :]))
    L, t = torch.tensor([len(episode["reward"]) for episode in episodes]), torch.arange(steps).unsqueeze(1)
    assert torch.equal(batch.real.view(steps, -1), t < L)
    assert torch.equal(batch.last.view(steps, -1), t == L - 1)
    assert torch.equal(batch.now, torch.arange(steps * len(lengths)))
    assert torch.equal(batch.place, batch.now)


@pytest.mark.parametrize(("capacity", "kept"), [(3, [6, 7, 8, 9]), (5, [5, 6, 7, 8, 9]), (9, [4, 5, 6, 7, 8, 9])])
def test_a_restored_replay_of_another_capacity_keeps_the_newest(capacity, kept):
    """Episodes 4 to 8 are stored, 9 is added after the change."""
    env, rng = SMACv2Sim("zerg_2_vs_2", 1), np.random.default_rng(0)
    replay, restored = sq.Replay(5, CPU), sq.Replay(capacity, CPU)
    for number in range(10):
        if number == 9:
            restored.load_state_dict(replay.state_dict())
            replay = restored
        replay.add(random_episode(env, 2, rng) | {"reward": np.full(2, number, np.float32)})
    assert sorted(episode["reward"][0].item() for episode in replay.episodes) == kept[-capacity:]


def test_recorder_cuts_episodes_where_environments_end():
    """Each environment counts its own steps; the recorder must give back exactly these counts."""
    env, rng = SMACv2Sim("zerg_2_vs_2", 3), np.random.default_rng(0)
    recorder, clock, begun = sq.Recorder(env), np.zeros(3), np.zeros(3)

    def view():
        number = clock[:, None, None]
        mask = np.ones((3, 2, env.num_actions), bool)
        return {"obs": np.zeros((3, 2, env.obs_size)) + number, "state": np.zeros((3, env.state_size)), "mask": mask}

    for step in range(100):
        recorder.observe(np.arange(3), view())
        ends = rng.random(3) < 0.1
        recorder.act(np.full((3, 2), step), clock + 0.5, ends)
        clock += 1
        finished = np.flatnonzero(ends)
        recorder.observe(finished, {name: array[finished] for name, array in view().items()})
        for e in finished:
            episode = recorder.finish(e)
            assert episode["obs"][:, 0, 0].tolist() == list(range(int(begun[e]), int(clock[e]) + 1))
            assert episode["reward"].tolist() == [t + 0.5 for t in range(int(begun[e]), int(clock[e]))]
            assert episode["terminated"].tolist() == [False] * (len(episode["reward"]) - 1) + [True]
            clock[e] = begun[e] = 1000 * step  # the next episode's observations are told apart
    assert begun.min() > 0


# --- Runs ---


def read_metrics(run_dir, drop=("sps", "seconds")):
    with open(Path(run_dir) / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if k not in drop} for row in csv.DictReader(file)]


def parameters_of(run_dir, step):
    saved = torch.load(Path(run_dir) / "checkpoints" / str(step) / "training.pt", weights_only=True)
    return saved["networks"]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run") / "a"
    return run_dir, sq.train(small_args(run_dir))


def test_run_leaves_the_promised_files(finished_run):
    run_dir, summary = finished_run
    assert summary == json.loads((run_dir / "summary.json").read_text())
    assert {"args", "backend", "simulator_version", "env_steps", "episodes", "updates", "sps", "eval"} <= set(summary)
    assert set(summary["eval"]) == {"episodes", "return_mean", "return_std", "win_rate"}
    assert (summary["backend"], summary["env_steps"]) == ("sim", 1200)
    assert summary["updates"] == summary["episodes"] // 4 - 1  # the first one when 8 are stored
    rows = read_metrics(run_dir, drop=())
    assert [row["step"] for row in rows] == ["0", "400", "800", "1200"]
    assert list(rows[0]) == ["step", "episodes", "updates", "return_mean", "return_std", "win_rate", "sps", "seconds"]
    assert json.loads((run_dir / "config.json").read_text())["backend"] == "sim"
    assert not list(run_dir.rglob("*.tmp"))


def test_tensorboard_has_the_usual_tags(finished_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished_run[0])).Reload()
    charts, evals = ("charts/episodic_return", "charts/SPS", "charts/alpha"), ("return_mean", "return_std", "win_rate")
    assert {*charts, *(f"eval/{name}" for name in evals)} <= set(events.Tags()["scalars"])
    assert "NOT StarCraft II" in events.Tensors("backend/text_summary")[0].tensor_proto.string_val[0].decode()


def test_same_seed_same_metrics_and_another_seed_others(finished_run, tmp_path):
    sq.train(small_args(tmp_path / "same"))
    sq.train(small_args(tmp_path / "other", seed=2))
    assert read_metrics(tmp_path / "same") == read_metrics(finished_run[0])
    assert read_metrics(tmp_path / "other") != read_metrics(finished_run[0])


@pytest.mark.parametrize("num_envs", [4, 3])
def test_resume_equals_the_uninterrupted_run_to_the_last_bit(num_envs, tmp_path):
    args = dict(num_envs=num_envs, total_timesteps=1320)
    sq.train(small_args(tmp_path / "whole", **args))
    sq.train(small_args(tmp_path / "parts", **(args | {"total_timesteps": 660})))
    (tmp_path / "parts" / "checkpoints" / "100.tmp").mkdir()  # as a killed run leaves it
    sq.train(small_args(tmp_path / "parts", resume=str(tmp_path / "parts"), **args))
    assert [row for row in read_metrics(tmp_path / "parts") if row["step"] != "660"] == read_metrics(tmp_path / "whole")
    whole, parts = (parameters_of(tmp_path / name, 1320) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert sorted(p.name for p in (tmp_path / "parts" / "checkpoints").iterdir()) == ["1320", "660"]
    assert not (tmp_path / "parts" / "checkpoints" / "660" / "replay.pt").exists()


def test_resume_without_replay_refills_it_first(tmp_path):
    sq.train(small_args(tmp_path, total_timesteps=800, checkpoint_replay=False))
    before = json.loads((tmp_path / "summary.json").read_text())
    after = sq.train(small_args(tmp_path, total_timesteps=1600, resume=str(tmp_path)))
    refilled_at = -(-(before["episodes"] + 8) // 4)  # the first multiple of 4 episodes with 8 stored
    assert after["updates"] - before["updates"] == after["episodes"] // 4 - refilled_at + 1


@pytest.mark.parametrize("flags", [{"use_g": False}, {"use_g": False, "use_f": False}, {"mixer": "vdn"}, {"tau": 0.04}])
def test_variants_train(flags, tmp_path):
    assert sq.train(small_args(tmp_path, **flags))["updates"] > 0


@pytest.mark.parametrize("tau", [1.0, 0.25])
def test_target_networks_follow(tau):
    """tau < 1 moves them after every update; a copy is the training loop's, every target_update_interval episodes."""
    networks, env = make_networks(args := small_args("unused", tau=tau))
    before = copy.deepcopy(networks)
    batch, _ = make_batch(env, [4, 7], np.random.default_rng(0))
    sq.update(networks, torch.optim.Adam(networks.parameter_groups()), batch, args)
    assert not torch.equal(networks.critic.agent.fc_in.weight, before.critic.agent.fc_in.weight)
    if tau == 1.0:
        assert torch.equal(networks.target.agent.fc_in.weight, before.target.agent.fc_in.weight)
        sq.move_target(networks, tau)
    parameters = [list(part.parameters()) for part in (networks.target, networks.critic, before.target)]
    for moved, online, old in zip(*parameters, strict=True):
        torch.testing.assert_close(moved, tau * online + (1 - tau) * old, rtol=0, atol=0 if tau == 1.0 else 1e-6)


def can_compile() -> bool:
    try:
        sq.check_args(sq.Args(compile=True))
    except sq.InputError:
        return False
    return True


@pytest.mark.skipif(not can_compile(), reason="needs a C++ compiler and Python.h")
def test_compiled_networks_learn_the_same():
    """20 updates, on batches of different sizes, change the parameters alike."""
    trained = []
    for compiled in (False, True):
        torch.manual_seed(0)
        networks, env = make_networks(args := small_args("unused"))
        start = copy.deepcopy(networks.state_dict())
        if compiled:
            sq.compile_networks(networks)
            critic, target = networks.critic, networks.target
            for module in (critic.g, critic.mixer, target.g, target.mixer, networks.f):
                assert module._compiled_call_impl is not None
        optimizer, rng = torch.optim.SGD(networks.parameter_groups(), lr=1e-2), np.random.default_rng(0)
        for _ in range(20):
            batch, _ = make_batch(env, rng.integers(1, 30, 8).tolist(), rng)
            sq.update(networks, optimizer, batch, args)
        trained.append(networks.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-3, atol=1e-5)
    moved = {name: (value - start[name]).abs().max().item() for name, value in trained[0].items()}
    assert min(moved["critic.g.w1.0.weight"], moved["critic.mixer.w1.0.weight"], moved["f.w.0.weight"]) > 2e-4, moved


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["of different lengths", "of one length", "padded"])
def test_a_gpu_computes_the_losses_and_gradients_of_a_cpu(kind, monkeypatch):
    """On a batch of the usual size, with its best action as u', since the devices' random numbers differ."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(sq, "sample_action", sq.greedy_action)
    networks, env = make_networks(args := small_args("unused", map="protoss_5_vs_5", alpha=0.3))
    rng = np.random.default_rng(0)
    lengths = [60] * 128 if kind == "of one length" else rng.integers(20, 100, 128).tolist()
    results = []
    for device in (CPU, torch.device("cuda")):
        replay = sq.Replay(128, device)
        for i, n in enumerate(lengths):
            replay.add(random_episode(env, n, np.random.default_rng(i)))
        torch.manual_seed(0)  # the same order of episodes
        batch = replay.sample(128, device, pad=kind == "padded")
        networks.zero_grad()
        loss, logs = sq.compute_losses(networks.to(device), batch, args)
        loss.backward()
        gradients = {name: p.grad.cpu() for name, p in networks.named_parameters() if p.grad is not None}
        results.append(gradients | {name: value.cpu() for name, value in logs.items()})
    assert results[0].keys() > {"critic.agent.gru.weight_hh_l0", "critic.g.w1.0.weight", "f.w.0.weight", "td"}
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("device", ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_replayed_updates_and_acting_equal_the_usual_ones(device, monkeypatch):
    """20 updates on batches of two padded sizes, 20 times of acting: the same random numbers, the same results."""
    if device == "emulated":
        fake_cuda.install(monkeypatch)
    device = torch.device("cuda" if device == "cuda" else "cpu")
    results = []
    for graphs in (False, True):
        torch.manual_seed(0)
        networks, env = make_networks(args := small_args("unused"))
        networks.to(device)
        optimizer = torch.optim.Adam(networks.parameter_groups(), lr=1e-3, capturable=True)
        play, learn = (sq.CUDAGraphs(sq.act), sq.CUDAGraphs(sq.update)) if graphs else (sq.act, sq.update)
        rng = np.random.default_rng(0)
        hidden = torch.zeros(4, env.num_agents, 64, device=device)
        last_action = torch.full((4, env.num_agents), -1, device=device)
        logged, actions = [], []
        for i in range(20):
            replay = sq.Replay(8, device)
            for n in [(20, 45)[i % 2], *rng.integers(1, 20, 7)]:
                replay.add(random_episode(env, int(n), rng))
            logs = learn(networks, optimizer, replay.sample(8, device, pad=True), args)
            logged.append(torch.stack(list(logs.values())).tolist())
            view = {name: value[0] for name, value in sq.to_tensors(random_episode(env, 1, rng), device).items()}
            view = {name: torch.stack(4 * [view[name]]) for name in sq.Replay.VIEW}
            last_action, hidden = play(networks, view, last_action, hidden, 0.3)
            actions.append(last_action.tolist())
            hidden[i % 4] = 0
        results.append((logged, actions, {name: value.clone() for name, value in networks.state_dict().items()}))
    (logged, actions, trained), (logged_again, actions_again, trained_again) = results
    np.testing.assert_allclose(logged_again, logged, rtol=1e-3)
    assert actions_again == actions
    torch.testing.assert_close(trained_again, trained, rtol=1e-3, atol=1e-5)
    assert len({tuple(row) for row in logged}) == 20
    if device == CPU:  # of each size, all but the first
        assert fake_cuda.FakeCUDAGraph.replays == 2 * 9 + 19


def test_what_waits_for_the_gpu_cannot_be_recorded(monkeypatch):
    fake_cuda.install(monkeypatch)
    recorded = sq.CUDAGraphs(lambda x: x * x.sum().item())
    recorded(torch.ones(3))
    with pytest.raises(RuntimeError, match="waits for the GPU"):
        recorded(torch.ones(3))


def test_gradient_norms_are_clipped_separately():
    networks, env = make_networks(args := small_args("unused", max_grad_norm=1e-3))
    before = copy.deepcopy(networks)
    batch, _ = make_batch(env, [4, 7], np.random.default_rng(0))
    sq.update(networks, torch.optim.SGD(networks.parameter_groups(), lr=1.0), batch, args)
    for old, new in ((before.critic, networks.critic), (before.f, networks.f)):
        moved = sum((a - b).square().sum() for a, b in zip(old.parameters(), new.parameters(), strict=True)).sqrt()
        assert moved.item() == pytest.approx(1e-3, rel=1e-2)


class Poisoned:
    """An environment that shows no global state."""

    def __init__(self, env):
        self.env = env

    def __getattr__(self, name):
        return getattr(self.env, name)

    def reset(self, seed=None):
        obs, info = self.env.reset(seed=seed)
        return obs, info | {"state": np.full_like(info["state"], np.nan)}

    def step(self, action):
        *outcome, info = self.env.step(action)
        return *outcome, info | {"state": np.full_like(info["state"], np.nan)}


def test_evaluation_needs_no_state_and_counts_each_environment_alike():
    networks, env = make_networks(small_args("unused"))
    battles = [sq.evaluate(networks.critic.agent, which, 12, 7, CPU) for which in (env, Poisoned(env))]
    assert battles[0] == battles[1]
    assert battles[0]["episodes"] == 12
    assert sq.evaluate(networks.critic.agent, env, 12, 8, CPU) != battles[0]


@pytest.mark.parametrize(("episodes", "num_envs"), [(1, 1), (32, 32), (1000, 50), (97, 1), (128, 64)])
def test_evaluation_environments_divide_the_battles(episodes, num_envs):
    assert sq.make_eval_env(small_args("unused", eval_episodes=episodes)).num_envs == num_envs


def test_wilson_interval():
    assert sq.wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert sq.wilson_interval(0, 32) == pytest.approx((0.0, 0.1072), abs=1e-4)


# --- The command line ---


def run_main(monkeypatch, capsys, *options):
    """Exit code and what was printed."""
    monkeypatch.setattr(sys, "argv", ["softqmix_smacv2.py", *map(str, options)])
    try:
        code = sq.main()
    except SystemExit as exit:
        code = exit.code
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


BAD_OPTIONS = {
    "--map human_5_vs_5": "protoss",
    "--map terran": "terran",
    "--map terran_0_vs_5": "0",
    "--alpha 0": "--alpha",
    "--alpha nan": "--alpha",
    "--batch-size 64 --buffer-size 32": "--buffer-size",
    "--td-lambda 1.5": "--td-lambda",
    "--num-envs 0": "--num-envs",
    "--seed -1": "--seed",
    "--td-weight -1": "--td-weight",
    "--tau 0": "--tau",
    "--resume nowhere": "nowhere",
    "--evaluate nowhere.pt": "nowhere.pt",
    "--run-dir README.md/run": "--run-dir",
    "--num-envs many": "num-envs",
    "--learning-rate inf": "--learning-rate",
    "--resume a --evaluate b": "--resume and --evaluate",
    "--prob-obs-enemy 0": "StarCraft II",
    "--backend sim --save-replay": "StarCraft II",
    f"--run-dir {300 * 'x'}": "--run-dir",
    "--backend starcraft2": "requirements-smacv2.txt",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options_get_one_sentence_and_exit_code_2(options, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code, output = run_main(monkeypatch, capsys, *options.split(), "--total-timesteps", 8)
    assert code == 2
    assert BAD_OPTIONS[options] in output
    assert "Traceback" not in output
    if "--help" not in output:  # tyro's own message, for malformed numbers
        assert len(output.strip().splitlines()) == 1


def test_compile_without_a_compiler_gets_one_sentence(monkeypatch, capsys):
    """A policy that was trained with it can be evaluated all the same."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    code, output = run_main(monkeypatch, capsys, "--compile")
    assert code == 2
    assert "--no-compile" in output
    assert len(output.strip().splitlines()) == 1
    sq.check_args(sq.Args(compile=True, cudagraphs=True, buffer_device="cuda", evaluate="policy.pt"))


@pytest.mark.parametrize("option", [("--cudagraphs",), ("--buffer-device", "cuda")], ids=lambda option: option[0])
def test_what_needs_a_gpu_says_so_in_one_sentence(monkeypatch, capsys, option):
    code, output = run_main(monkeypatch, capsys, *option, "--no-cuda")
    assert code == 2
    assert output.startswith(f"error: {' '.join(option)} needs a GPU")
    assert len(output.strip().splitlines()) == 1


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other map", "other network", "other rules"])
def test_checkpoints_that_do_not_fit_are_refused(damage, finished_run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "checkpoints" / "1200"
    folder.mkdir(parents=True)
    content = (finished_run[0] / "checkpoints" / "1200" / "training.pt").read_bytes()
    (folder / "training.pt").write_bytes(content[:2000] if damage == "truncated" else content)
    if damage == "foreign":
        torch.save({"weights": torch.ones(3)}, folder / "training.pt")
    options = {
        "other map": ["--map", "zerg_3_vs_2"],
        "other network": ["--no-use-g"],
        "other rules": ["--enemy-wipe"],
    }.get(damage, [])
    code, output = run_main(monkeypatch, capsys, "--resume", tmp_path, "--total-timesteps", 1600, *options)
    assert (code, len(output.strip().splitlines())) == (2, 1)
    assert str(folder) in output


def test_a_new_learning_rate_of_a_resumed_run_takes_effect(finished_run, tmp_path):
    sq.train(small_args(tmp_path, resume=str(finished_run[0]), learning_rate=1e-5, total_timesteps=1240))
    groups = torch.load(tmp_path / "checkpoints" / "1240" / "training.pt")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [1e-5, 1e-5]


def test_resuming_an_older_checkpoint_needs_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    sq.train(small_args(run, total_timesteps=800, checkpoint_interval=400))
    options = ["--resume", run / "checkpoints" / "400", "--total-timesteps", 600]
    code, output = run_main(monkeypatch, capsys, *options)
    assert code == 2
    assert "not the newest" in output
    assert (run / "checkpoints" / "800" / "replay.pt").exists()
    assert run_main(monkeypatch, capsys, *options, "--run-dir", tmp_path / "branch")[0] == 0
    assert [row["step"] for row in read_metrics(tmp_path / "branch")] == ["0", "400", "600"]


def test_a_checkpoint_copied_elsewhere_starts_a_run_of_its_own(finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run[0] / "checkpoints" / "1200", tmp_path / "best")
    assert run_main(monkeypatch, capsys, "--resume", "best", "--total-timesteps", 1204)[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "runs"]
    assert len(list((tmp_path / "runs").glob("*/checkpoints/1204/training.pt"))) == 1


def test_a_run_is_never_overwritten(finished_run, monkeypatch, capsys):
    code, output = run_main(monkeypatch, capsys, "--run-dir", finished_run[0])
    assert code == 2
    assert "--resume" in output


def test_a_run_without_a_checkpoint_is_not_said_to_be_resumable(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").touch()
    code, output = run_main(monkeypatch, capsys, "--run-dir", tmp_path)
    assert code == 2
    assert "delete it" in output
    assert "--resume" not in output


def test_a_finished_run_is_resumed_with_more_steps_only(finished_run, monkeypatch, capsys):
    code, output = run_main(monkeypatch, capsys, "--resume", finished_run[0])
    assert code == 2
    assert "1200 steps: give a larger --total-timesteps" in output
    assert len(output.strip().splitlines()) == 1


@pytest.mark.parametrize("option", ["--resume", "--evaluate", "--run-dir"])
def test_an_empty_path_starts_nothing(option, monkeypatch, capsys):
    code, output = run_main(monkeypatch, capsys, option, "")
    assert code == 2
    assert "empty" in output


def test_a_game_lost_for_good_during_a_test_costs_no_steps(tmp_path, monkeypatch):
    tests, real_evaluate = [], sq.evaluate

    def evaluate(*arguments):
        tests.append(arguments[3])
        if len(tests) == 3:
            raise ConnectionError("StarCraft II failed")
        return real_evaluate(*arguments)

    monkeypatch.setattr(sq, "evaluate", evaluate)
    with pytest.raises(ConnectionError):
        sq.train(small_args(tmp_path, total_timesteps=1200, eval_interval=400))
    assert (tmp_path / "checkpoints" / "800" / "replay.pt").exists()
    sq.train(small_args(tmp_path, resume=str(tmp_path), total_timesteps=1000, eval_interval=400))
    assert [row["step"] for row in read_metrics(tmp_path)] == ["0", "400", "1000"]
    assert len(set(tests[:3])) == 3  # each test has battles of its own


def too_much_for_a_gpu():
    raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")


@pytest.mark.parametrize("allocate", [too_much_for_a_gpu, lambda: torch.empty(10**15), lambda: np.empty(10**15)])
def test_running_out_of_memory_gets_one_sentence(allocate, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sq, "update", lambda *_: allocate())
    options = ["--run-dir", tmp_path / "run", "--total-timesteps", 2000, "--batch-size", 2, "--eval-episodes", 2]
    code, output = run_main(monkeypatch, capsys, *options)
    assert code == 1
    assert "error: out of memory; lower --num-envs" in output
    assert "Traceback" not in output


def test_other_errors_of_pytorch_are_not_hidden(tmp_path, monkeypatch, capsys):
    def update(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(sq, "update", update)
    options = ["--run-dir", tmp_path / "run", "--total-timesteps", 2000, "--batch-size", 2, "--eval-episodes", 2]
    with pytest.raises(RuntimeError, match="illegal"):
        run_main(monkeypatch, capsys, *options)


def test_options_of_a_resumed_run_default_to_its_own(finished_run, tmp_path, monkeypatch, capsys):
    options = ["--resume", finished_run[0], "--run-dir", tmp_path / "more", "--total-timesteps", 1240]
    assert run_main(monkeypatch, capsys, *options)[0] == 0
    args = json.loads((tmp_path / "more" / "summary.json").read_text())["args"]
    assert (args["map"], args["batch_size"], args["total_timesteps"]) == ("terran_3_vs_2", 8, 1240)
    assert len(read_metrics(tmp_path / "more")) == 5


@pytest.mark.parametrize("what", ["policy.pt", ".", "checkpoints/1200"])
def test_evaluate_prints_the_win_rate_with_its_interval(what, finished_run, monkeypatch, capsys):
    code, output = run_main(monkeypatch, capsys, "--evaluate", finished_run[0] / what, "--eval-episodes", 8)
    assert code == 0
    assert "NOT StarCraft II" in output
    rate, low, high = map(
        float, re.search(r"win rate ([\d.]+) \(95 % interval ([\d.]+) to ([\d.]+)\)", output).groups()
    )
    assert 0 <= low <= rate <= high <= 1


def test_a_full_disk_leaves_the_checkpoint_before_it_intact(finished_run, tmp_path, monkeypatch, capsys):
    sq.train(small_args(tmp_path / "run", total_timesteps=400))
    save = torch.save

    def full(what, path):
        if path.name == "replay.pt":
            path.write_bytes(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")
        save(what, path)

    monkeypatch.setattr(torch, "save", full)
    code, output = run_main(monkeypatch, capsys, "--resume", tmp_path / "run", "--total-timesteps", 800)
    assert code == 1
    assert "No space left" in output
    assert "Traceback" not in output
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["400"]
    assert (tmp_path / "run" / "checkpoints" / "400" / "replay.pt").exists()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("softqmix_smacv2", "--map terran_3_vs_2 --eval-episodes 2 --batch-size 5000"),
        ("qmix_mpe", "--level simple --eval-episodes 2 --batch-size 5000"),
        ("softqmix_matrix", "--num-seeds 2 --eval-interval 4 --batch-size 4"),
        ("qmix_matrix", "--num-seeds 2 --eval-interval 4 --batch-size 4"),
    ],
)
def test_a_full_disk_gets_one_sentence_where_tensorboard_writes(script, options, tmp_path):
    """No file may grow beyond 8,000 bytes, which TensorBoard's is the first to do."""
    options = ["--run-dir", tmp_path / "run", *options.split()]
    run = subprocess.run(
        [sys.executable, ROOT / f"{script}.py", *options], capture_output=True, text=True, timeout=120, cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)),
    )  # fmt: skip
    assert run.returncode == 1
    assert "error: [Errno 27] File too large" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_checkpoint(tmp_path, monkeypatch, capsys):
    sq.train(small_args(tmp_path / "run", total_timesteps=400))
    monkeypatch.setattr(sq, "td_lambda_targets", lambda reward, *rest: reward + math.nan)
    code, output = run_main(monkeypatch, capsys, "--resume", tmp_path / "run", "--total-timesteps", 800)
    assert code == 1
    assert "not finite" in output
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["400"]
    assert all(value.isfinite().all() for value in parameters_of(tmp_path / "run", 400).values())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_saves_a_checkpoint(signum, tmp_path):
    options = ["--map", "terran_3_vs_2", "--run-dir", str(tmp_path / "run"), "--eval-episodes", "4", "--no-cuda"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "softqmix_smacv2.py", *options], stderr=subprocess.PIPE, cwd=ROOT, text=True
    )
    for _ in range(600):
        if (tmp_path / "run" / "metrics.csv").exists():
            break
        time.sleep(0.1)
    process.send_signal(signum)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    stopped_at = int(sq.checkpoint_folder(str(tmp_path / "run")).name)
    args = small_args(tmp_path / "run", resume=str(tmp_path / "run"), total_timesteps=stopped_at + 40)
    assert sq.train(args)["env_steps"] == stopped_at + 40


# --- And it learns ---


def random_play(map_name: str, battles: int) -> tuple[float, float]:
    """Mean return of uniformly random available actions, and the standard deviation of returns."""
    env, rng = SMACv2Sim(map_name, battles, 99), np.random.default_rng(0)
    _, info = env.reset()
    first, total, running = np.full(battles, math.nan), np.zeros(battles), np.ones(battles, bool)
    while running.any():
        action = (rng.random(info["action_mask"].shape) * info["action_mask"]).argmax(-1)
        _, reward, terminated, _, info = env.step(action)
        total += reward
        first[running & terminated] = total[running & terminated]
        running &= ~terminated
    return first.mean(), first.std()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_learns(seed, tmp_path):
    """Greedy test battles return more than random play's mean by at least 4 standard errors of the difference."""
    settings = dict(total_timesteps=6000, eval_interval=6000, eval_episodes=128, batch_size=32, buffer_size=1000)
    result = sq.train(small_args(tmp_path, seed=seed, target_update_interval=40, **settings))["eval"]
    mean, deviation = random_play("terran_3_vs_2", 512)
    standard_error = math.sqrt(result["return_std"] ** 2 / 128 + deviation**2 / 512)
    assert result["return_mean"] > mean + 4 * standard_error
