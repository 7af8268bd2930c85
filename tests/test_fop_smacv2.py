"""fop_smacv2.py: the mathematics against slow and plain versions of it, which battle is learnt when, and learning."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import test_training
import torch
from common import (
    IMPOSSIBLE,
    SIZES,
    acting_on,
    checkpoint_of,
    event_log,
    make_batch,
    random_episodes,
    read_metrics,
    refused_before_a_file_is_made,
    run_main,
    walk_agent,
)
from test_readme import python_example

import fop_smacv2 as script
import qmix_smacv2

GAMMA, LAMBDA, ALPHA = 0.97, 0.6, 0.5
AGENTS, ACTIONS = range(SIZES.num_agents), range(SIZES.num_actions)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def no_dice(monkeypatch):
    """From now on u' is the policy's most probable action."""
    monkeypatch.setattr(script, "sample_action", lambda log_policy, mask: log_policy.argmax(-1))


def make_args(**changes):
    return script.Args(**(dict(backend="sim", gamma=GAMMA, td_lambda=LAMBDA) | changes))


def make_networks(dtype=torch.float64, game=SIZES):
    """Untrained ones, but lively: logits and values that differ; and targets that are no copies."""
    networks = script.Networks(game, make_args())
    networks.target = script.Networks(game, make_args()).critic
    for part in (networks.actor, *networks.critic, *networks.target):
        torch.nn.init.normal_(part.fc_out.weight, std=0.5)
    return networks.to(dtype)


def random_inputs(R=7, choice=0.5) -> dict:
    """Of a critic: rows with an available action taken by each agent."""
    mask = torch.rand(R, 3, 5) < choice
    mask[..., 1] |= ~mask.any(-1)
    action = (torch.rand(R, 3, 5) * mask).argmax(-1)
    inputs = {"obs": torch.randn(R, 3, 4).double(), "state": torch.randn(R, 6).double()}
    return inputs | {"mask": mask, "action": action, "alpha": ALPHA}


# --- Mathematics, one number after the other --------------------------------------------------------------------------
def slow_q(critic, obs, i: int) -> list[float]:
    """q_i of all actions: a perceptron of observation and id, nothing else."""
    x = torch.cat([obs[i], torch.eye(3, dtype=obs.dtype)[i]])
    for layer in (critic.fc1, critic.fc2):
        x = (layer.weight @ x + layer.bias).clamp(min=0)
    return (critic.fc_out.weight @ x + critic.fc_out.bias).tolist()


def slow_v(q: list[float], mask, alpha: float) -> float:
    return alpha * math.log(sum(math.exp(q[u] / alpha) for u in ACTIONS if mask[u]))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def slow_lambda(mixer, state, action, i: int) -> float:
    """A sum over four heads, each a key, a gate of the state, and a gate of state and joint action."""
    one_hot = torch.cat([torch.eye(5, dtype=state.dtype)[u] for u in action])
    total = 0.0
    for h in range(4):
        row = h * 3 + i
        key = (mixer.key.weight[h] @ state + mixer.key.bias[h]).item()
        agent = (mixer.agent.weight[row] @ state + mixer.agent.bias[row]).item()
        gate = (mixer.action.weight[row] @ torch.cat([state, one_hot]) + mixer.action.bias[row]).item()
        total += abs(key) * sigmoid(agent) * sigmoid(gate)
    return total


def slow_q_jt(critic, obs, state, mask, action, alpha) -> float:
    """V(s) + sum_i v_i + sum_i lambda_i (q_i - v_i): the form without a stopped gradient."""
    first, _, second = critic.mixer.v
    total = (second.weight @ (first.weight @ state + first.bias).clamp(min=0) + second.bias).item()
    for i in AGENTS:
        q = slow_q(critic, obs, i)
        v = slow_v(q, mask[i], alpha)
        total += v + slow_lambda(critic.mixer, state, action, i) * (q[action[i]] - v)
    return total


def test_q_jt_is_its_definition_agent_by_agent_and_head_by_head():
    """Both forms have the same value."""
    critic = make_networks().critic[1]
    inputs = random_inputs()
    q, q_jt = critic(**inputs)
    for r in range(7):
        row = [inputs[name][r] for name in ("obs", "state", "mask", "action")]
        assert q_jt[r].item() == pytest.approx(slow_q_jt(critic, *row, ALPHA), rel=1e-9)
        for i in AGENTS:
            assert q[r, i].tolist() == pytest.approx(slow_q(critic, row[0], i))
    weight = critic.mixer.weight(inputs["state"], inputs["action"])
    assert (weight > 0).all()
    assert weight.std() > 0.05


def test_the_gradient_reaches_q_i_with_weight_1_and_lambda_by_the_advantage(monkeypatch):
    mixer = make_networks().critic[0].mixer
    q_i, v_i, weight = (torch.randn(7, 3).double().requires_grad_() for _ in range(3))
    monkeypatch.setattr(mixer, "weight", lambda state, action: weight)
    q_jt = mixer(q_i, v_i, torch.randn(7, 6).double(), torch.zeros(7, 3, dtype=int))
    by_q, by_v, by_weight = torch.autograd.grad(q_jt.sum(), (q_i, v_i, weight), allow_unused=True)
    assert torch.equal(by_q, torch.ones_like(by_q))
    assert by_v is None
    torch.testing.assert_close(by_weight, (q_i - v_i).detach())


def test_in_a_critic_only_the_taken_actions_value_is_moved():
    critic, inputs = make_networks().critic[0], random_inputs()
    values = []
    critic.fc_out.register_forward_hook(lambda *arguments: values.append(arguments[2]))
    (gradient,) = torch.autograd.grad(critic(**inputs)[1].sum(), values)
    taken = torch.nn.functional.one_hot(inputs["action"], 5).double()
    torch.testing.assert_close(gradient, taken, rtol=0, atol=0)


@pytest.mark.parametrize("nonsense", [1e6, -1e6, math.nan, math.inf])
def test_soft_values_are_those_of_available_actions(nonsense):
    q, mask = torch.randn(50, 5).double(), torch.rand(50, 5) < 0.5
    mask[..., 2] |= ~mask.any(-1)
    expected = [slow_v(q[r].tolist(), mask[r], ALPHA) for r in range(50)]
    value = script.soft_value(q.masked_fill(~mask, nonsense), mask, ALPHA)
    assert value.tolist() == pytest.approx(expected)
    best = q.masked_fill(~mask, -math.inf).max(-1).values
    assert (value >= best - 1e-12).all()
    for alpha in (1e-2, 1e-4, 1e-8):  # at alpha = 0 it is the best one
        assert (script.soft_value(q, mask, alpha) - best).abs().max() <= alpha * math.log(5) + 1e-12
    one = mask.sum(-1) == 1
    torch.testing.assert_close(value[one], best[one])  # no advantage without a choice


def slow_losses(networks, episodes, alpha, args) -> dict[str, float]:
    """What is logged, from the definitions, with the most probable u'."""
    totals = {"td": [], "policy": [], "q_tot": [], "entropy": []}
    for episode in episodes:
        L, actions = len(episode["reward"]), episode["action"]
        obs, state = (torch.tensor(episode[name]).double() for name in ("obs", "state"))
        mask, logits = episode["mask"], walk_agent(networks.actor, episode)
        log_pi, q_bar, next_log_pi = [], [0.0], [0.0]
        for t in range(L + 1):
            allowed = [[u for u in ACTIONS if mask[t, i, u]] for i in AGENTS]
            norm = [math.log(sum(math.exp(logits[t][i, u].item()) for u in allowed[i])) for i in AGENTS]
            log_pi.append([{u: logits[t][i, u].item() - norm[i] for u in allowed[i]} for i in AGENTS])
            if t:
                chosen = [max(log_pi[t][i], key=log_pi[t][i].get) for i in AGENTS]
                next_log_pi.append(sum(log_pi[t][i][u] for i, u in enumerate(chosen)))
                q_bar.append(min(slow_q_jt(c, obs[t], state[t], mask[t], chosen, alpha) for c in networks.target))
        y, weight = q_bar[L], alpha if args.joint_entropy else alpha / len(AGENTS)
        for t in reversed(range(L)):
            future = (1 - args.td_lambda) * q_bar[t + 1] + args.td_lambda * y - weight * next_log_pi[t + 1]
            y = float(episode["reward"][t]) + (0 if episode["terminated"][t] else args.gamma * future)
            q_jt = [slow_q_jt(c, obs[t], state[t], mask[t], actions[t], alpha) for c in networks.critic]
            totals["td"].append(sum((q - y) ** 2 for q in q_jt))
            totals["q_tot"].append(q_jt[0])
            for i in AGENTS:
                q1, q2 = (slow_q(c, obs[t], i) for c in networks.critic)
                pi = log_pi[t][i]
                totals["policy"].append(sum(math.exp(pi[u]) * (alpha * pi[u] - min(q1[u], q2[u])) for u in pi))
            totals["entropy"].append(-sum(math.exp(x) * x for pi in log_pi[t] for x in pi.values()))
    return {name: np.mean(values) for name, values in totals.items()}


@pytest.mark.parametrize("joint_entropy", [False, True])
@pytest.mark.parametrize("alpha", [0.5, 0.05])
def test_losses_equal_a_loop_over_episodes_steps_and_agents(joint_entropy, alpha, no_dice):
    """Two of the episodes are cut off: the recursion of their targets starts from the value of the last view."""
    args, networks = make_args(joint_entropy=joint_entropy), make_networks()
    episodes = random_episodes([3, 9, 5, 5, 1], cut_off=(1, 4))
    loss, logs = script.compute_losses(networks, make_batch(script, episodes, torch.float64)[0], alpha, args)
    expected = slow_losses(networks, episodes, alpha, args)
    assert logs.keys() == expected.keys()
    for name, value in expected.items():
        assert logs[name].item() == pytest.approx(value, rel=1e-9), name
    assert loss.item() == pytest.approx(expected["td"] + expected["policy"], rel=1e-9)


def test_the_next_action_is_drawn_from_the_online_policy_as_it_is(monkeypatch):
    """Not from one with exploration mixed in, whatever epsilon is; available actions only."""
    networks, asked = make_networks(), []
    batch, _ = make_batch(script, random_episodes([6, 4]), torch.float64)
    sample_action = script.sample_action

    def sample(log_policy, mask):
        asked.append((log_policy, mask))
        return sample_action(log_policy, mask)

    monkeypatch.setattr(script, "sample_action", sample)
    script.compute_losses(networks, batch, ALPHA, make_args(epsilon_finish=1.0))
    ((log_policy, mask),) = asked
    assert torch.equal(mask, batch.mask[2:])
    logits, _ = networks.actor(batch.obs, batch.last_action, sizes=batch.sizes)
    expected = torch.softmax(logits.masked_fill(~batch.mask, -math.inf), -1)[2:]
    torch.testing.assert_close(log_policy.exp(), expected)


class Table(torch.nn.Module):
    """An actor whose logits of a batch are free parameters."""

    def __init__(self, like: torch.Tensor):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros_like(like, dtype=torch.float64))

    def forward(self, obs, last_action, sizes):
        return self.logits, None


def test_the_policy_loss_is_least_for_the_softmax_of_the_smaller_values(monkeypatch):
    monkeypatch.setattr(script, "td_lambda_targets", lambda reward, *_: reward)  # nothing that depends on the policy
    networks, args = make_networks(), make_args()
    batch, _ = make_batch(script, random_episodes([2, 3]), torch.float64)
    networks.actor = Table(batch.mask)
    optimizer = torch.optim.LBFGS(networks.actor.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = script.compute_losses(networks, batch, ALPHA, args)[0]
        value.backward()
        return value

    optimizer.step(loss)
    now = batch.now
    (q1, _), (q2, _) = (
        critic(batch.obs[now], batch.state[now], batch.mask[now], batch.last_action[2:], ALPHA)
        for critic in networks.critic
    )
    best = torch.softmax((torch.minimum(q1, q2) / ALPHA).masked_fill(~batch.mask[now], -math.inf), -1)
    policy = script.masked_log_policy(networks.actor.logits, batch.mask)[now].exp()
    assert (q1 > q2).any()
    assert (q2 > q1).any()
    torch.testing.assert_close(policy, best, rtol=0, atol=1e-3)


def gradients(networks, loss, *parts) -> list[torch.Tensor]:
    parameters = [p for part in parts or [networks] for p in part.parameters()]
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def test_each_group_is_moved_by_its_own_loss(no_dice):
    """Three groups, without a parameter in common: the actor by L_pi, each critic by its own error; no target."""
    networks, args = make_networks(), make_args()
    groups = [{id(p) for p in group["params"]} for group in networks.parameter_groups()]
    parts = [networks.actor, *networks.critic]
    assert groups == [{id(p) for p in part.parameters()} for part in parts]
    trained = {id(p) for name, p in networks.named_parameters() if not name.startswith("target.")}
    assert set.union(*groups) == trained
    assert sum(map(len, groups)) == len(trained)
    batch, _ = make_batch(script, random_episodes([4, 7]), torch.float64)

    def look():
        loss = script.compute_losses(networks, batch, ALPHA, args)[0]
        assert all(g.abs().max() == 0 for g in gradients(networks, loss, networks.target))
        return [torch.cat([g.flatten() for g in gradients(networks, loss, part)]) for part in parts]

    before = look()
    assert min(g.abs().max() for g in before) > 1e-3
    batch.reward += 1  # of no interest to the actor
    actor, *critics = look()
    assert torch.equal(actor, before[0])
    assert not any(torch.equal(*pair) for pair in zip(critics, before[1:], strict=True))
    batch.reward -= 1
    torch.nn.init.normal_(networks.critic[1].mixer.key.weight)  # nor is a mixer, nor the other critic's to a critic
    actor, first, second = look()
    assert torch.equal(actor, before[0])
    assert torch.equal(first, before[1])
    assert not torch.equal(second, before[2])
    torch.nn.init.normal_(networks.critic[1].fc_out.weight)  # the actor follows the smaller values of both
    assert not torch.equal(look()[0], before[0])
    assert torch.equal(look()[1], before[1])


def test_agents_without_a_choice_have_no_policy_gradient_and_no_lambda(no_dice):
    networks, args = make_networks(), make_args()
    episodes = random_episodes([4, 7, 2])
    for episode in episodes:  # agent 2 can do nothing but action 0, agent 0 for half of the time
        for i, begin in ((2, 0), (0, len(episode["mask"]) // 2)):
            episode["mask"][begin:, i] = np.arange(5) == 0
            episode["action"][begin:, i] = 0
    batch, _ = make_batch(script, episodes, torch.float64)
    expected = script.compute_losses(networks, batch, ALPHA, args)[1]
    for part in (*networks.critic, *networks.target):
        with torch.no_grad():
            part.mixer.agent.weight[2::3] = 9  # of agent 2, in all heads
    networks.actor = Table(batch.mask)
    torch.nn.init.normal_(networks.actor.logits)
    loss, logs = script.compute_losses(networks, batch, ALPHA, args)
    alone = batch.mask.sum(-1) == 1
    (gradient,) = torch.autograd.grad(loss, networks.actor.logits)
    assert (gradient[alone] == 0).all()
    assert (gradient[batch.now][~alone[batch.now]] != 0).any()
    assert logs["q_tot"].item() == pytest.approx(expected["q_tot"].item(), rel=1e-12)
    networks.actor.logits.data[alone] = torch.randn(int(alone.sum()), 5).double()
    again = script.compute_losses(networks, batch, ALPHA, args)[1]
    torch.testing.assert_close(again, logs)


@pytest.mark.parametrize("nonsense", [1e6, -1e6, math.nan])
def test_logits_and_values_of_unavailable_actions_change_nothing(nonsense, no_dice):
    """Neither losses nor gradients."""
    networks, args, results = make_networks(), make_args(), []
    episodes = random_episodes([4, 7])
    for episode in episodes:
        episode["mask"][..., 0], episode["mask"][..., 1] = False, True
        episode["action"][episode["action"] == 0] = 1
    batch, _ = make_batch(script, episodes, torch.float64)
    for value in (0.5, nonsense):
        for part in (networks.actor, *networks.critic, *networks.target):
            torch.nn.init.constant_(part.fc_out.bias[0], value)
        loss, logs = script.compute_losses(networks, batch, ALPHA, args)
        results.append([logs, gradients(networks, loss)])
    torch.testing.assert_close(*results)


def test_episodes_do_not_touch_each_other(no_dice):
    """The losses of a batch are the means over all steps, of which each episode has as many as alone: no padding."""
    networks, args, lengths = make_networks(), make_args(), [9, 2, 5]
    episodes = random_episodes(lengths, cut_off=(2,))
    together = script.compute_losses(networks, make_batch(script, episodes, torch.float64)[0], ALPHA, args)[1]
    alone = [
        script.compute_losses(networks, make_batch(script, [e], torch.float64)[0], ALPHA, args)[1] for e in episodes
    ]
    for name, value in together.items():
        expected = sum(n * logs[name].item() for n, logs in zip(lengths, alone, strict=True)) / sum(lengths)
        assert value.item() == pytest.approx(expected)


def test_agents_are_interchangeable_but_for_their_ids(no_dice):
    """Permute them, and with them all weights of their ids, gates and actions: the losses are the same."""
    networks, args, order = make_networks(), make_args(), torch.tensor([2, 0, 1])
    batch, _ = make_batch(script, random_episodes([4, 7]), torch.float64)
    expected = script.compute_losses(networks, batch, ALPHA, args)[1]
    with torch.no_grad():
        weight = networks.actor.fc_in.weight
        weight[:, -3:] = weight[:, -3:][:, order].clone()
        for part in (*networks.critic, *networks.target):
            part.fc1.weight[:, -3:] = part.fc1.weight[:, -3:][:, order].clone()
            actions = part.mixer.action.weight[:, 6:].unflatten(1, (3, 5))
            part.mixer.action.weight[:, 6:] = actions[:, order].flatten(1).clone()
            for layer in (part.mixer.agent, part.mixer.action):
                for tensor in (layer.weight, layer.bias):
                    tensor.copy_(tensor.unflatten(0, (4, 3))[:, order].flatten(0, 1).clone())
    for name in ("obs", "mask", "last_action"):
        setattr(batch, name, getattr(batch, name)[:, order])
    torch.testing.assert_close(script.compute_losses(networks, batch, ALPHA, args)[1], expected)


# --- Schedules, acting, one update ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("step", "alpha", "epsilon"),
    [(0, 0.5, 1), (25_000, 0.375, 0.525), (50_000, 0.25, 0.05), (90_000, 0.05, 0.05), (10**7, 0.05, 0.05)],
)
def test_alpha_and_epsilon_fall_linearly(step, alpha, epsilon):
    assert script.alpha_at(step, script.Args()) == pytest.approx(alpha)
    assert script.alpha_at(step, script.Args()) == pytest.approx(max(0.05, 0.5 - step / 200_000))  # as released
    assert script.epsilon_at(step, script.Args()) == pytest.approx(epsilon)


@pytest.mark.parametrize("epsilon", [0.0, 0.4, 1.0])
def test_acting_draws_from_the_policy_or_with_one_coin_from_all_available_actions(epsilon):
    """Independently for each agent, which is told its last action and keeps a memory."""
    E, networks = 20_000, make_networks(torch.float32)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 1, 0, 0]], dtype=torch.bool)
    view = {"obs": torch.randn(1, 3, 4), "state": torch.full((1, 6), math.nan), "mask": mask.unsqueeze(0)}
    view |= {"last_action": torch.tensor([[-1, 3, 2]])}
    hidden = torch.randn(1, 3, 64)
    logits, expected = networks.actor(view["obs"], view["last_action"], hidden)
    many = {name: value.expand(E, *value.shape[1:]) for name, value in view.items()}
    action, after = script.act(networks, many, hidden.expand(E, 3, 64), epsilon)
    action = torch.from_numpy(action)
    torch.testing.assert_close(after, expected.expand(E, 3, 64))
    policy = torch.softmax(logits[0].masked_fill(~mask, -math.inf), -1)
    policy = (1 - epsilon) * policy + epsilon * mask / mask.sum(-1, keepdim=True)
    frequency = torch.stack([(action == u).float().mean(0) for u in ACTIONS], -1)
    assert (frequency - policy).abs().max() < 4.5 * math.sqrt(0.25 / E)
    assert (frequency[~mask] == 0).all()
    chosen = (action[:, :2] == policy[:2].argmax(-1)).float()
    assert torch.corrcoef(chosen.T)[0, 1].abs() < 4.5 / math.sqrt(E)
    assert not after.requires_grad


def test_an_update_is_a_step_of_rmsprop_in_three_groups_clipped_each_by_itself(no_dice):
    args, networks = make_args(max_grad_norm=0.01, tau=0.25), make_networks()
    before = copy.deepcopy(networks)
    batch, _ = make_batch(script, random_episodes([4, 7]), torch.float64)
    optimizer = torch.optim.RMSprop(networks.parameter_groups(), lr=5e-4, alpha=0.99, eps=1e-5)
    script.update(networks, optimizer, batch, ALPHA, args)
    loss, _ = script.compute_losses(before, batch, ALPHA, args)
    for ours, theirs in zip([networks.actor, *networks.critic], [before.actor, *before.critic], strict=True):
        found = gradients(before, loss, theirs)
        norm = torch.cat([g.flatten() for g in found]).norm()
        assert norm > 0.01
        for new, old, g in zip(ours.parameters(), theirs.parameters(), found, strict=True):
            g = g * 0.01 / norm
            step = 5e-4 * g / ((0.01 * g.square()).sqrt() + 1e-5)
            torch.testing.assert_close(new, old - step, rtol=1e-4, atol=1e-7)
    trios = zip(networks.target.parameters(), before.target.parameters(), networks.critic.parameters(), strict=True)
    for moved, old, online in trios:
        torch.testing.assert_close(moved, 0.25 * online + 0.75 * old)
    script.move_target(networks, 1.0)
    torch.testing.assert_close(networks.target.state_dict(), networks.critic.state_dict(), rtol=0, atol=0)


def test_two_critics_begin_apart_and_their_targets_as_copies():
    networks = script.Networks(SIZES, make_args())
    ours, theirs = (dict(network.named_parameters()) for network in networks.critic)
    assert not any(torch.equal(ours[name], theirs[name]) for name in ours)
    for online, target in zip(networks.critic.parameters(), networks.target.parameters(), strict=True):
        assert torch.equal(online, target)
        assert online is not target


def test_networks_have_the_sizes_of_table_10():
    """With 3 agents, 5 actions, observations of 4 numbers and a state of 6; 4 heads; 32 units in V."""
    networks = script.Networks(SIZES, make_args())
    sizes = {name: tuple(p.shape) for name, p in networks.critic[0].named_parameters() if "weight" in name}
    assert sizes == {
        "fc1.weight": (64, 7), "fc2.weight": (64, 64), "fc_out.weight": (5, 64), "mixer.key.weight": (4, 6),
        "mixer.agent.weight": (12, 6), "mixer.action.weight": (12, 21), "mixer.v.0.weight": (32, 6),
        "mixer.v.2.weight": (1, 32),
    }  # fmt: skip


def test_nothing_is_computed_on_another_device(monkeypatch):
    """Acting and updates on the meta device, which as a GPU does refuses to compute with a CPU's tensors."""
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)  # of the actions, which alone leave the device
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: tensor)
    device, args = torch.device("meta"), make_args(tau=0.5)
    networks = script.Networks(SIZES, args).to(device)
    batch, _ = make_batch(script, random_episodes([4, 7]), device=device)
    logs = script.update(networks, torch.optim.RMSprop(networks.parameter_groups()), batch, ALPHA, args)
    row = {name: getattr(batch, name)[:2] for name in ("obs", "state", "mask", "last_action")}
    action, hidden = script.act(networks, row, torch.zeros(2, 3, 64, device=device), 0.5)
    assert {x.device for x in (action, hidden, *logs.values())} == {device}


# --- Runs -------------------------------------------------------------------------------------------------------------
E, LENGTHS, EPISODES = test_training.E, test_training.LENGTHS, test_training.EPISODES


def record(run_dir, **changes) -> list[test_training.Event]:
    """What happened in the clockwork, whose battles have 2, 3 and 4 steps, those of 4 cut off."""
    options = dict(batch_size=4, burn_in=6, alpha_start=0.9, alpha_finish=0.2, alpha_anneal_time=200)
    return test_training.record(script, run_dir, **(options | changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    return script, run_dir, record(run_dir, episodes_per_update=1)


@pytest.mark.parametrize(
    "check",
    [
        test_training.test_agents_forget_exactly_when_their_episode_ends,
        test_training.test_exploration_follows_its_schedule,
        test_training.test_stored_episodes_are_those_that_were_played,
        test_training.test_tests_and_checkpoints_come_at_the_first_step_after_their_interval,
    ],
)
def test_runs_do_what_those_of_the_other_scripts_do(check, run):
    check(run)


def test_an_update_follows_every_episode_once_enough_are_stored(run):
    expected = []
    for n in range(1, EPISODES + 1):
        expected += ["add"] + ["update"] * (n >= 6) + ["move_target"] * (n % 7 == 0)
    assert [event.name for event in run[2] if event.name in ("add", "update", "move_target")] == expected


def test_an_update_has_the_alpha_of_its_step_and_a_batch_of_stored_episodes(run):
    """The step is the one that ended the episode; any episode stored so far may be drawn, that one included."""
    stored, newest = [], 0
    for event in run[2]:
        if event.name == "add":
            stored.append(event.arguments[0]["state"])
        if event.name == "update":
            _, _, batch, alpha, _ = event.arguments
            assert alpha == pytest.approx(max(0.2, 0.9 - 0.7 * event.step / 200))
            assert batch.sizes[0] == 4
            firsts = {float(state[0, 0]) for state in stored}
            assert set(batch.state[:4, 0].tolist()) <= firsts
            newest += float(stored[-1][0, 0]) in batch.state[:4, 0].tolist()
    assert newest > 0


def test_tensorboard_gets_both_schedules_and_the_losses(run):
    _, run_dir, events = run
    log = event_log(run_dir)
    updates = [event for event in events if event.name == "update"][24::25]
    for name in ("td", "policy", "q_tot", "entropy"):
        logged = [(scalar.step, scalar.value) for scalar in log.Scalars(f"losses/{name}")]
        assert logged == [(update.step, pytest.approx(update.result[name].item())) for update in updates]
    tests = [event.step for event in events if event.name == "evaluate"]
    for name, schedule in (("alpha", script.alpha_at), ("epsilon", script.epsilon_at)):
        expected = [pytest.approx(schedule(step, script.Args(**config(run_dir)))) for step in tests]
        assert [scalar.value for scalar in log.Scalars(f"charts/{name}")] == expected


def config(run_dir) -> dict:
    return json.loads((run_dir / "config.json").read_text())["args"]


def test_the_actor_is_tested_and_written_and_everything_is_saved(run):
    _, run_dir, events = run
    saved = checkpoint_of(run_dir)
    actor = {name.removeprefix("actor."): x for name, x in saved.networks.items() if name.startswith("actor.")}
    tested = [event for event in events if event.name == "evaluate"][-1].result["agent"]
    assert tested.keys() == actor.keys() == saved.policy["agent"].keys()
    agent = script.Agent(*(saved.policy[name] for name in script.SIZES))
    agent.load_state_dict(saved.policy["agent"])
    for name, value in agent.state_dict().items():
        assert torch.equal(value, actor[name])
        assert torch.equal(value, tested[name])
    assert {name.split(".")[0] for name in saved.networks} == {"actor", "critic", "target"}
    assert saved.counts == (360, EPISODES, EPISODES - 5)
    assert len(saved.optimizer["param_groups"]) == 3
    for group in saved.optimizer["param_groups"]:
        assert (group["lr"], group["alpha"], group["eps"], group["momentum"]) == (2e-3, 0.99, 1e-5, 0)
        assert not group["centered"]
    assert len(saved.optimizer["state"]) == sum("target." not in name for name in saved.networks)
    assert {state["step"].item() for state in saved.optimizer["state"].values()} == {EPISODES - 5}


def test_a_resumed_run_goes_on_to_the_last_bit(tmp_path):
    options = dict(buffer_size=20, tau=0.9, checkpoint_interval=10**6)
    whole, parts = record(tmp_path / "whole", total_timesteps=180, **options), []
    for steps in (75, 135, 180):
        folder = {"resume": str(tmp_path / "parts")} if parts else {}
        parts += record(tmp_path / "parts", total_timesteps=steps, **options, **folder)
    pairs = zip(*([event for event in events if event.name == "act"] for events in (parts, whole)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(acting_on(ours.arguments), acting_on(theirs.arguments), rtol=0, atol=0)
    ours, theirs = (checkpoint_of(tmp_path / name) for name in ("parts", "whole"))
    assert ours.counts == theirs.counts
    assert ours.lengths == theirs.lengths
    for name in ("networks", "optimizer", "replay"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=0)


def test_battles_are_learnt_saved_resumed_and_their_policy_evaluated(tmp_path, capsys):
    """On the simulator, by the command line; a resumed run equals the uninterrupted one there, too."""
    options = ["--map", "terran_3_vs_2", "--backend", "sim", "--batch-size", 4, "--burn-in", 6, "--buffer-size", 24]
    options += ["--eval-interval", 300, "--eval-episodes", 4]
    assert run_main(script, capsys, *options, "--total-timesteps", 600, "--run-dir", tmp_path / "whole")[0] == 0
    assert run_main(script, capsys, *options, "--total-timesteps", 300, "--run-dir", tmp_path / "parts")[0] == 0
    assert run_main(script, capsys, "--resume", tmp_path / "parts", "--total-timesteps", 600)[0] == 0
    assert read_metrics(tmp_path / "parts") == read_metrics(tmp_path / "whole")
    ours, theirs = (checkpoint_of(tmp_path / name) for name in ("parts", "whole"))
    torch.testing.assert_close(ours.networks, theirs.networks, rtol=0, atol=0)
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert (summary["algorithm"], summary["updates"]) == ("fop_smacv2", summary["episodes"] - 5)
    code, output = run_main(script, capsys, "--evaluate", tmp_path / "whole", "--eval-episodes", 8)
    assert code == 0
    assert "in 8 battles" in output


def test_a_run_too_short_to_learn_says_so(tmp_path, capsys):
    test_training.train(script, test_training.make_args(script, run_dir=str(tmp_path), burn_in=200))
    assert f"the first update waits for 200 battles, and {EPISODES} were played" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(batch_size=101), "--burn-in 100 is not between --batch-size 101 and --buffer-size 5000"),
        (dict(buffer_size=99), "--burn-in 100 is not between --batch-size 32 and --buffer-size 99"),
        (dict(burn_in=0), "--burn-in is 0"),
        (dict(alpha_finish=0.0), "--alpha-finish is 0"),
        (dict(alpha_start=math.nan), "--alpha-start is nan"),
        (dict(alpha_anneal_time=0), "--alpha-anneal-time is 0"),
        (dict(epsilon_start=1.5), "--epsilon-start is 1.5"),
        (dict(td_lambda=-0.1), "--td-lambda is -0.1"),
        *IMPOSSIBLE,
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(changes, words, tmp_path, monkeypatch):
    refused_before_a_file_is_made(script, changes, words, tmp_path, monkeypatch)


def test_other_files_and_other_options_are_refused(run):
    _, run_dir, _ = run
    again = config(run_dir) | {"run_dir": None, "resume": str(run_dir)}
    with pytest.raises(script.InputError, match=r"joint_entropy is True, but was False"):
        test_training.train(script, script.Args(**again | {"joint_entropy": True}))
    with pytest.raises(script.InputError, match="has made its 360 steps"):
        test_training.train(script, script.Args(**again))
    with pytest.raises(script.InputError, match="already holds a run"):
        test_training.train(script, script.Args(**config(run_dir)))
    with pytest.raises(qmix_smacv2.InputError, match="fop_smacv2 checkpoint"):
        qmix_smacv2.load(str(run_dir), "checkpoint")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "td_lambda_targets", lambda reward, *rest: reward + math.nan)
    args = test_training.make_args(script, run_dir=str(tmp_path), batch_size=4, burn_in=6, episodes_per_update=1)
    with pytest.raises(FloatingPointError, match="not finite at step 18"):
        test_training.train(script, args)


def test_options_and_defaults():
    """Table 10, and what it leaves to FOP's code; all others are QMIX's."""
    options = {field.name: field.default for field in dataclasses.fields(script.Args)}
    expected = dict(epsilon_start=1, epsilon_finish=0.05, epsilon_anneal_time=50_000, buffer_size=5000, td_lambda=0.4)
    expected |= dict(target_update_interval=200, learning_rate=5e-4, burn_in=100, batch_size=32, max_grad_norm=10)
    expected |= dict(episodes_per_update=1, gamma=0.99, alpha_start=0.5, alpha_finish=0.05, alpha_anneal_time=90_000)
    expected |= dict(joint_entropy=False, tau=1)
    assert {name: options[name] for name in expected} == expected
    shared = {field.name: (field.type, field.default) for field in dataclasses.fields(qmix_smacv2.Args)}
    own = {"exp_name", "episodes_per_update", "learning_rate", "batch_size", "epsilon_anneal_time"}
    for field in dataclasses.fields(script.Args):
        if field.name in shared and field.name not in own:
            assert (field.type, field.default) == shared[field.name]
    assert shared.keys() - options.keys() == {"mixer", "td_weight"}


# --- Learning ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_agents_learn_to_agree(seed, tmp_path, monkeypatch):
    """The example of docs/your_environment.md. Measured with six seeds, all ten steps of all 128 test episodes are
    right in one of them after 100 steps, in five after 200, in all after 300 to 600; untrained agents win none."""
    example = {}
    code = python_example("docs/your_environment.md").partition("script.make_env")[0]
    exec(code, example)
    monkeypatch.setattr(script, "make_env", lambda args, num_envs, seed: example["Agree"](num_envs, seed))
    options = dict(alpha_start=0.1, alpha_finish=0.1, learning_rate=1e-3, epsilon_anneal_time=1500, burn_in=32)
    options |= dict(episodes_per_update=2, target_update_interval=50, eval_interval=1000, eval_episodes=128)
    result = script.train(script.Args(**options, seed=seed, total_timesteps=400, run_dir=str(tmp_path)))
    assert result["win_rate"] > 0.95
    assert read_metrics(tmp_path)[0]["win_rate"] == "0.0"
