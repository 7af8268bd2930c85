"""hasac_smacv2.py: the mathematics against slow and plain versions of it, the replay step by step, and learning."""

import copy
import dataclasses
import json
import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import IMPOSSIBLE, event_log, refused_before_a_file_is_made, run_main
from test_mappo_smacv2 import Agree
from test_training import LENGTHS as CLOCKWORK_LENGTHS
from test_training import Clockwork, Fragile, Infinite

import hasac_smacv2 as script
import qmix_smacv2

CPU = torch.device("cpu")
SIZES = SimpleNamespace(num_agents=3, num_actions=5, obs_size=4, state_size=6)  # all that networks know of a game
E = 3


def make_args(**changes):
    return script.Args(**(dict(num_envs=E, batch_size=64, buffer_size=600, backend="sim") | changes))


def make(args, seed=3, game=SIZES):
    """Networks whose logits differ, as untrained ones hardly do, their optimiser, and the agents' weights in it."""
    torch.manual_seed(seed)
    networks = script.Networks(game, args)
    torch.nn.init.normal_(networks.actor.weights[-2], std=0.2)
    for parameter in networks.target.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    optimizer = torch.optim.Adam(networks.parameter_groups(args), fused=True)
    return networks, optimizer, [group["params"] for group in optimizer.param_groups[:-2]]


def random_masks(shape, rng, dead=0.3) -> torch.Tensor:
    """Masks of which about a third have one action only, the first, as of the dead; the others have some."""
    mask = rng.random(shape) < 0.5
    mask[..., 1:3] = True
    mask[rng.random(shape[:-1]) < dead] = np.arange(shape[-1]) == 0
    return torch.from_numpy(mask)


def random_batch(seed=0, B=64, R=40, game=SIZES, dead=0.3) -> SimpleNamespace:
    """Any numbers; the first R steps bootstrap."""
    rng, N, A = np.random.default_rng(seed), game.num_agents, game.num_actions

    def normal(*shape):
        return torch.from_numpy(rng.normal(size=shape).astype(np.float32))

    mask = random_masks((B, N, A), rng, dead)
    return SimpleNamespace(
        obs=normal(B, N, game.obs_size), state=normal(B, game.state_size), mask=mask,
        action=(torch.from_numpy(rng.random((B, N, A))) * mask).argmax(-1), returns=normal(B),
        next_obs=normal(R, N, game.obs_size), next_state=normal(R, game.state_size),
        next_mask=random_masks((R, N, A), rng, dead), bootstraps=torch.arange(R),
        discount=0.99 ** (torch.arange(R) % 20),
    )  # fmt: skip


def clone(weights) -> list:
    return copy.deepcopy([[w.detach().clone() for w in own] for own in weights])


# --- The replay -------------------------------------------------------------------------------------------------------
LENGTHS = [1, 5, 19, 20, 21, 45]


class History:
    """Hand-made episodes, of all lengths, in E environments; every third is cut off. Each view has a number of its
    own, which all its entries show, and the final views of episodes that were cut off numbers above 10,000."""

    def __init__(self, args, lost=()):
        self.args, self.replay, self.lost = args, script.Replay(SIZES, args), lost
        self.rng = np.random.default_rng(0)
        self.steps: list[list[dict]] = [[] for _ in range(E)]  # of each environment
        self.plans = [iter([LENGTHS[(k + 2 * e) % 6] for k in range(100)]) for e in range(E)]
        self.left, self.episodes, self.number = [next(plan) for plan in self.plans], [0] * E, 0
        self.row, self.numbers = self.look()

    def look(self, numbers=None):
        if numbers is None:
            numbers = np.arange(self.number, self.number + E)
            self.number += E
        tile = numbers.astype(np.float32)
        obs = np.tile(tile[:, None, None], (1, SIZES.num_agents, SIZES.obs_size))
        mask = np.arange(5) < 1 + numbers[:, None, None] % 5
        info = {"state": np.tile(tile[:, None], (1, 6)), "action_mask": np.tile(mask, (1, 3, 1))}
        return script.make_row(obs, info), numbers

    def step(self):
        self.left = [left - 1 for left in self.left]
        done = np.array(self.left) == 0
        cut = done & (np.array(self.episodes) % 3 == 2)
        lost = done & np.array([(e, k) in self.lost for e, k in enumerate(self.episodes)])
        cut &= ~lost
        reward = self.rng.normal(size=E).astype(np.float32)
        action = torch.from_numpy(self.rng.integers(5, size=(E, 3)))
        final = self.look(self.numbers + 10_000)[0] if cut.any() else None
        for e in range(E):
            step = {"view": self.numbers[e], "reward": reward[e], "cut": cut[e], "done": done[e], "action": action[e]}
            self.steps[e].append(step | {"episode": self.episodes[e]})
        columns = {"reward": reward, "terminated": done & ~cut, "ended": done, "valid": ~lost}
        columns = {name: torch.from_numpy(column) for name, column in columns.items()}
        row, self.numbers = self.look()
        self.replay.add(self.row | columns | {"action": action}, row, cut, final)
        for e in np.flatnonzero(lost):
            self.replay.forget(e)
        self.row = row
        for e in np.flatnonzero(done):
            self.episodes[e] += 1
            self.left[e] = next(self.plans[e])

    def expected(self, e: int, t: int) -> tuple:
        """By a slow loop: view, action, R, gamma^m, and the number of the view to bootstrap from, None after an end."""
        steps, returns, discount = self.steps[e], 0.0, 1.0
        for m in range(self.args.n_step):
            step = steps[t + m]
            returns += discount * step["reward"]
            discount *= self.args.gamma
            if step["done"]:
                return steps[t], returns, discount, step["view"] + 10_000 if step["cut"] else None
            if t + m + 1 == len(steps):
                return steps[t], returns, discount, self.numbers[e]  # the live view
        return steps[t], returns, discount, steps[t + self.args.n_step]["view"]


def check_samples(history, times=40) -> set:
    """Compare batches with the slow loop; returns which steps (e, t) were drawn."""
    where = {step["view"]: (e, t) for e in range(E) for t, step in enumerate(history.steps[e])}
    drawn = set()
    for _ in range(times):
        batch = history.replay.sample(history.args, CPU)
        numbers, following = batch.state[:, 0].int().tolist(), np.full(len(batch.state), -1)  # -1: nothing to come
        following[batch.bootstraps] = batch.next_state[:, 0]
        places = [where[number] for number in numbers]  # a live view has none
        drawn |= set(places)
        expected = [history.expected(e, t) for e, t in places]
        assert batch.returns.numpy() == pytest.approx(np.array([returns for _, returns, _, _ in expected]), abs=1e-5)
        assert following.tolist() == [-1 if view is None else view for *_, view in expected]
        discounts = np.array([discount for _, _, discount, _ in expected])
        assert batch.discount.numpy() == pytest.approx(discounts[batch.bootstraps])
        assert torch.equal(batch.action, torch.stack([step["action"] for step, *_ in expected]))
        for obs, state, mask in (
            (batch.obs, batch.state, batch.mask),
            (batch.next_obs, batch.next_state, batch.next_mask),
        ):
            assert (obs == state[:, :1, None]).all()
            assert (state == state[:, :1]).all()
            assert (mask.sum(-1) == 1 + state[:, :1] % 5).all()
    return drawn


def test_targets_sum_the_right_rewards_and_bootstrap_from_the_right_view():
    """In a ring of 120 slots, after a few steps, before and after it has wrapped, once and twice; gamma^m counts the
    rewards. Every stored step is drawn, the live view never."""
    torch.manual_seed(0)
    history = History(make_args(buffer_size=3 * 119, gamma=0.9, batch_size=80))
    for until in (1, 7, 100, 119, 120, 121, 170, 300):
        while len(history.steps[0]) < until:
            history.step()
        drawn = check_samples(history, 40 if until > 50 else 8)
        oldest = max(0, until - 119)
        assert {(e, t) for e, t in drawn if t < oldest} == set()
        stored = {(e, t) for e in range(E) for t in range(oldest, until)}
        assert len(stored - drawn) < 4  # each is missing with probability e^-9
        cut = sum(step["cut"] for steps in history.steps for step in steps[oldest:])
        assert len(history.replay.final) == cut  # of overwritten steps none is kept
        assert cut > 0 or until < 100


def test_every_step_is_drawn_equally_often():
    torch.manual_seed(0)
    history = History(make_args(buffer_size=3 * 10, batch_size=3000))
    for _ in range(25):
        history.step()
    views, counts = np.unique(history.replay.sample(history.args, CPU).state[:, 0].numpy(), return_counts=True)
    assert len(views) == 30
    assert abs(counts - 100).max() < 50  # five standard deviations


def test_lost_games_are_left_out_and_only_they():
    torch.manual_seed(0)
    lost = {(0, 1), (1, 0), (2, 3)}
    history = History(make_args(buffer_size=3 * 90, batch_size=80, gamma=0.9), lost)
    for until in (60, 150):
        while len(history.steps[0]) < until:
            history.step()
        steps = [(e, t, step) for e in range(E) for t, step in enumerate(history.steps[e]) if t >= until - 90]
        gone = {(e, step["episode"]) for e, _, step in steps if step["done"]} & lost
        assert gone or until == 150
        assert check_samples(history) == {(e, t) for e, t, step in steps if (e, step["episode"]) not in gone}


def test_n_step_returns_by_hand():
    reward = torch.tensor([[1.0, 1, 1], [2, 2, 2], [4, 4, math.nan]])
    ended = torch.tensor([[False, False, False], [True, False, True], [False, False, False]])
    R, m = script.n_step_returns(reward, ended, torch.tensor([9, 9, 1]), 0.5)
    assert R.tolist() == [2.0, 3.0, 1.0]  # ended in the second step; all three; the newest step is the first
    assert m.tolist() == [2, 3, 1]


def test_the_replay_takes_the_memory_that_it_says():
    args = make_args(buffer_size=3000)
    replay = script.Replay(SIZES, args)
    row = 4 * (3 * 4 + 6) + 3 * 5 + 8 * 3 + 4 + 3  # bytes: obs and state, mask, action, reward, three flags
    assert sum(column.nbytes for column in replay.columns.values()) == row * (3000 + E)
    assert replay.get_state()["columns"]["obs"].nbytes == 4 * 12 * E  # nothing but the live view


# --- Policies ---------------------------------------------------------------------------------------------------------
def plain_actor(obs, weights):
    """LayerNorm, Linear 256, ReLU, LayerNorm, Linear 256, ReLU, LayerNorm, Linear: with PyTorch's own modules."""
    for k in range(0, 12, 4):
        scale, shift, weight, bias = weights[k : k + 4]
        linear, norm = torch.nn.Linear(*weight.shape), torch.nn.LayerNorm(len(scale))
        linear.weight.data, linear.bias.data, norm.weight.data, norm.bias.data = weight.T, bias, scale, shift
        obs = linear(norm(torch.relu(obs) if k else obs))
    return obs


def test_actors_are_as_described_and_share_nothing():
    networks, _, weights = make(make_args())
    fresh = script.Networks(SIZES, make_args()).actor.weights
    for k, gain in ((0, 2**0.5), (4, 2**0.5), (8, 0.01)):
        assert fresh[k].eq(1).all()
        assert fresh[k + 1].eq(0).all()
        assert fresh[k + 3].eq(0).all()
        for matrix in fresh[k + 2]:
            smaller = matrix if len(matrix) <= matrix.shape[1] else matrix.T
            torch.testing.assert_close(smaller @ smaller.T, gain**2 * torch.eye(len(smaller)), rtol=1e-4, atol=1e-4)
        assert not torch.equal(fresh[k + 2][0], fresh[k + 2][1])
    obs = torch.randn(7, 3, 4)
    for own in weights:
        for weight in own:
            torch.nn.init.normal_(weight)  # it is the memory of the stacked ones
    logits, hidden = networks.actor(obs, None, torch.zeros(7, 3, 0))
    assert hidden.shape == (7, 3, 0)
    for i, own in enumerate(weights):
        torch.testing.assert_close(logits[:, i], plain_actor(obs[:, i], own), rtol=1e-4, atol=1e-4)
        for other in range(3):
            changed = obs.clone()
            changed[:, i] += 1
            assert torch.equal(networks.actor(changed)[0][:, other], logits[:, other]) == (other != i)


def test_critics_are_two_plain_networks_of_the_joint_action():
    networks, _, _ = make(make_args())
    state, joint = torch.randn(7, 6), torch.rand(7, 3, 5)
    q = networks.critic(networks.critic.encode(state), joint)
    for values, layers in zip(q, networks.critic.twins, strict=True):
        x = torch.cat([state, joint.flatten(1)], 1)
        torch.testing.assert_close(values, layers[2](layers[1](layers[0](x).relu()).relu()).squeeze(1))
    assert (q[0] - q[1]).abs().min() > 0


def test_straight_through_is_one_hot_forward_and_close_to_enumeration_backward():
    torch.manual_seed(0)
    mask = random_masks((2000, 5), np.random.default_rng(0))
    logits = torch.randn(2000, 5)
    z = script.gumbel_softmax(script.masked_log_policy(logits, mask), mask)
    assert set(z.unique().tolist()) == {0.0, 1.0}
    assert z.sum(-1).eq(1).all()
    assert not z[~mask].any()
    cosines = []
    for _ in range(20):  # linear q: the gradient of E q is pi (q - E q)
        q, theta = torch.randn(6), torch.randn(6, requires_grad=True)
        everything = torch.ones(4000, 6, dtype=torch.bool)
        z = script.gumbel_softmax(script.masked_log_policy(theta.expand(4000, 6), everything), everything)
        (ours,) = torch.autograd.grad((z @ q).mean(), theta)
        pi = theta.softmax(0)
        exact = pi * (q - (pi * q).sum())
        cosines.append(F.cosine_similarity(ours, exact, dim=0).item())
    assert min(cosines) > 0.9
    assert np.mean(cosines) > 0.97


def test_frequencies_are_those_of_the_policy():
    torch.manual_seed(0)
    mask = torch.tensor([True, True, False, True]).expand(20_000, 4)
    log_policy = script.masked_log_policy(torch.tensor([0.0, 1, 9, 2]).expand(20_000, 4), mask)
    torch.testing.assert_close(script.gumbel_softmax(log_policy, mask).mean(0), log_policy[0].exp(), rtol=0, atol=0.02)


@pytest.mark.parametrize("uniform", [True, False])
def test_acting_is_uniform_at_first_and_never_unavailable(uniform):
    networks, _, _ = make(make_args())
    with torch.no_grad():
        networks.actor.weights[-1][:] = torch.tensor([0.0, 0, 0, 30, 60])
    mask = torch.tensor([True, True, True, True, False]).expand(3000, 3, 5)
    row = {"obs": torch.randn(3000, 3, 4), "mask": mask}
    action = script.act(networks, row, uniform)
    shares = torch.stack([(action == a).float().mean(0) for a in range(5)])
    expected = [0.25] * 4 + [0.0] if uniform else [0.0, 0, 0, 1, 0]
    torch.testing.assert_close(shares, torch.tensor(expected).unsqueeze(1).expand(5, 3), rtol=0, atol=0.04)
    if uniform:  # agents and environments draw independently
        for one, other in ((action[:, 0], action[:, 1]), (action[:, 1], action[:, 2]), (action[1:], action[:-1])):
            assert (one == other).float().mean().item() == pytest.approx(0.25, abs=0.04)


# --- Targets ----------------------------------------------------------------------------------------------------------
def test_targets_by_hand(monkeypatch):
    """The smaller of both target critics less alpha_c times the joint log-probability; R alone where nothing is left.
    With the most probable actions in the place of samples."""
    args = make_args()
    networks, _, weights = make(args)
    networks.log_alpha.data[:] = torch.tensor([9.0, 9, 9, math.log(0.3)])  # the agents' temperatures have no part
    batch = random_batch()
    monkeypatch.setattr(script, "gumbel_softmax", lambda log_policy, mask: F.one_hot(log_policy.argmax(-1), 5).float())
    y = script.compute_targets(networks, weights, batch)
    assert not y.requires_grad
    torch.testing.assert_close(y[40:], batch.returns[40:], rtol=0, atol=0)
    for b in range(40):
        actions, log_prob = [], 0.0
        for i in range(3):
            logits = networks.actor(batch.next_obs[b : b + 1])[0][0, i]
            available = batch.next_mask[b, i].nonzero().flatten()
            log_pi = logits[available].log_softmax(0)
            actions.append(available[log_pi.argmax()])
            log_prob += log_pi.max()
        x = torch.cat([batch.next_state[b], F.one_hot(torch.stack(actions), 5).flatten().float()])
        q = [net[2](net[1](net[0](x).relu()).relu()).item() for net in networks.target.twins]
        expected = batch.returns[b] + batch.discount[b] * (min(q) - 0.3 * log_prob)
        torch.testing.assert_close(y[b], expected.detach(), rtol=1e-4, atol=1e-4)


def test_the_critics_step_by_hand():
    """One step of Adam on the sum of both mean squared errors, then the targets move by tau."""
    args = make_args(tau=0.25, critic_learning_rate=1e-2)
    networks, optimizer, weights = make(args)
    batch = random_batch()
    critic, before = copy.deepcopy(networks.critic), copy.deepcopy(networks.target)
    torch.manual_seed(5)
    y = script.compute_targets(networks, weights, batch)
    adam = torch.optim.Adam(critic.parameters(), lr=1e-2)
    x = torch.cat([batch.state, F.one_hot(batch.action, 5).flatten(1)], 1)
    q = [net[2](net[1](net[0](x).relu()).relu()).squeeze(1) for net in critic.twins]
    loss = (q[0] - y).square().mean() + (q[1] - y).square().mean()
    loss.backward()
    adam.step()
    torch.manual_seed(5)
    logs = script.update(networks, optimizer, batch, args)
    assert logs["td"].item() == pytest.approx(loss.item(), rel=1e-4)
    assert logs["q"].item() == pytest.approx(torch.stack(q).mean().item(), rel=1e-4)
    torch.testing.assert_close(networks.critic.state_dict(), critic.state_dict(), rtol=1e-3, atol=1e-4)
    for name, value in networks.target.state_dict().items():
        expected = 0.75 * before.state_dict()[name] + 0.25 * networks.critic.state_dict()[name]
        torch.testing.assert_close(value, expected)


# --- The sequential update --------------------------------------------------------------------------------------------
TWO = SimpleNamespace(num_agents=2, num_actions=3, obs_size=2, state_size=3)


def explicit(networks, weights, batch, args, order, gumbels) -> tuple[list, dict]:
    """The sequential update step by step, on copies of the weights: the agents' new ones, and each agent's loss.
    gumbels: the noise in the order in which it is drawn, each for the rows in which the agent has a choice."""
    noise, copies = iter(gumbels), [[w.detach().clone().requires_grad_() for w in own] for own in weights]
    adams = [torch.optim.Adam(own, lr=args.learning_rate) for own in copies]
    alpha = networks.log_alpha.detach().exp()
    rows = [(batch.mask[:, i].sum(-1) > 1).nonzero().flatten() for i in range(2)]
    u, losses = batch.mask.float(), {}

    def log_pi(i):
        logits = script.Agent.logits(batch.obs[rows[i], i], copies[i])
        return torch.where(batch.mask[rows[i], i], logits, -torch.inf).log_softmax(-1)

    def draw(i):
        with torch.no_grad():
            u[rows[i], i] = F.one_hot((log_pi(i) + next(noise)).argmax(-1), 3).float()

    draw(0)
    draw(1)
    for i in order:
        own, perturbed = log_pi(i), log_pi(i) + next(noise)
        soft = perturbed.softmax(-1)
        z = F.one_hot(perturbed.argmax(-1), 3) + soft - soft.detach()
        joint = u[rows[i]].clone()
        joint[:, i] = z
        x = torch.cat([batch.state[rows[i]], joint.flatten(1)], 1)
        q = torch.minimum(*(net[2](net[1](net[0](x).relu()).relu()).squeeze(1) for net in networks.critic.twins))
        entropy = -(z * own.masked_fill(own == -torch.inf, 0)).sum(-1)
        loss = -(q + alpha[i] * entropy).sum() / len(rows[i])
        for weight, gradient in zip(copies[i], torch.autograd.grad(loss, copies[i]), strict=True):
            weight.grad = gradient
        adams[i].step()
        draw(i)
        losses[i] = loss.item()
    return copies, losses


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_agents_learn_one_after_another_against_new_actions(order, monkeypatch):
    """In both orders equal to explicit steps. Large steps, so that the second agent sees other actions of the first
    than before: with the old ones it would end elsewhere."""
    args = make_args(learning_rate=0.05)
    networks, optimizer, weights = make(args, game=TWO)
    networks.log_alpha.data[:] = torch.tensor([math.log(0.2), math.log(0.4), 5.0])
    for net in networks.critic.twins:
        net[0].weight.data *= 3
    batch = random_batch(game=TWO)
    torch.manual_seed(1)
    counts = batch.mask.sum(-1).gt(1).sum(0).tolist()
    shapes = [(counts[i], 3) for i in (0, 1, order[0], order[0], order[1], order[1])]
    gumbels = [-torch.empty(shape).exponential_().log() for shape in shapes]
    expected, losses = explicit(networks, weights, batch, args, order, gumbels)
    alone, _ = explicit(
        networks, weights, batch, args, order[1:], [*gumbels[:2], *gumbels[4:]]
    )  # old actions of the first
    critic = copy.deepcopy(networks.critic)
    drawn = []

    def exponential(self):
        drawn.append(self.copy_(torch.exp(-gumbels[len(drawn)])))
        return self

    monkeypatch.setattr(torch.Tensor, "exponential_", exponential)
    monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor(order))
    _, logged = script.update_policies(networks, optimizer, weights, batch, args)
    assert len(drawn) == 6
    assert logged.tolist() == pytest.approx([losses[0], losses[1]], rel=1e-4)
    for ours, theirs in zip(weights, expected, strict=True):
        torch.testing.assert_close([w.detach() for w in ours], [w.detach() for w in theirs], rtol=1e-3, atol=1e-4)
    difference = [(w - v).abs().max().item() for w, v in zip(weights[order[1]], alone[order[1]], strict=True)]
    assert max(difference) > 1e-2
    torch.testing.assert_close(networks.critic.state_dict(), critic.state_dict(), rtol=0, atol=0)


def test_without_sequence_agents_see_the_old_actions(monkeypatch):
    """--no-sequential: the result does not depend on the order."""
    results = []
    for order in ((0, 1), (1, 0)):
        args = make_args(learning_rate=0.05, sequential=False)
        networks, optimizer, weights = make(args, game=TWO)
        monkeypatch.setattr(torch, "randperm", lambda n, order=order: torch.tensor(order))
        monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.fill_(1))
        script.update_policies(networks, optimizer, weights, random_batch(game=TWO), args)
        results.append(clone(weights))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_the_order_is_random(monkeypatch):
    args = make_args()
    networks, optimizer, weights = make(args)
    orders = set()
    backward = torch.Tensor.backward

    def listen(loss, inputs):
        moved.append(next(i for i, own in enumerate(weights) if own is inputs))
        backward(loss, inputs=inputs)

    monkeypatch.setattr(torch.Tensor, "backward", listen)
    for _ in range(12):
        moved = []
        script.update_policies(networks, optimizer, weights, random_batch(B=8), args)
        orders.add(tuple(moved))
    assert len(orders) > 3
    assert {tuple(sorted(order)) for order in orders} == {(0, 1, 2)}


def test_an_agents_step_moves_nobody_else(monkeypatch):
    """Neither in its first step nor later, when Adam's moments of the others are not zero; and no gradient is left."""
    args = make_args()
    networks, optimizer, _ = make(args)
    step, batch = optimizer.step, random_batch()
    for _ in range(2):
        script.update(networks, optimizer, batch, args)
    before, moved = [], []

    def listen():
        before[:] = [[w.detach().clone() for w in group["params"]] for group in optimizer.param_groups]
        step()
        now = [group["params"] for group in optimizer.param_groups]
        changed = [
            any(not torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in zip(before, now, strict=True)
        ]
        moved.append(tuple(np.flatnonzero(changed)))

    monkeypatch.setattr(optimizer, "step", listen)
    script.update(networks, optimizer, batch, args)
    assert moved[0] == (3,)  # the critics, then the agents, then the temperatures
    assert sorted(moved[1:4]) == [(0,), (1,), (2,)]
    assert moved[4] == (4,)
    assert len(moved) == 5
    assert all(parameter.grad is None for group in optimizer.param_groups for parameter in group["params"])
    assert networks.actor.weights[0].grad is None


def test_unavailable_actions_change_nothing(monkeypatch):
    """Whatever the networks say of them, NaN included; none is ever in u, u' or z."""
    args, results, joints = make_args(), [], []
    forward = script.Critic.forward

    def listen(self, encoded, joint):
        joints.append(joint.detach())
        return forward(self, encoded, joint)

    monkeypatch.setattr(script.Critic, "forward", listen)
    logits = script.Agent.logits
    for nonsense in (0.0, 1e6, math.nan):
        networks, optimizer, _ = make(args)
        batch = random_batch()
        batch.mask[..., 4] = batch.next_mask[..., 4] = False
        batch.action %= 4
        poison = torch.tensor([0, 0, 0, 0, nonsense])
        monkeypatch.setattr(
            script.Agent, "logits", staticmethod(lambda obs, weights, p=poison: logits(obs, weights) + p)
        )
        torch.manual_seed(2)
        logs = script.update(networks, optimizer, batch, args)
        results.append((logs, networks.state_dict()))
        assert len(joints) == 5  # of the target, the batch and three agents' steps
        assert all(not joint[..., 4].any() for joint in joints)
        assert not (joints[0].bool() & ~batch.next_mask).any()
        assert {len(joint) for joint in joints[2:]} == set(batch.mask.sum(-1).gt(1).sum(0).tolist())
        joints.clear()
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=0)


def test_the_dead_change_nothing():
    """Their observations reach no network, and an agent that is always dead keeps its weights and its temperature."""
    args, results = make_args(), []
    for nonsense in (0.0, math.nan):
        networks, optimizer, weights = make(args)
        before, batch = clone(weights), random_batch()
        batch.mask[:, 1] = torch.arange(5) == 0
        for mask, obs in ((batch.mask, batch.obs), (batch.next_mask, batch.next_obs)):
            obs[mask.sum(-1) == 1] += nonsense
        torch.manual_seed(2)
        script.update(networks, optimizer, batch, args)
        results.append(networks.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(weights[1], before[1], strict=True))
        assert not torch.equal(weights[0][2], before[0][2])
        assert networks.log_alpha[1] == 0
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_batch_of_lost_games_only_changes_nothing():
    args = make_args()
    networks, optimizer, _ = make(args)
    before = copy.deepcopy(networks.state_dict())
    assert script.update(networks, optimizer, random_batch(B=0, R=0), args) == {}
    torch.testing.assert_close(networks.state_dict(), before, rtol=0, atol=0)


# --- Temperatures -----------------------------------------------------------------------------------------------------
def test_with_the_released_target_temperatures_fall_by_a_fixed_factor():
    """alpha = exp(-3e-4 n) as long as the entropy stays about what it is, the critics' included."""
    args = make_args(learning_rate=1e-9, critic_learning_rate=1e-9)
    networks, optimizer, _ = make(args)
    networks.actor.weights[-2].data[:] = 0  # a uniform policy: log pi is what the mask makes it
    for n in range(1, 11):
        script.update(networks, optimizer, random_batch(B=16, R=0), args)
        if n in (1, 10):
            np.testing.assert_allclose(networks.log_alpha.detach(), -3e-4 * n, rtol=1e-4)


def test_entropy_targets_are_shares_of_what_is_possible(monkeypatch):
    """A uniform policy has log(available) nats: above the target c log(available) alpha falls, at c = 1 it stays, and
    that holds for agents with few actions and for dead ones. A deterministic policy makes it rise."""
    for c, scale, sign in ((0.9, 0.0, -1), (1.0, 0.0, 0), (0.9, 1e4, 1)):
        args = make_args(target_entropy=c, learning_rate=1e-9)
        networks, optimizer, _ = make(args)
        networks.actor.weights[-2].data *= scale
        batch = random_batch()
        batch.mask[:, 2, 3:] = False
        script.update(networks, optimizer, batch, args)
        change = networks.log_alpha.detach().numpy()
        if sign:
            np.testing.assert_allclose(change, 3e-4 * sign, rtol=1e-3)
        else:
            assert abs(optimizer.state[networks.log_alpha]["exp_avg"]).max() < 1e-6


def test_temperatures_by_hand():
    """Gradient of log alpha_i: minus the mean of log pi_i + c log(available) over i's steps with a choice; of the
    critics': minus the mean over all steps of the sum over agents."""
    args = make_args(target_entropy=0.5, learning_rate=1e-9)
    networks, optimizer, weights = make(args)
    batch = random_batch()
    torch.manual_seed(9)
    log_prob, _ = script.update_policies(networks, optimizer, weights, batch, args)
    networks, optimizer, weights = make(args)
    torch.manual_seed(9)
    heard, update_policies = [], script.update_policies
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "update_policies", lambda *a: heard.append(update_policies(*a)) or heard[0])
        patch.setattr(script, "compute_targets", lambda *_: batch.returns)
        logs = script.update(networks, optimizer, batch, args)
    gradients = optimizer.state[networks.log_alpha]["exp_avg"] / 0.1
    total = torch.zeros(len(batch.returns))
    for i in range(3):
        choice = batch.mask[:, i].sum(-1) > 1
        assert log_prob[~choice, i].eq(0).all()
        shortfall = log_prob[:, i] + 0.5 * batch.mask[:, i].sum(-1).log()
        total += shortfall
        torch.testing.assert_close(gradients[i], -shortfall[choice].mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[3], -total.mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logs["entropy"], -log_prob.sum() / (batch.mask.sum(-1) > 1).sum())
    torch.testing.assert_close(logs["policy"], heard[0][1].mean())  # after the critics' step


def test_fixed_temperatures_stay():
    args = make_args(auto_alpha=False, alpha=0.05)
    networks, optimizer, _ = make(args)
    script.update(networks, optimizer, random_batch(), args)
    torch.testing.assert_close(networks.log_alpha.detach().exp(), torch.full((4,), 0.05))


def test_acting_and_critics_stay_on_their_device():
    """Acting and the critics on the meta device, which as a GPU does refuses to compute with a CPU's tensors; but it
    cannot tell which rows have a choice, so that updates are left to the tests marked gpu."""
    args, device = make_args(), torch.device("meta")
    networks, _, _ = make(args)
    networks.to(device)
    batch = SimpleNamespace(**{name: column.to(device) for name, column in vars(random_batch()).items()})
    action = script.act(networks, {"obs": batch.obs, "mask": batch.mask}, False)
    q = networks.critic(networks.critic.encode(batch.state), F.one_hot(batch.action, 5).float())
    assert {x.device for x in (action, q)} == {device}


# --- Runs -------------------------------------------------------------------------------------------------------------
def cheap_update(networks, *_) -> dict:
    """In the place of update where what it learns does not matter."""
    networks.log_alpha.data -= 3e-4
    return {name: networks.log_alpha[0].detach() + n for n, name in enumerate(("td", "q", "policy", "entropy"))}


def train(folder, env=Clockwork, listen=None, update=cheap_update, resume=False, **changes) -> dict:
    """In the clockwork; `listen` gets name, arguments and result of every act and update."""

    def heard(name, function):
        def wrapper(*arguments):
            result = function(*arguments)
            if listen:
                listen(name, arguments, result)
            return result

        return wrapper

    options = {"resume" if resume else "run_dir": str(folder)}
    options |= dict(total_timesteps=E * 60, eval_interval=100, eval_episodes=E, learning_starts=E * 20, batch_size=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "make_env", lambda *_: env())
        patch.setattr(script, "act", heard("act", script.act))
        patch.setattr(script, "update", heard("update", update))
        return script.train(make_args(**(options | changes)))


@pytest.mark.parametrize(("rate", "starts", "first"), [(1.0, 60, 20), (1.0, 61, 21), (0.25, 60, 20), (2.5, 0, 1)])
def test_random_steps_then_updates_at_their_rate(rate, starts, first, tmp_path):
    """Uniform play before step `learning_starts`; the first update after the step that reaches it."""
    uniform, updates, batches = [], [], []

    def listen(name, arguments, _):
        if name == "act":
            uniform.append(arguments[2])
        else:
            updates.append(len(uniform))
            batches.append(arguments[2].obs)

    summary = train(tmp_path, Clockwork, listen, learning_starts=starts, updates_per_step=rate, total_timesteps=E * 30)
    assert uniform == [E * t < starts for t in range(30)]
    expected = [t for t in range(first, 31) for _ in range(int(t * rate) - int((t - 1) * rate))]
    assert updates == expected
    assert summary["updates"] == len(expected)
    assert len({id(batch) for batch in batches}) == len(batches)  # one each


@pytest.mark.parametrize("env", [Clockwork, Fragile])
def test_the_replay_holds_what_was_played(env, tmp_path):
    """In a ring that has wrapped: views, actions, rewards, ends, and the final views of what was cut off."""
    actions = []
    train(tmp_path, env, lambda name, _, result: actions.append(result) if name == "act" else None, buffer_size=E * 40)
    saved = everything(tmp_path)["replay"]
    assert (saved["now"], saved["size"]) == (60 % 41, 40)
    columns = {name: column.unflatten(0, (41, E)) for name, column in saved["columns"].items()}
    for t in range(20, 60):
        row = {name: column[t % 41] for name, column in columns.items()}
        begins, ends = t % CLOCKWORK_LENGTHS == 0, (t + 1) % CLOCKWORK_LENGTHS == 0
        assert row["state"][:, 0].tolist() == (t + begins / 2).tolist()
        assert row["obs"][:, 1, 0].tolist() == (t + begins / 2).tolist()
        assert torch.equal(row["action"], actions[t])
        assert row["reward"].tolist() == actions[t].sum(1).tolist()
        assert row["ended"].tolist() == ends.tolist()
        assert row["terminated"].tolist() == (ends & (np.arange(E) < E - 1)).tolist()
        lost = (t // 3 % 5 == 4) & (np.arange(E) == 1) & (env is Fragile)
        assert row["valid"].tolist() == (~lost).tolist()
    assert columns["state"][60 % 41, :, 0].tolist() == [60.5] * E  # the live view: all three begin here
    cut = [t for t in range(20, 60) if (t + 1) % CLOCKWORK_LENGTHS[-1] == 0]
    assert {row: view["state"].item() for row, view in saved["final"].items()} == {
        t % 41 * E + E - 1: t + 1 for t in cut
    }  # a half less than the next episode's first view


def everything(run_dir) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def test_a_resumed_run_goes_on_to_the_last_bit(tmp_path):
    """During random play, in the middle of learning, with a ring that has wrapped: replay, moments, temperatures."""
    options = dict(buffer_size=E * 30, updates_per_step=0.75, update=script.update)
    train(tmp_path / "whole", Fragile, **options)
    for steps in (30, 90, 150, E * 60):
        train(tmp_path / "parts", Fragile, total_timesteps=steps, resume=steps > 30, **options)
    ours, theirs = everything(tmp_path / "parts"), everything(tmp_path / "whole")
    assert ours["loop"][:3] == theirs["loop"][:3] == [180, 60 // 2 + 60 // 3 - 60 // 15 + 60 // 4, 45 - 14]
    for name in ("networks", "optimizer", "replay", "env", "rng"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)
    torch.testing.assert_close(ours["loop"][5:], theirs["loop"][5:], rtol=0, atol=0)
    moments = ours["optimizer"]["state"]
    assert {int(state["step"]) for state in moments.values()} == {31}
    assert len(moments) == 12 * 2 + 12 + 1
    rates = [group["lr"] for group in ours["optimizer"]["param_groups"]]
    assert rates == [3e-4, 3e-4, 5e-4, 3e-4]


def test_a_resumed_run_on_the_simulator_goes_on_to_the_last_bit(tmp_path):
    options = dict(map="terran_3_vs_2", num_envs=4, batch_size=16, buffer_size=200, learning_starts=240, backend="sim")
    options |= dict(eval_episodes=1, eval_interval=10**6, cuda=False)
    script.train(script.Args(**options, run_dir=str(tmp_path / "whole"), total_timesteps=288))
    script.train(script.Args(**options, run_dir=str(tmp_path / "parts"), total_timesteps=264))
    script.train(script.Args(**options, resume=str(tmp_path / "parts"), total_timesteps=288))
    ours, theirs = everything(tmp_path / "parts"), everything(tmp_path / "whole")
    for name in ("networks", "optimizer", "replay", "env", "rng"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


def test_the_policy_acts_as_the_actors_that_were_trained(tmp_path, capsys):
    summary = train(tmp_path, update=script.update, updates_per_step=0.25)
    policy, saved = (torch.load(tmp_path / f"{kind}.pt", weights_only=True) for kind in ("policy", "checkpoint"))
    agent = script.Agent(*(policy[name] for name in script.SIZES))
    agent.load_state_dict(policy["agent"])
    for name, value in agent.state_dict().items():
        assert torch.equal(value, saved["networks"][f"actor.{name}"])
        assert len(value) == 2  # of both agents
    assert agent.hidden_size == 0
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "make_env", lambda *_: Clockwork())
        script.evaluate_policy(make_args(evaluate=str(tmp_path), eval_episodes=E))
    assert "win rate 1.000" in capsys.readouterr().out


def test_tensorboard_gets_returns_losses_and_temperatures(tmp_path, capsys):
    """Every hundredth update's losses, of all tests the temperatures, and the memory at the start."""
    logs = []
    rates = dict(updates_per_step=2.5, alpha=0.5)
    train(tmp_path, Fragile, lambda name, _, result: logs.append(result) if name == "update" else None, **rates)
    log = event_log(tmp_path)
    tags = {tag.removeprefix("losses/") for tag in log.Tags()["scalars"] if tag.startswith("losses/")}
    assert tags == {"td", "q", "policy", "entropy"}
    for name in tags:
        values = [scalar.value for scalar in log.Scalars(f"losses/{name}")]
        assert values == pytest.approx([logs[99][name].item()], rel=1e-5)
    returns = [scalar.value for scalar in log.Scalars("charts/episodic_return")]
    assert len(returns) == 60 // 2 + 60 // 3 - 60 // 15 + 60 // 4
    assert max(returns) <= 4 * 2 * 2  # of one episode, not of all before it
    for name in ("alpha", "alpha_critic"):
        values = [scalar.value for scalar in log.Scalars(f"charts/{name}")]
        assert values[0] == pytest.approx(0.5)
        assert sorted(values, reverse=True) == values
    assert values[-1] == pytest.approx(0.5 * math.exp(-3e-4 * 103), rel=1e-3)
    size = (600 + E) * (4 * 2 + 4 + 2 * 3 + 8 * 2 + 4 + 3) / 1e9
    assert f"A full replay takes {size:.2g} GB" in capsys.readouterr().out


def test_the_command_line_stops_goes_on_and_tests(tmp_path, monkeypatch, capsys):
    """Ctrl-C saves a checkpoint of the step that it came at, and says how to go on from there."""
    monkeypatch.setattr(script, "make_env", lambda *_: Clockwork())
    acts, act = [], script.act

    def listen(*arguments):
        acts.append(arguments)
        if len(acts) == 25:
            signal.raise_signal(signal.SIGINT)
        return act(*arguments)

    monkeypatch.setattr(script, "act", listen)
    options = "--num-envs 3 --batch-size 8 --buffer-size 90 --learning-starts 66 --total-timesteps 90 --eval-episodes 3"
    code, output = run_main(script, capsys, "--run-dir", tmp_path, *options.split())
    assert code == 130
    assert f"--resume {tmp_path}" in output
    assert everything(tmp_path)["loop"][:3] == [75, 25 // 2 + 25 // 3 + 25 // 4, 4]
    assert run_main(script, capsys, "--resume", tmp_path)[0] == 0
    assert len(acts) == 30
    code, output = run_main(script, capsys, "--evaluate", tmp_path)
    assert (code, "95 % interval" in output) == (0, True)
    monkeypatch.setattr(script, "update", lambda *_: torch.empty(10**15))
    code, output = run_main(script, capsys, "--resume", tmp_path, "--total-timesteps", 93)
    assert code == 1
    assert "out of memory; lower --buffer-size, --batch-size or --num-envs" in output


def test_untrained_runs_say_so(tmp_path, capsys):
    train(tmp_path, total_timesteps=57)
    assert (
        "Nothing was learnt: 57 steps are too few for --learning-starts and --updates-per-step"
        in capsys.readouterr().out
    )


def test_a_lost_game_ends_the_run_with_a_checkpoint_that_goes_on(tmp_path):
    class Breaks(Clockwork):
        def step(self, action):
            if self.clock[0] == 30:
                raise ConnectionError("gone")
            return super().step(action)

    with pytest.raises(ConnectionError, match="gone"):
        train(tmp_path, Breaks)
    assert everything(tmp_path)["step"] == 30 * E
    assert train(tmp_path, resume=True)["env_steps"] == 60 * E


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(buffer_size=999), "--buffer-size 999 is smaller than --batch-size or --num-envs"),
        (dict(buffer_size=7, batch_size=7), "--buffer-size 7 is smaller"),
        (dict(num_envs=0), "--num-envs is 0"),
        (dict(tau=1.5), "--tau is 1.5"),
        (dict(alpha=0.0), "--alpha is 0"),
        (dict(gamma=math.nan), "--gamma is nan"),
        (dict(target_entropy=1.1), "--target-entropy is 1.1"),
        (dict(learning_starts=-1), "--learning-starts is -1"),
        (dict(updates_per_step=0.0), "--updates-per-step is 0"),
        (dict(n_step=0), "--n-step is 0"),
        *IMPOSSIBLE,
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(changes, words, tmp_path, monkeypatch):
    refused_before_a_file_is_made(script, changes, words, tmp_path, monkeypatch)


def test_other_files_and_other_options_are_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(script.InputError, match=r"target_entropy is 0\.5, but was 0\.0"):
        train(tmp_path, resume=True, total_timesteps=1000, target_entropy=0.5)
    with pytest.raises(script.InputError, match="has made its 180 steps"):
        train(tmp_path, resume=True)
    with pytest.raises(script.InputError, match="already holds a run"):
        train(tmp_path)
    with pytest.raises(qmix_smacv2.InputError, match="hasac_smacv2 checkpoint"):
        qmix_smacv2.load(str(tmp_path), "checkpoint")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="not finite at step 60"):
        train(tmp_path, Infinite, update=script.update)


def test_options_and_defaults():
    """Table 7 of the Soft-QMIX paper."""
    options = {field.name: field.default for field in dataclasses.fields(script.Args)}
    expected = dict(num_envs=8, learning_starts=10_000, updates_per_step=1, batch_size=1000, buffer_size=1_000_000)
    expected |= dict(learning_rate=3e-4, critic_learning_rate=5e-4, alpha_learning_rate=3e-4, gamma=0.99, n_step=20)
    expected |= dict(tau=0.005, auto_alpha=True, alpha=1.0, target_entropy=0, sequential=True)
    assert {name: options[name] for name in expected} == expected
    shared = {field.name: (field.type, field.default) for field in dataclasses.fields(qmix_smacv2.Args)}
    other = ("exp_name", "num_envs", "learning_rate", "batch_size", "buffer_size", "tau")
    for field in dataclasses.fields(script.Args):
        if field.name in shared and field.name not in other:
            assert (field.type, field.default) == shared[field.name]


# --- Learning ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_agents_learn_to_agree(seed, tmp_path, monkeypatch):
    """Measured with six seeds, after 25 updates (600 steps) and whenever tested later: right in every test episode."""
    monkeypatch.setattr(script, "make_env", lambda args, num_envs, seed: Agree(num_envs, seed))
    options = dict(seed=seed, total_timesteps=640, learning_starts=400, batch_size=128, n_step=2, gamma=0.9, tau=0.05)
    options |= dict(learning_rate=1e-3, critic_learning_rate=3e-3, auto_alpha=False, alpha=0.05, backend="sim")
    options |= dict(eval_interval=10**6, eval_episodes=128, run_dir=str(tmp_path))
    assert script.train(script.Args(**options))["win_rate"] > 0.95
