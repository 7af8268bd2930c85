"""qmix_smacv2.py where it differs from its twin: exploration, targets, and that it learns."""

import math

import numpy as np
import pytest
import torch
from test_softqmix_smacv2 import GAMMA, LAMBDA, explicit_targets, make_batch, random_play, read_metrics

import qmix_smacv2 as qm


def small_args(run_dir, **changes) -> qm.Args:
    settings = dict(map="terran_3_vs_2", total_timesteps=1200, batch_size=8, buffer_size=24, eval_interval=400)
    settings |= dict(eval_episodes=4, checkpoint_interval=10**6, target_update_interval=8, run_dir=str(run_dir))
    return qm.Args(**(settings | changes))


@pytest.mark.parametrize(("step", "epsilon"), [(0, 1.0), (25_000, 0.7625), (100_000, 0.05), (10**7, 0.05)])
def test_epsilon_falls_linearly(step, epsilon):
    assert qm.epsilon_at(step, qm.Args()) == pytest.approx(epsilon)


def test_epsilon_greedy_flips_a_coin_per_agent_over_available_actions():
    torch.manual_seed(0)
    n, N = 20_000, 3
    stage1 = torch.tensor([5.0, 1.0, 2.0, 0.0]).expand(n, N, 4)
    mask = torch.tensor([False, True, True, True]).expand(n, N, 4)  # the best available action is 2
    action = qm.epsilon_greedy(stage1, mask, 0.6)
    frequency = torch.stack([(action == a).float().mean(0) for a in range(4)])  # (A, N)
    expected = torch.tensor([0.0, 0.2, 0.4 + 0.2, 0.2])[:, None].expand(4, N)
    assert (frequency - expected).abs().max() < 4 * math.sqrt(0.25 / n)
    explored = (action != 2).float()
    correlation = torch.corrcoef(explored.T)[~torch.eye(N, dtype=torch.bool)]
    assert correlation.abs().max() < 4 / math.sqrt(n)  # the agents' coins are independent
    assert (qm.epsilon_greedy(stage1, mask, 0.0) == 2).all()


def test_losses_equal_a_loop_over_episodes_and_steps():
    torch.manual_seed(0)
    args = small_args("unused", gamma=GAMMA, td_lambda=LAMBDA)
    qm.check_args(args)
    env = qm.make_env(args, 4, 0)
    networks = qm.Networks(env, args)
    networks.target = qm.Critic(env, args)
    networks.double()
    batch, episodes = make_batch(env, [3, 17, 5, 30, 1], np.random.default_rng(1), torch.float64, cut_off=(1,))
    loss, logs = qm.compute_losses(networks, batch, args)
    squares, q_tots = [], []
    for episode in episodes:
        L = len(episode["reward"])
        obs, state = (torch.tensor(episode[name]).double() for name in ("obs", "state"))
        mask, action = (torch.tensor(episode[name]) for name in ("mask", "action"))
        values = {}
        for name in ("critic", "target"):
            hidden, last, values[name] = torch.zeros(1, env.num_agents, 64).double(), -torch.ones_like(action[:1]), []
            for t in range(L + 1):
                q, hidden = getattr(networks, name).agent.step(obs[t : t + 1], last, hidden)
                values[name].append(q[0])
                last = action[t : t + 1] if t < L else None

        def mix(network, q, t, state=state):
            return network.mixer(torch.stack(q)[None], state[t : t + 1]).item()

        agents, next_q, q_tot = range(env.num_agents), [], []
        for t in range(L):
            q_tot.append(mix(networks.critic, [values["critic"][t][i, action[t, i]] for i in agents], t))
            allowed = [mask[t + 1, i].nonzero()[:, 0].tolist() for i in agents]
            best = [max(allowed[i], key=lambda a: values["critic"][t + 1][i, a].item()) for i in agents]
            next_q.append(mix(networks.target, [values["target"][t + 1][i, best[i]] for i in agents], t + 1))
        y = explicit_targets(episode["reward"].tolist(), episode["terminated"], next_q, [0.0] * L)
        squares += [0.5 * (q - target) ** 2 for q, target in zip(q_tot, y, strict=True)]
        q_tots += q_tot
    np.testing.assert_allclose([loss.item(), logs["q_tot"].item()], [np.mean(squares), np.mean(q_tots)], rtol=1e-9)


@pytest.mark.parametrize("mixer", ["qmix", "vdn"])
def test_resume_equals_the_uninterrupted_run(mixer, tmp_path):
    args = dict(mixer=mixer, epsilon_anneal_time=1000)
    qm.train(small_args(tmp_path / "whole", **args))
    qm.train(small_args(tmp_path / "parts", total_timesteps=800, **args))
    qm.train(small_args(tmp_path / "parts", resume=str(tmp_path / "parts"), **args))
    assert read_metrics(tmp_path / "parts") == read_metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    ("field", "value"), [("epsilon_start", 1.5), ("epsilon_anneal_time", 0), ("map", "elf_1_vs_1")]
)
def test_bad_options_are_refused(field, value):
    with pytest.raises(qm.InputError, match=field.replace("_", "-")):
        qm.check_args(qm.Args(**{field: value}))


def test_it_learns(tmp_path):
    settings = dict(total_timesteps=12_000, eval_interval=12_000, eval_episodes=128, batch_size=32, buffer_size=1000)
    args = small_args(tmp_path, target_update_interval=40, epsilon_anneal_time=4000, **settings)
    result = qm.train(args)["eval"]
    mean, deviation = random_play("terran_3_vs_2", 512)
    assert result["return_mean"] > mean + 4 * math.sqrt(result["return_std"] ** 2 / 128 + deviation**2 / 512)
