"""mappo_smacv2.py: the mathematics against slow and plain versions of it, which step is learnt when, and learning."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import test_training
import torch
import torch.nn.functional as F
from common import IMPOSSIBLE, event_log, read_metrics, refused_before_a_file_is_made

import mappo_smacv2 as script
import qmix_smacv2

CPU = torch.device("cpu")
SIZES = SimpleNamespace(num_agents=3, num_actions=5, obs_size=4, state_size=6)  # all that networks know of a game
E, T, C = 4, 12, 4


def make_args(**changes):
    return script.Args(**(dict(num_envs=E, num_steps=T, chunk_length=C, backend="sim") | changes))


def random_row(rng, first, game=SIZES) -> dict[str, torch.Tensor]:
    """A view with any numbers; about a third of the agents have one action, the first, and are as good as dead."""
    shape = (len(first), game.num_agents)
    mask = rng.random((*shape, game.num_actions)) < 0.5
    mask[..., 1] = True
    mask[..., 2] = True
    mask[rng.random(shape) < 0.3] = np.arange(game.num_actions) == 0
    obs = rng.normal(size=(*shape, game.obs_size)).astype(np.float32)
    info = {"state": rng.normal(size=(len(first), game.state_size)).astype(np.float32), "action_mask": mask}
    return script.make_row(obs, info, first, CPU)


def play(networks, args, seed=0, ends=0.2, lost=()) -> tuple[list[dict], dict, torch.Tensor]:
    """A rollout of episodes of random length, some cut off, as train() collects it: rows, the view after them, hidden
    states. lost: pairs (t, e) of games that fail."""
    torch.manual_seed(seed)
    rng, rollout = np.random.default_rng(seed), []
    row = random_row(rng, np.ones(E, bool))
    hidden = torch.zeros(2, E, SIZES.num_agents, 64)
    for t in range(args.num_steps):
        decision, after = script.act(networks, row, hidden)
        done = rng.random(E) < ends
        invalid = np.array([(t, e) in lost for e in range(E)])
        truncated = done & (rng.random(E) < 0.4) & ~invalid
        outcome = {"reward": rng.normal(size=E).astype(np.float32), "terminated": done & ~truncated & ~invalid}
        outcome |= {"truncated": truncated, "done": done | invalid, "valid": ~invalid}
        outcome = {name: torch.from_numpy(column) for name, column in outcome.items()}
        final = script.value_of(networks, random_row(rng, np.zeros(E, bool)), after)
        rollout.append(row | decision | outcome | {"final_value": final})
        for e in np.flatnonzero(invalid):
            script.forget(rollout, e)
        row, hidden = random_row(rng, done | invalid), after
    return rollout, row, hidden


def lively(networks, seed=0):
    """With logits and values that differ, as untrained ones hardly do, and normalised returns."""
    torch.manual_seed(seed)
    torch.nn.init.normal_(networks.actor.fc_out.weight, std=0.3)
    networks.value_norm.update(torch.randn(50) * 3 + 1)
    return networks


def make_batch(networks, args, **settings):
    rollout, row, hidden = play(networks, args, **settings)
    return script.make_batch(networks, rollout, script.value_of(networks, row, hidden), args)


def gradients(networks, loss) -> list[torch.Tensor]:
    parameters = list(networks.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@pytest.fixture
def networks():
    torch.manual_seed(3)
    return lively(script.Networks(SIZES, make_args()))


# --- Mathematics ------------------------------------------------------------------------------------------------------
def test_gae_is_the_sum_of_its_definition():
    """A_t = sum_k (gamma lambda)^k delta_{t+k} up to the step that ends the episode, or the rollout."""
    rng, gamma, lam = np.random.default_rng(0), 0.9, 0.8
    T, E, N = 9, 4, 2
    terminated, truncated = np.zeros((2, T, E), bool)
    terminated[[3, 5], 0] = True  # in the middle
    terminated[T - 1, 1] = True  # at the end
    truncated[4, 2], truncated[T - 1, 2], terminated[0, 3] = True, True, True
    reward, value, next_value = rng.normal(size=(T, E)), rng.normal(size=(T, E, N)), rng.normal(size=(T, E, N))
    done = terminated | truncated
    expected = np.zeros((T, E, N))
    for t in range(T):
        for e in range(E):
            for k in range(t, T):
                target = reward[k, e] + (0 if terminated[k, e] else gamma * next_value[k, e])
                expected[t, e] += (gamma * lam) ** (k - t) * (target - value[k, e])
                if done[k, e]:
                    break
    arrays = (torch.from_numpy(x) for x in (reward, terminated, done, value, next_value))
    torch.testing.assert_close(script.gae(*arrays, gamma, lam).numpy(), expected)


def test_the_batch_bootstraps_from_the_right_view(networks):
    """The next row's value; the final view's, where the episode was cut off; view T's at the end of the rollout."""
    args = make_args(gamma=0.9, gae_lambda=0.7)
    rollout, row, hidden = play(networks, args)
    last = script.value_of(networks, row, hidden)
    batch = script.make_batch(networks, rollout, last, args)
    mean, std = (x.item() for x in networks.value_norm.statistics())
    value = np.stack([row["value"].numpy() for row in rollout] + [last.numpy()]) * std + mean
    returns = np.zeros((T, E, SIZES.num_agents))
    for e in range(E):
        for t in reversed(range(T)):
            row = rollout[t]
            following = value[t + 1, e]
            if row["truncated"][e]:
                following = row["final_value"][e].numpy() * std + mean
            if row["terminated"][e]:
                following = 0 * following
            more = 0 if t == T - 1 or row["done"][e] else args.gae_lambda * (returns[t + 1, e] - value[t + 1, e])
            returns[t, e] = row["reward"][e].item() + args.gamma * (following + more)
    expected = torch.from_numpy(returns).float()
    torch.testing.assert_close(batch.returns, to_rows(expected), rtol=1e-4, atol=1e-4)
    chosen = (expected - torch.from_numpy(value[:-1]))[from_rows(batch.active)]
    normal = (expected - torch.from_numpy(value[:-1]) - chosen.mean()) / (chosen.std(correction=0) + 1e-5)
    normal *= from_rows(batch.active)  # the others' is not used
    torch.testing.assert_close(batch.advantage, to_rows(normal), rtol=1e-3, atol=1e-3)
    assert batch.advantage[batch.active].mean().abs() < 1e-5
    unexplained = (returns - value[:-1]).var() / returns.var()
    assert batch.explained_variance.item() == pytest.approx(1 - unexplained, rel=1e-3)


def to_rows(x: torch.Tensor) -> torch.Tensor:
    """(T, E, ...) -> (R, ...), one by one: chunk k of environment e has its c-th step in row c M + k E + e."""
    rows, M = torch.zeros(T * E, *x.shape[2:], dtype=x.dtype), T // C * E
    for t in range(T):
        for e in range(E):
            rows[t % C * M + t // C * E + e] = x[t, e]
    return rows


def from_rows(rows: torch.Tensor) -> torch.Tensor:
    M = T // C * E
    return torch.stack([torch.stack([rows[t % C * M + t // C * E + e] for e in range(E)]) for t in range(T)])


def test_value_norm_is_the_weighted_mean_of_all_batches():
    norm, rng, beta = script.ValueNorm(beta=0.9), np.random.default_rng(0), 0.9
    assert [x.item() for x in norm.statistics()] == pytest.approx([0, 0.1])
    batches = rng.normal(5, 3, size=(20, 7, 2)).astype(np.float32)
    for n in range(1, len(batches) + 1):
        norm.update(torch.from_numpy(batches[n - 1]))
        weight = beta ** np.arange(n)[::-1]
        mean = np.average(batches[:n].mean((1, 2)), weights=weight)
        std = math.sqrt(np.average(np.square(batches[:n]).mean((1, 2)), weights=weight) - mean**2)
        assert [x.item() for x in norm.statistics()] == pytest.approx([mean, std], rel=1e-4)
    x = torch.tensor([1.0, -2.0])
    torch.testing.assert_close(norm.normalise(x), (x - mean) / std)
    torch.testing.assert_close(norm.denormalise(norm.normalise(x)), x)
    slow = script.ValueNorm()  # nearly an all-time mean, which single precision would lose
    for batch in batches:
        slow.update(torch.from_numpy(batch))
    assert [x.item() for x in slow.statistics()] == pytest.approx([batches.mean(), batches.std()], rel=1e-3)
    flat = script.ValueNorm()
    flat.update(torch.full((4,), 2.0))
    assert [x.item() for x in flat.statistics()] == pytest.approx([2, 0.1])  # variance at least .01


def test_networks_are_as_described(networks):
    """Orthogonal weights of their gains, zero biases, and no weight in common."""
    fresh = script.Networks(SIZES, make_args())
    for net, gain in ((fresh.actor, 0.01), (fresh.critic, 1)):
        for layer, size in ((net.fc1, 2**0.5), (net.fc2, 2**0.5), (net.fc_out, gain)):
            smaller = layer.weight if len(layer.weight) <= layer.weight.shape[1] else layer.weight.T
            torch.testing.assert_close(smaller @ smaller.T, size**2 * torch.eye(len(smaller)), rtol=1e-4, atol=1e-4)
        for weight in (net.gru.weight_ih_l0, net.gru.weight_hh_l0):
            torch.testing.assert_close(weight.T @ weight, torch.eye(64), rtol=1e-4, atol=1e-4)
        assert {p.abs().max().item() for name, p in net.named_parameters() if "bias" in name} == {0.0}
    actor, critic = ({id(p) for p in group["params"]} for group in fresh.parameter_groups())
    assert not actor & critic
    assert len(actor | critic) == len(list(fresh.parameters()))


def plain(net, x, hidden):
    """One step of a network, from PyTorch's own modules: x (E, N, features), hidden (E, N, H) -> output, hidden."""
    E, N, _ = x.shape
    cell = torch.nn.GRUCell(64, 64)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in net.gru.state_dict().items()})
    x = torch.cat([x, torch.eye(N).expand(E, N, N)], dim=-1)
    x = net.norm_in(x) if net.input_norm else x
    x = net.norm2(torch.relu(net.fc2(net.norm1(torch.relu(net.fc1(x))))))
    hidden = cell(x.flatten(0, 1), hidden.flatten(0, 1)).unflatten(0, (E, N))
    return net.fc_out(net.norm3(hidden)), hidden


@pytest.mark.parametrize("input_norm", [True, False])
def test_networks_compute_what_is_described(input_norm):
    """Each agent's own observation and id; the critic's state, too. Every weight and bias at random."""
    networks = script.Networks(SIZES, make_args(input_norm=input_norm, death_masking=False))
    for parameter in networks.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    row, hidden = random_row(np.random.default_rng(0), np.zeros(E, bool)), torch.randn(2, E, 3, 64)
    expected = plain(networks.actor, row["obs"], hidden[0])
    torch.testing.assert_close(networks.actor(row["obs"], None, hidden[0]), expected)
    seen = torch.cat([row["state"].unsqueeze(1).expand(E, 3, 6), row["obs"]], dim=-1)
    value, after = networks.critic(row["obs"], row["state"], row["mask"], hidden[1])
    expected, then = plain(networks.critic, seen, hidden[1])
    torch.testing.assert_close(value, expected.squeeze(-1))
    torch.testing.assert_close(after, then)


def test_chunks_unroll_to_what_acting_computed(networks):
    """Log-probabilities and values, in the chunks' order, with episodes that begin inside chunks; so the ratio is 1."""
    args = make_args()
    rollout, row, hidden = play(networks, args, ends=0.4)
    first = torch.stack([row["first"] for row in rollout])
    assert first.unflatten(0, (-1, C))[:, 1:].any()
    assert first[C::C].any()
    batch = script.make_batch(networks, rollout, script.value_of(networks, row, hidden), args)
    for name in ("obs", "state", "mask", "first", "action", "log_prob", "value"):
        assert torch.equal(getattr(batch, name), to_rows(torch.stack([row[name] for row in rollout])))
    logits, _ = networks.actor(batch.obs, None, batch.hidden[0], batch.first)
    log_policy = script.masked_log_policy(logits, batch.mask)
    log_prob = log_policy.gather(-1, batch.action.unsqueeze(-1)).squeeze(-1)
    assert ((log_prob - batch.log_prob).exp() - 1).abs().max() < 1e-4
    value, _ = networks.critic(batch.obs, batch.state, batch.mask, batch.hidden[1], batch.first)
    torch.testing.assert_close(value, batch.value, rtol=0, atol=1e-5)
    logs = script.compute_losses(networks, batch, args)[1]
    assert logs["approx_kl"].abs() < 1e-6
    assert logs["clipfrac"] == 0
    wrong, _ = networks.actor(batch.obs, None, batch.hidden[0], batch.first.roll(len(batch.hidden[0])))
    assert (wrong - logits).abs().max() > 1e-2  # the test would notice flags that are one step off


def test_gradients_stay_inside_chunks(networks):
    """Nothing before a chunk, and in it nothing before an episode's begin, gets a gradient."""
    args = make_args()
    batch = make_batch(networks, args)
    M = len(batch.hidden[0])
    obs = batch.obs.clone().requires_grad_()
    logits, _ = networks.actor(obs, None, batch.hidden[0], batch.first)
    assert not batch.hidden.requires_grad
    for row in range((C - 1) * M, C * M):  # the last of each chunk
        (gradient,) = torch.autograd.grad(logits[row].square().sum(), obs, retain_graph=True)
        begin = max((c for c in range(C) if batch.first[c * M + row % M]), default=0)
        expected = [c * M + row % M for c in range(begin, C)]
        assert gradient.abs().sum((1, 2)).nonzero().flatten().tolist() == expected


def test_at_ratio_1_the_gradient_is_that_of_the_policy_gradient(networks):
    args = make_args(ent_coef=0)
    batch = make_batch(networks, args)
    loss, _ = script.compute_losses(networks, batch, args)
    log_policy = script.masked_log_policy(networks.actor(batch.obs, None, batch.hidden[0], batch.first)[0], batch.mask)
    log_prob = log_policy.gather(-1, batch.action.unsqueeze(-1)).squeeze(-1)
    plain = -(batch.advantage * log_prob)[batch.active].mean()
    number = len(list(networks.actor.parameters()))
    ours, expected = gradients(networks, loss)[:number], gradients(networks, plain)[:number]
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)
    assert max(g.abs().max() for g in ours) > 1e-3


def one_sample(log_ratio: float, advantage: float, value_step=0.0, old_value=0.0, returns=0.0):
    """Networks and a batch of one agent in one step, whose policy and values have moved by this much."""
    game = SimpleNamespace(num_agents=1, num_actions=2, obs_size=2, state_size=2)
    networks, args = script.Networks(game, make_args()), make_args()
    networks.value_norm.update(torch.tensor([-1.0, 1.0]))  # mean 0, standard deviation 1
    torch.nn.init.constant_(networks.critic.fc_out.bias, old_value + value_step)
    torch.nn.init.zeros_(networks.critic.fc_out.weight)
    batch = SimpleNamespace(
        obs=torch.randn(1, 1, 2), state=torch.randn(1, 2), mask=torch.ones(1, 1, 2, dtype=torch.bool),
        first=torch.ones(1, dtype=torch.bool), hidden=torch.zeros(2, 1, 1, 64), action=torch.zeros(1, 1, dtype=int),
        advantage=torch.tensor([[advantage]]), returns=torch.tensor([[returns]]), value=torch.tensor([[old_value]]),
        active=torch.ones(1, 1, dtype=torch.bool), valid=torch.ones(1, 1, dtype=torch.bool),
    )  # fmt: skip
    logits, _ = networks.actor(batch.obs, None, batch.hidden[0])
    batch.log_prob = F.log_softmax(logits, -1)[..., 0].detach() - log_ratio
    return networks, batch, args


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.5, 2.0, -2.4, True),  # more probable and good: nothing is gained beyond 1.2
        (1.5, -2.0, 3.0, False),
        (0.5, -2.0, 1.6, True),
        (0.5, 2.0, -1.0, False),
        (1.1, 2.0, -2.2, False),
    ],
)
def test_the_policy_is_clipped_on_one_side(ratio, advantage, loss, clipped):
    networks, batch, args = one_sample(math.log(ratio), advantage)
    _, logs = script.compute_losses(networks, batch, args)
    assert logs["policy"].item() == pytest.approx(loss, rel=1e-5)
    assert logs["clipfrac"] == float(abs(ratio - 1) > 0.2)
    assert logs["approx_kl"].item() == pytest.approx(ratio - 1 - math.log(ratio), rel=1e-4)
    args.ent_coef = 0
    gradient = gradients(networks, script.compute_losses(networks, batch, args)[0])
    moved = max(g.abs().max().item() for g in gradient[: len(list(networks.actor.parameters()))])
    assert (moved == 0) == clipped


@pytest.mark.parametrize(
    ("step", "returns", "loss"),
    [
        (0.1, 1.0, 0.9**2 / 2),
        (0.5, 1.0, 0.8**2 / 2),  # closer to the return than allowed: as if it had moved by .2
        (-0.5, 1.0, 1.5**2 / 2),
        (0.0, 30.0, 10 * (30 - 5)),  # linear beyond 10
    ],
)
def test_values_are_clipped_and_large_errors_count_linearly(step, returns, loss):
    networks, batch, args = one_sample(0, 1.0, step, 0.0, returns)
    assert script.compute_losses(networks, batch, args)[1]["value"].item() == pytest.approx(loss, rel=1e-4)


def test_entropy_is_that_of_available_actions_of_the_living(networks):
    args = make_args()
    batch = make_batch(networks, args)
    policy = script.masked_log_policy(
        networks.actor(batch.obs, None, batch.hidden[0], batch.first)[0], batch.mask
    ).exp()
    each = zip(policy.flatten(0, 1), batch.mask.flatten(0, 1), strict=True)
    entropies = [torch.distributions.Categorical(p[m]).entropy() for p, m in each]
    expected = torch.stack(entropies)[batch.active.flatten()].mean()
    loss, logs = script.compute_losses(networks, batch, args)
    torch.testing.assert_close(logs["entropy"], expected)
    torch.testing.assert_close(loss.detach(), logs["policy"] - 0.01 * expected + logs["value"])


def test_the_dead_change_no_policy_but_count_for_values(networks):
    """Their observations, log-probabilities and advantages reach no gradient of the actor."""
    args = make_args()
    batch = make_batch(networks, args)
    dead = ~batch.active
    assert dead.any()
    number = len(list(networks.actor.parameters()))
    expected = gradients(networks, script.compute_losses(networks, batch, args)[0])[:number]
    batch.advantage = batch.advantage.masked_fill(dead, 7)
    batch.log_prob = batch.log_prob.masked_fill(dead, -3)
    _, logs = script.compute_losses(networks, batch, args)
    actual = gradients(networks, script.compute_losses(networks, batch, args)[0])[:number]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)
    batch.returns = batch.returns + 5 * dead
    assert abs(script.compute_losses(networks, batch, args)[1]["value"] - logs["value"]) > 0.1


@pytest.mark.parametrize("death_masking", [True, False])
def test_death_masking_hides_everything_but_the_id(networks, death_masking):
    networks.critic.death_masking = death_masking
    rng = np.random.default_rng(0)
    row = random_row(rng, np.ones(E, bool))
    hidden = torch.randn(2, E, 3, 64)
    dead = ~script.has_choice(row["mask"])
    assert dead.any()
    assert not dead.all()
    for changed in ({"obs": row["obs"] + 1 + torch.rand(E, 3, 4)}, {"state": row["state"] + torch.rand(E, 6)}):
        same = script.value_of(networks, row, hidden) == script.value_of(networks, row | changed, hidden)
        assert torch.equal(same, dead if death_masking else torch.zeros_like(dead))
    if death_masking:  # without a memory, and all of them dead, they differ by their ids
        value = script.value_of(networks, row | {"mask": torch.zeros_like(row["mask"])}, 0 * hidden)
        assert len(set(value[0].tolist())) == 3


def test_agents_are_interchangeable_but_for_their_ids(networks):
    """Permute the agents, and with them the weights of their ids: the losses are the same."""
    args = make_args()
    batch = make_batch(networks, args)
    order = torch.tensor([2, 0, 1])
    loss, logs = script.compute_losses(networks, batch, args)
    with torch.no_grad():
        for net in (networks.actor, networks.critic):
            for tensor in (net.fc1.weight, net.norm_in.weight, net.norm_in.bias):
                tensor[..., -3:] = tensor[..., -3:][..., order].clone()
    for name, column in vars(batch).items():
        if name not in ("state", "first", "hidden", "explained_variance"):
            setattr(batch, name, column[:, order])
    batch.hidden = batch.hidden[:, :, order]
    other, other_logs = script.compute_losses(networks, batch, args)
    torch.testing.assert_close(other, loss)
    torch.testing.assert_close(other_logs, logs)


def test_an_unavailable_action_is_never_sampled_nor_learnt(networks):
    args = make_args()
    rollout, row, hidden = play(networks, args)
    for r in rollout:
        assert r["mask"].gather(-1, r["action"].unsqueeze(-1)).all()
    with torch.no_grad():
        networks.actor.fc_out.weight.mul_(1e4)  # log-probabilities far below the smallest number of exp
    batch = script.make_batch(networks, rollout, script.value_of(networks, row, hidden), args)
    batch.log_prob = script.masked_log_policy(
        networks.actor(batch.obs, None, batch.hidden[0], batch.first)[0], batch.mask
    )
    batch.log_prob = batch.log_prob.gather(-1, batch.action.unsqueeze(-1)).squeeze(-1).detach()
    loss, _ = script.compute_losses(networks, batch, args)
    assert all(g.isfinite().all() for g in gradients(networks, loss))


def test_lost_games_never_enter_an_update(networks):
    """Whatever was collected of them: the networks, statistics and logs after an update are the same."""
    args, lost = make_args(), {(6, 1), (2, 3), (9, 3)}
    results = []
    for nonsense in (0, 1000):
        copies = script.Networks(SIZES, args)
        copies.load_state_dict(networks.state_dict())
        rollout, row, hidden = play(copies, args, ends=0.1, lost=lost)
        valid = torch.stack([row["valid"] for row in rollout])
        first = torch.stack([row["first"] for row in rollout])
        expected = torch.ones(T, E, dtype=torch.bool)
        for t, e in lost:
            begin = max(k for k in range(t + 1) if first[k, e])
            expected[begin : t + 1, e] = False
        assert torch.equal(valid, expected)
        assert 3 <= (~valid).sum() < T * E / 2
        for row_t, ok in zip(rollout, valid, strict=True):
            for name in ("obs", "state", "reward", "value", "log_prob", "final_value"):
                row_t[name] = row_t[name] + nonsense * ~ok.view(-1, *[1] * (row_t[name].ndim - 1))
        batch = script.make_batch(copies, rollout, script.value_of(copies, row, hidden), args)
        optimizer = torch.optim.Adam(copies.parameter_groups(), lr=1e-3, eps=1e-5)
        logs = script.update(copies, optimizer, batch, 1.0, args)
        results.append((copies.state_dict(), logs))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert not torch.equal(results[0][0]["actor.fc1.weight"], networks.actor.fc1.weight)


@pytest.mark.filterwarnings("ignore::UserWarning")  # the mean of nothing
def test_an_update_without_a_valid_step_changes_nothing(networks):
    args = make_args()
    batch = make_batch(networks, args, ends=0, lost={(T - 1, e) for e in range(E)})
    assert not batch.valid.any()
    before = {name: value.clone() for name, value in networks.state_dict().items()}
    optimizer = torch.optim.Adam(networks.parameter_groups())
    assert script.update(networks, optimizer, batch, 1.0, args) == {}
    torch.testing.assert_close(dict(networks.state_dict()), before, rtol=0, atol=0)


def test_an_update_is_five_steps_of_adam_by_hand(networks):
    """The statistics of returns move before each step; each network has a gradient norm and a rate of its own."""
    args = make_args(max_grad_norm=0.05)
    batch = make_batch(networks, args)
    other = script.Networks(SIZES, args)
    other.load_state_dict(networks.state_dict())
    script.update(networks, torch.optim.Adam(networks.parameter_groups(), lr=1, eps=1e-5), batch, 0.5, args)
    settings = ((other.actor, 0.5 * 5e-4), (other.critic, 0.5 * 1e-3))
    optimizers = [torch.optim.Adam(net.parameters(), lr=rate, eps=1e-5) for net, rate in settings]
    for _ in range(5):
        other.value_norm.update(batch.returns)
        loss, _ = script.compute_losses(other, batch, args)
        other.zero_grad()
        loss.backward()
        for (net, _), optimizer in zip(settings, optimizers, strict=True):
            norm = torch.stack([p.grad.norm() for p in net.parameters()]).norm()
            for parameter in net.parameters():
                parameter.grad *= min(1, 0.05 / norm)
            optimizer.step()
    torch.testing.assert_close(dict(networks.state_dict()), dict(other.state_dict()), rtol=1e-4, atol=1e-6)


def test_rates_fall_linearly_by_iteration():
    args = make_args(total_timesteps=480, anneal_steps=480)  # ten iterations of 48 steps
    assert [script.annealing(step, args) for step in (0, 47, 48, 100, 432, 479)] == pytest.approx(
        [1, 1, 0.9, 0.8, 0.1, 0.1]
    )
    args.anneal_steps = 96
    assert [script.annealing(step, args) for step in (0, 48, 96, 1000)] == pytest.approx([1, 0.5, 0, 0])


def test_nothing_is_computed_on_another_device():
    """Acting and losses on the meta device, which as a GPU does refuses to compute with a CPU's tensors; but it cannot
    select active agents, so that a rollout's batch is left to the tests marked gpu."""
    args, device = make_args(), torch.device("meta")
    networks = script.Networks(SIZES, args)
    batch = make_batch(networks, args)
    networks.to(device)
    for net in (networks.actor, networks.critic):
        net.input_norm = torch.tensor(True)  # the only one that is asked for its value
    batch = SimpleNamespace(**{name: column.to(device) for name, column in vars(batch).items()})
    loss, logs = script.compute_losses(networks, batch, args)
    row = {name: getattr(batch, name)[:E] for name in ("obs", "state", "mask", "first")}
    decision, hidden = script.act(networks, row, batch.hidden[:, :E])
    assert {x.device for x in (loss, hidden, *logs.values(), *decision.values())} == {device}


# --- Runs -------------------------------------------------------------------------------------------------------------
LENGTHS = np.array([2, 3, 4, 5])  # environment e plays episodes of LENGTHS[e] steps


class Clockwork(test_training.Clockwork):
    num_envs, lengths, episode_limit = E, LENGTHS, 5


class Fragile(Clockwork, test_training.Fragile):
    """Episodes are lost, too."""


def train(folder, env=Clockwork, listen=None, resume=False, **changes) -> dict:
    """In the clockwork; `listen` gets name, arguments and result of every act and update."""

    def heard(name):
        function = getattr(script, name)

        def wrapper(*arguments):
            result = function(*arguments)
            if listen:
                listen(name, arguments, result)
            return result

        return wrapper

    options = {"resume" if resume else "run_dir": str(folder)}
    options |= dict(total_timesteps=3 * E * T + 8, eval_interval=100, eval_episodes=E)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "make_env", lambda *_: env())
        for name in ("act", "update"):
            patch.setattr(script, name, heard(name))
        return script.train(make_args(**(options | changes)))


@pytest.mark.parametrize("env", [Clockwork, Fragile])
def test_which_step_enters_which_iteration(env, tmp_path):
    """Iterations of T steps of each environment, in order, each learnt once; the steps left over are not learnt."""
    decisions, updates, hiddens = [], [], []

    def listen(name, arguments, result):
        if name == "act":
            decisions.append(result[0])
            hiddens.append(arguments[2])
        else:
            updates.append((len(decisions), arguments[2], arguments[3]))

    train(tmp_path, env, listen)
    assert [acted for acted, *_ in updates] == [T, 2 * T, 3 * T]
    assert len(decisions) == 3 * T + 2
    total = 3 * E * T + 8
    assert [factor for *_, factor in updates] == pytest.approx([1 - i * E * T / total for i in range(3)])
    for i, (_, batch, _) in enumerate(updates):
        begun = i * T
        time = torch.arange(begun, begun + T).unsqueeze(1).expand(T, E)
        first = time % torch.from_numpy(LENGTHS) == 0
        assert torch.equal(from_rows(batch.first), first)
        assert torch.equal(from_rows(batch.state)[..., 0], time + first / 2)
        assert torch.equal(from_rows(batch.obs), (time + first / 2)[..., None, None].expand(T, E, 2, 1))
        for name in ("action", "log_prob", "value"):
            assert torch.equal(from_rows(getattr(batch, name)), torch.stack([d[name] for d in decisions[begun:][:T]]))
        M = T // C * E
        stored = batch.hidden.unflatten(1, (T // C, E))
        for k in range(T // C):
            assert torch.equal(stored[:, k], hiddens[begun + k * C])
        assert batch.hidden.shape[1] == M
        battle = time // 3
        lost = (battle % 5 == 4) & (torch.arange(E) == 1) & (env is Fragile)
        lost &= battle * 3 + 2 < begun + T  # known when the rollout is learnt
        assert torch.equal(from_rows(batch.valid)[..., 0], ~lost)


def test_returns_bootstrap_from_the_views_of_the_right_step(tmp_path):
    """With lambda 0 a return is the reward plus the discounted value of what the step led to."""
    seen, critics = [], []

    def listen(name, arguments, result):
        if name == "act":
            seen.append((arguments[1], arguments[2], result[0], result[1]))
            if not critics:
                critics.append(script.Networks(Clockwork, make_args()))
                critics[0].load_state_dict(arguments[0].state_dict())
        else:
            critics.append(arguments[2])

    train(tmp_path, Clockwork, listen, total_timesteps=E * T + E, gae_lambda=0.0)
    networks, batch = critics
    returns, value = from_rows(batch.returns), torch.stack([s[2]["value"] for s in seen])
    after = [s[3] for s in seen]
    for t in range(T):
        reward = seen[t][2]["action"].sum(1)
        for e in range(E):
            ends = (t + 1) % LENGTHS[e] == 0
            if ends and e < E - 1:
                following = torch.zeros(2)
            elif ends:  # cut off: the final view, which shows a half less than the next episode's first
                now = torch.full((1, 2, 1), t + 1.0)
                row = {"obs": now, "state": now[:, 0], "mask": torch.ones(1, 2, 3, dtype=torch.bool)}
                row["first"] = torch.zeros(1, dtype=torch.bool)
                following = script.value_of(networks, row, after[t][:, e : e + 1])[0] * 0.1
            elif t + 1 < T:
                following = value[t + 1, e] * 0.1  # the statistics before the first update: mean 0, deviation .1
            else:
                row = {name: column[e : e + 1] for name, column in seen[T][0].items()}
                following = script.value_of(networks, row, after[t][:, e : e + 1])[0] * 0.1
            torch.testing.assert_close(returns[t, e], reward[e] + 0.99 * following, rtol=1e-4, atol=1e-5)


def test_tensorboard_gets_returns_losses_and_rate(tmp_path):
    logs = []
    train(tmp_path, Fragile, lambda name, _, result: logs.append(result) if name == "update" else None)
    log = event_log(tmp_path)
    names = {"policy", "value", "entropy", "approx_kl", "clipfrac", "explained_variance"}
    assert {tag.removeprefix("losses/") for tag in log.Tags()["scalars"] if tag.startswith("losses/")} == names
    for name in names:
        logged = [(scalar.step, scalar.value) for scalar in log.Scalars(f"losses/{name}")]
        assert logged == [(48 * (i + 1), pytest.approx(logs[i][name].item(), abs=1e-6)) for i in range(3)]
    rates = [(scalar.step, scalar.value) for scalar in log.Scalars("charts/learning_rate")]
    total = 3 * E * T + 8
    expected = [5e-4 * (1 - step // 48 * 48 / total) for step, _ in rates]
    assert [rate for _, rate in rates] == pytest.approx(expected)
    steps = total // E
    assert len(log.Scalars("charts/episodic_return")) == int((steps // LENGTHS).sum()) - steps // 15
    assert max(scalar.value for scalar in log.Scalars("charts/episodic_return")) <= 5 * 2 * 2


def everything(run_dir) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def test_a_resumed_run_goes_on_to_the_last_bit(tmp_path):
    """In the middle of an iteration, after it, and again: rollout, statistics, optimiser, states, counts."""
    train(tmp_path / "whole", Fragile, anneal_steps=500)
    for steps in (32, 96, 100, 3 * E * T + 8):
        train(tmp_path / "parts", Fragile, anneal_steps=500, total_timesteps=steps, resume=steps > 32)
    ours, theirs = everything(tmp_path / "parts"), everything(tmp_path / "whole")
    assert ours["loop"][:3] == theirs["loop"][:3] == [152, int((38 // LENGTHS).sum()) - 38 // 15, 15]
    assert len(ours["rollout"]) == 2
    for name in ("networks", "optimizer", "rollout", "env", "rng"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)
    torch.testing.assert_close(ours["loop"][5:], theirs["loop"][5:], rtol=0, atol=0)
    assert ours["networks"]["value_norm.sums"][0] > 0
    assert {group["eps"] for group in ours["optimizer"]["param_groups"]} == {1e-5}


def test_a_resumed_run_on_the_simulator_goes_on_to_the_last_bit(tmp_path):
    options = dict(map="terran_5_vs_5", num_envs=4, num_steps=40, chunk_length=8, eval_episodes=4, eval_interval=400)
    options |= dict(backend="sim", anneal_steps=10_000, cuda=False)
    script.train(script.Args(**options, run_dir=str(tmp_path / "whole"), total_timesteps=560))
    script.train(script.Args(**options, run_dir=str(tmp_path / "parts"), total_timesteps=400))
    script.train(script.Args(**options, resume=str(tmp_path / "parts"), total_timesteps=560))
    ours, theirs = everything(tmp_path / "parts"), everything(tmp_path / "whole")
    for name in ("networks", "optimizer", "rollout", "env", "rng"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


@pytest.mark.parametrize("input_norm", [True, False])
def test_the_policy_acts_as_the_actor_that_was_trained(input_norm, tmp_path):
    """It says by itself which network it is; README's example and --evaluate build it from the sizes alone."""
    summary = train(tmp_path, input_norm=input_norm)
    policy, saved = (torch.load(tmp_path / f"{kind}.pt", weights_only=True) for kind in ("policy", "checkpoint"))
    agent = script.Agent(*(policy[name] for name in script.SIZES))
    agent.load_state_dict(policy["agent"])
    assert bool(agent.input_norm) == input_norm
    for name, value in agent.state_dict().items():
        assert torch.equal(value, saved["networks"][f"actor.{name}"])
    trained = script.Agent(1, 2, 3, input_norm)
    trained.load_state_dict({k.removeprefix("actor."): v for k, v in saved["networks"].items() if "actor." in k})
    obs, last_action = torch.randn(5, 2, 1), torch.full((5, 2), -1)
    hidden = torch.randn(5, 2, agent.hidden_size)
    torch.testing.assert_close(agent(obs, last_action, hidden), trained(obs, None, hidden), rtol=0, atol=0)
    torch.testing.assert_close(agent(obs, last_action, None), trained(obs, None, hidden * 0), rtol=0, atol=0)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["updates"] == 15


def test_untrained_runs_say_so(tmp_path, capsys):
    train(tmp_path, total_timesteps=E * T - 1 - E)
    assert "Nothing was learnt: the first update waits for 48 steps" in capsys.readouterr().out


def test_a_lost_game_ends_the_run_with_a_checkpoint_that_goes_on(tmp_path):
    class Breaks(Clockwork):
        def step(self, action):
            if self.clock[0] == 15:
                raise ConnectionError("gone")
            return super().step(action)

    with pytest.raises(ConnectionError, match="gone"):
        train(tmp_path, Breaks)
    assert everything(tmp_path)["step"] == 15 * E
    summary = train(tmp_path, resume=True)
    assert summary["env_steps"] == 3 * E * T + 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(num_steps=401), "--num-steps 401 is not a multiple of --chunk-length 8"),
        (dict(num_steps=0), "--num-steps is 0"),
        (dict(clip_coef=1.5), "--clip-coef is 1.5"),
        (dict(gae_lambda=1.1), "--gae-lambda is 1.1"),
        (dict(ent_coef=-0.1), "--ent-coef is -0.1"),
        (dict(gamma=math.nan), "--gamma is nan"),
        (dict(anneal_steps=0), "--anneal-steps is 0"),
        (dict(anneal_steps=99, total_timesteps=100), "After --anneal-steps 99 nothing is learnt"),
        *IMPOSSIBLE,
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(changes, words, tmp_path, monkeypatch):
    refused_before_a_file_is_made(script, changes, words, tmp_path, monkeypatch)


def test_other_files_and_other_options_are_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(script.InputError, match=r"gae_lambda is 0\.5, but was 0\.95"):
        train(tmp_path, resume=True, gae_lambda=0.5)
    with pytest.raises(script.InputError, match="After --anneal-steps 152 nothing is learnt"):  # as the first run's
        train(tmp_path, resume=True, total_timesteps=1000, anneal_steps=152)
    with pytest.raises(script.InputError, match="has made its 152 steps"):
        train(tmp_path, resume=True)
    with pytest.raises(script.InputError, match="already holds a run"):
        train(tmp_path)
    with pytest.raises(qmix_smacv2.InputError, match="mappo_smacv2 checkpoint"):
        qmix_smacv2.load(str(tmp_path), "checkpoint")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    class Infinite(Clockwork, test_training.Infinite):
        """Of these lengths."""

    with pytest.raises(FloatingPointError, match="not finite at step 48"):
        train(tmp_path, Infinite)


def test_options_and_defaults():
    """Table 6 of the Soft-QMIX paper, and what the two frameworks agree on."""
    options = {field.name: field.default for field in dataclasses.fields(script.Args)}
    expected = dict(num_envs=8, num_steps=400, chunk_length=8, update_epochs=5, learning_rate=5e-4)
    expected |= dict(critic_learning_rate=1e-3, gamma=0.99, gae_lambda=0.95, clip_coef=0.2, ent_coef=0.01)
    expected |= dict(huber_delta=10, max_grad_norm=10, death_masking=True, input_norm=True, anneal_steps=None)
    assert {name: options[name] for name in expected} == expected
    shared = {field.name: (field.type, field.default) for field in dataclasses.fields(qmix_smacv2.Args)}
    for field in dataclasses.fields(script.Args):
        if field.name in shared and field.name not in ("exp_name", "num_envs", "learning_rate"):
            assert (field.type, field.default) == shared[field.name]


# --- Learning ---------------------------------------------------------------------------------------------------------
class Agree:
    """Two agents see the same one of three symbols, and are rewarded if both choose it."""

    num_agents, num_actions, obs_size, state_size, episode_limit = 2, 3, 3, 3, 10
    name, backend, title, about, restarts = "agree", "sim", "Agree.", {}, 0

    def __init__(self, num_envs, seed):
        self.num_envs = num_envs
        self.reset(seed)

    def reset(self, seed=None):
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.t = np.zeros(self.num_envs, int)
        return self.look()

    def look(self):
        self.symbol = self.rng.integers(3, size=self.num_envs)
        state = np.eye(3, dtype=np.float32)[self.symbol]
        return np.stack([state, state], 1), {"state": state, "action_mask": np.ones((self.num_envs, 2, 3), bool)}

    def step(self, actions):
        reward = (actions == self.symbol[:, None]).all(1).astype(np.float32)
        self.t += 1
        terminated = (self.t == self.episode_limit) | (self.rng.random(self.num_envs) < 0.05)
        obs, info = self.look()
        final = {"final_obs": obs, "final_info": info | {"battle_won": reward == 1}}
        self.t[terminated] = 0
        obs, info = self.look()
        return obs, reward, terminated, np.zeros_like(terminated), info | final

    def get_state(self):
        return {"t": self.t}

    def close(self):
        pass


class Recall(Agree):
    """The symbol to choose is the one before; an episode's first step is always right."""

    def step(self, actions):
        seen, begins = self.symbol, self.t == 0
        self.symbol = np.where(begins, actions[:, 0], getattr(self, "before", seen))
        result = super().step(np.where(begins[:, None], self.symbol[:, None], actions))
        self.before = seen
        return result


def learn(env, run_dir, monkeypatch, **options) -> float:
    """The share of test episodes whose last step is right."""
    monkeypatch.setattr(script, "make_env", lambda args, num_envs, seed: env(num_envs, seed))
    options |= dict(num_steps=40, anneal_steps=10**7, eval_interval=10**6, eval_episodes=128)
    return script.train(script.Args(**options, backend="sim", run_dir=str(run_dir)))["win_rate"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_agents_learn_to_agree(seed, tmp_path, monkeypatch):
    """Measured with six seeds: .78 to 1 after 1,000 steps, all right after 3,000 and 4,000."""
    assert learn(Agree, tmp_path, monkeypatch, seed=seed, total_timesteps=4000) > 0.95


def test_agents_learn_to_remember(tmp_path, monkeypatch):
    """Measured with four seeds: .91 to .98 after 12,000 steps, .59 to .80 after 4,000; a third is right by chance."""
    assert learn(Recall, tmp_path, monkeypatch, total_timesteps=12_000, learning_rate=2e-3) > 0.85


def test_battles_go_better_after_24000_steps(tmp_path):
    """An untrained policy earns 1.4; measured after training: 7.8."""
    options = dict(map="terran_5_vs_5", backend="sim", total_timesteps=24_000, anneal_steps=10_050_000, cuda=False)
    script.train(script.Args(**options, eval_interval=24_000, eval_episodes=64, run_dir=str(tmp_path)))
    untrained, trained = (float(row["return_mean"]) for row in read_metrics(tmp_path))
    assert untrained < 3
    assert trained > 6
