"""Networks, policy, replay, targets, losses and update of all four scripts, against slow explicit versions."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from common import (
    MPE,
    PLAIN,
    SIZES,
    SMACV2,
    SOFT,
    Replay,
    act,
    batch_episodes,
    compute_losses,
    log_policy,
    make_args,
    make_batch,
    make_networks,
    move_target,
    new_optimizer,
    no_dice,
    over,
    parts,
    random_episode,
    random_episodes,
    step_agent,
    td_targets,
    unroll_agent,
    update,
    walk_agent,
)

import fop_smacv2
import mappo_smacv2

GAMMA, LAMBDA, ALPHA = 0.97, 0.6, 0.5
AGENTS = range(SIZES.num_agents)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def every(script_and_flags):
    return pytest.mark.parametrize(
        ("script", "flags"), script_and_flags, ids=lambda x: getattr(x, "__name__", None) or str(x)
    )


# --- Targets and losses ---


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


@over(SMACV2 + MPE)
@pytest.mark.parametrize("ended", [(1, 1, 1, 1), (0, 0, 0, 0), (1, 0, 1, 0)], ids=["terminated", "cut off", "mixed"])
def test_targets_equal_the_explicit_sum_of_k_step_returns(script, ended):
    columns = []
    for n, end in zip([9, 6, 4, 1], ended, strict=True):
        reward, next_q, next_log_policy = torch.randn(3, n, dtype=torch.float64)
        if end:  # value and entropy of the state after the end must not matter
            next_q[-1] = next_log_policy[-1] = math.nan
        next_log_policy *= script in SOFT
        columns.append(dict(reward=reward, next_q=next_q, next_log_policy=next_log_policy))
        columns[-1]["terminated"] = torch.arange(n) == (n - 1 if end else n)
    for column, y in zip(columns, td_targets(script, columns, GAMMA, LAMBDA, ALPHA), strict=True):
        expected = explicit_targets(**{name: values.nan_to_num().tolist() for name, values in column.items()})
        torch.testing.assert_close(y.tolist(), expected, rtol=0, atol=1e-12)


def explicit_losses(script, networks, episodes, args) -> dict[str, float]:
    """L_Q, L_pi and what else is logged, cell by cell, with the most probable u'."""
    net = parts(networks)

    def q_i(which, values, s):
        return net[which + "g"](values, s) if "g" in net else values

    def mix(which, q, s):
        """Q_tot of these values of all agents."""
        return (net[which + "mixer"](torch.stack(q)[None], s) if "mixer" in net else sum(q)).item()

    squares_q, squares_pi, entropies, q_tots = [], [], [], []
    for episode in episodes:
        L, action, mask = len(episode["reward"]), episode["action"], torch.tensor(episode["mask"])
        state = torch.tensor(episode["state"], dtype=torch.float64)
        online, target = walk_agent(net["agent"], episode), walk_agent(net["target agent"], episode)
        next_q, next_log_policy, q_tot, f_sum = [], [], [], []
        for t in range(L):
            s, s_next = state[t : t + 1], state[t + 1 : t + 2]
            q = q_i("", online[t][None], s)
            q_tot.append(mix("", [q[0, i, action[t, i]] for i in AGENTS], s))
            f_sum.append(sum((net["f"](q, s) if "f" in net else q)[0, i, action[t, i]].item() for i in AGENTS))
            allowed = [mask[t + 1, i].nonzero()[:, 0].tolist() for i in AGENTS]
            logits = online[t + 1][None]
            if script in SOFT:
                logits = q_i("", logits, s_next)
                logits = net["f"](logits, s_next) if "f" in net else logits
                policy = [torch.softmax(logits[0, i][allowed[i]] / args.alpha, 0) for i in AGENTS]
                entropies.append(sum(-(p * p.log()).sum().item() for p in policy))
                next_log_policy.append(sum(p.max().log().item() for p in policy))
            best = [max(allowed[i], key=lambda a: logits[0, i, a].item()) for i in AGENTS]
            bar = q_i("target ", target[t + 1][None], s_next)
            next_q.append(mix("target ", [bar[0, i, best[i]] for i in AGENTS], s_next))
        reward, terminated = episode["reward"].tolist(), episode["terminated"]
        y = explicit_targets(reward, terminated, next_q, next_log_policy or [0.0] * L)
        squares_q += [0.5 * (args.td_weight if q > t else 1) * (q - t) ** 2 for q, t in zip(q_tot, y, strict=True)]
        squares_pi += [0.5 * (a - b) ** 2 for a, b in zip(f_sum, q_tot, strict=True)]
        q_tots += q_tot
    expected = {"td": np.mean(squares_q), "q_tot": np.mean(q_tots)}
    return expected | ({"policy": np.mean(squares_pi), "entropy": np.mean(entropies)} if script in SOFT else {})


ABLATIONS = [{"use_g": False}, {"use_f": False}, {"use_g": False, "use_f": False}]
VARIANTS = [{}, {"td_weight": 0.1}, {"mixer": "vdn"}]


@every([*itertools.product(SOFT, VARIANTS + ABLATIONS), *itertools.product(PLAIN, VARIANTS)])
def test_losses_equal_a_loop_over_episodes_and_steps(script, flags, monkeypatch):
    """Order of time, alignment, masks, gather, means: everything, against cell-by-cell Python."""
    no_dice(script, monkeypatch)
    alpha = {"alpha": ALPHA} if script in SOFT else {}
    args = make_args(script, gamma=GAMMA, td_lambda=LAMBDA, **alpha, **flags)
    networks = make_networks(script, args, torch.float64)
    episodes = random_episodes([3, 9, 5, 5, 14, 1], cut_off=(1, 4))
    loss, logs = compute_losses(script, networks, make_batch(script, episodes, torch.float64)[0], args)
    expected = explicit_losses(script, networks, episodes, args)
    assert logs.keys() == expected.keys()
    for name, value in expected.items():  # the policy is float32 from the logits on
        assert logs[name].item() == pytest.approx(value, rel=1e-6), name
    assert loss.item() == pytest.approx(expected["td"] + expected.get("policy", 0), rel=1e-6)


@over(SOFT)
def test_the_next_action_is_drawn_from_the_soft_policy(script, monkeypatch):
    """Once, of the available actions at t + 1; elsewhere in these tests it is the most probable one."""
    args = make_args(script, alpha=ALPHA)
    networks, asked, sample_action = make_networks(script, args, torch.float64), [], script.sample_action
    batch, _ = make_batch(script, random_episodes([6, 4]), torch.float64)
    monkeypatch.setattr(script, "sample_action", lambda *inputs: asked.append(inputs) or sample_action(*inputs))
    compute_losses(script, networks, batch, args)
    ((log_policy, mask),) = asked
    assert torch.equal(mask, batch.mask[2:])
    stage1, _ = networks.critic.agent(batch.obs, batch.last_action, sizes=batch.sizes)
    values = networks.f(networks.critic.g(stage1, batch.state), batch.state) / ALPHA
    expected = torch.softmax(values.masked_fill(~batch.mask, -math.inf), -1)[2:]
    torch.testing.assert_close(log_policy.exp(), expected.to(log_policy.dtype))


@over(SOFT)
def test_gradients_stop_where_the_paper_says(script):
    """L_pi moves f alone: theta's gradient does not depend on f, nor f's on the rewards; the target has none.

    With one available action there is one policy, so that f does not enter the target through the entropy.
    """
    networks = make_networks(script, args := make_args(script))
    net = parts(networks)
    episodes = random_episodes([4, 7], choice=False)

    def gradients(*names):
        networks.zero_grad()
        compute_losses(script, networks, make_batch(script, episodes)[0], args)[0].backward()
        assert all(p.grad is None for name in net if "target" in name for p in net[name].parameters())
        return torch.cat([p.grad.flatten() for name in names for p in net[name].parameters()])

    theta, phi = gradients("agent", "g", "mixer"), gradients("f")
    assert theta.abs().sum() > 0
    assert phi.abs().sum() > 0
    for episode in episodes:
        episode["reward"] += 1
    assert torch.equal(gradients("f"), phi)
    for episode in episodes:
        episode["reward"] -= 1
    random_parameters(net["f"], 0.5)
    torch.testing.assert_close(gradients("agent", "g", "mixer"), theta)


@every(itertools.product(SOFT, [{}, *ABLATIONS]))
def test_g_and_f_are_there_and_used_exactly_where_they_are_asked_for(script, flags):
    """Each is trained, and other parameters of it make another policy, other losses and, of g's copy, other targets."""
    networks = make_networks(script, args := make_args(script, alpha=1.0, **flags))
    net, optimizer = parts(networks), new_optimizer(script, networks, lr=1e-3)
    asked = {name for name in ("f", "g", "target g") if flags.get(f"use_{name[-1]}", True)}
    assert net.keys() & {"f", "g", "target g"} == asked
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for name in net if "target" not in name for p in net[name].parameters()}
    assert trained == {id(p) for name, p in networks.named_parameters() if not name.startswith("target.")}
    batch, _ = make_batch(script, random_episodes([4, 7]))
    values, state = torch.randn(8, 3, 5), torch.randn(8, 6)

    def look():
        torch.manual_seed(0)
        loss, logs = compute_losses(script, networks, batch, args)
        policy = log_policy(script, networks, values, state, torch.ones(8, 3, 5, dtype=torch.bool), 1.0)
        return {"policy": policy.detach(), "loss": loss.item(), "q_tot": logs["q_tot"].item()}

    for name in sorted(asked):
        before = look()
        random_parameters(net[name], 0.5)
        after = look()
        assert torch.equal(after["policy"], before["policy"]) == (name == "target g")
        assert after["loss"] != before["loss"]
        assert (after["q_tot"] != before["q_tot"]) == (name == "g")


# --- Networks and policy ---


def random_parameters(network, scale):
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    return network


@over(SMACV2 + MPE)
@pytest.mark.parametrize("scale", [0.03, 0.3, 3.0])
def test_g_and_f_keep_the_order_of_actions_and_the_mixer_is_monotonic(script, scale):
    N, S, A, R = 4, 7, 9, 200
    state = 5 * torch.randn(R, S).double()
    if script in SOFT:
        x = (10 * torch.randn(R, N, A)).double().sort(-1).values
        g = random_parameters(script.TransformG(S, N).double(), scale)
        f = random_parameters(script.TransformF(S, N).double(), scale)
        assert (g(x, state).diff(dim=-1) >= x.diff(dim=-1) * (1 - 1e-9)).all()  # the residual's slope is 1: strict
        assert (f(x, state).diff(dim=-1) >= 0).all()
    mixer = random_parameters(script.Mixer(S, N).double(), scale)
    q = torch.randn(R, N).double()
    for i in range(N):
        more = q.clone()
        more[:, i] += 3 * torch.rand(R)
        assert (mixer(more, state) >= mixer(q, state) - 1e-9).all()


def explicit_layers(network, state) -> dict[str, list[float]]:
    """What the hypernetworks generate from one state: linear, ReLU, linear; of b1 one linear layer."""
    generated = {}
    for name, part in network.named_children():
        x, layers = state, [module for module in part.modules() if isinstance(module, torch.nn.Linear)]
        for i, layer in enumerate(layers):
            x = layer.weight @ (x.clamp(min=0) if i else x) + layer.bias
        generated[name] = x.abs().tolist() if name.startswith("w") else x.tolist()
    return generated


def elu(x: float) -> float:
    return x if x > 0 else math.exp(x) - 1


@over(SMACV2 + MPE)
def test_mixer_g_and_f_are_equations_6_and_8_and_appendix_g(script):
    """Number by number, with 2 agents."""
    N, S, R, K, embed = 2, 5, 4, 3, 32
    q, x, state = torch.randn(R, N).double(), torch.randn(R, N, K).double(), torch.randn(R, S).double()
    mixer = script.Mixer(S, N).double()
    for r in range(R):
        w = explicit_layers(mixer, state[r])
        hidden = [
            elu(sum(q[r, i].item() * w["w1"][i * embed + h] for i in range(N)) + w["b1"][h]) for h in range(embed)
        ]
        expected = sum(hidden[h] * w["w2"][h] for h in range(embed)) + w["b2"][0]
        assert mixer(q, state)[r].item() == pytest.approx(expected)
    if script in PLAIN:
        return
    g, f = script.TransformG(S, N).double(), script.TransformF(S, N).double()
    for r, i, k in itertools.product(range(R), range(N), range(K)):
        value, w, line = x[r, i, k].item(), explicit_layers(g, state[r]), explicit_layers(f, state[r])
        places = range(i * embed, (i + 1) * embed)
        two_layers = sum(w["w2"][p] * elu(w["w1"][p] * value + w["b1"][p]) for p in places)
        assert g(x, state)[r, i, k].item() == pytest.approx(value + two_layers + w["b2"][i])
        assert f(x, state)[r, i, k].item() == pytest.approx(line["w"][i] * value + line["b"][i])


@over(SMACV2 + MPE)
def test_vdn_is_the_sum(script):
    q, networks = torch.randn(5, 3), make_networks(script, make_args(script, mixer="vdn"))
    for critic in (networks.critic, networks.target):
        torch.testing.assert_close(critic.mixer(q, torch.randn(5, 2)), q[:, 0] + q[:, 1] + q[:, 2])


@over(SMACV2 + MPE)
def test_unrolled_episodes_equal_stepping_cell_by_cell(script):
    agent = parts(make_networks(script, make_args(script), torch.float64))["agent"]
    batch, episodes = make_batch(script, random_episodes([20, 1, 7, 8, 8, 13]), torch.float64)
    for episode, values in zip(episodes, unroll_agent(agent, batch), strict=True):
        torch.testing.assert_close(torch.stack(walk_agent(agent, episode)), values, rtol=0, atol=1e-12)


@over(SMACV2 + MPE)
def test_agents_see_observation_last_action_and_who_they_are(script):
    """Linear, ReLU, GRU, linear: number by number from the input (observation, last action, agent), zeros for none."""
    agent = parts(make_networks(script, make_args(script), torch.float64))["agent"]
    obs, last_action = torch.randn(2, 3, 4).double(), torch.tensor([[-1, 0, 4], [2, -1, 3]])
    hidden = torch.randn(2, 3, 64).double()
    values, new_hidden = step_agent(agent, obs, last_action, hidden)
    cell = torch.nn.GRUCell(64, 64).double()
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in agent.gru.state_dict().items()})
    for e, i in itertools.product(range(2), range(3)):
        action = [float(a == last_action[e, i]) for a in range(5)]
        x = torch.tensor([*obs[e, i].tolist(), *action, *[float(j == i) for j in range(3)]]).double()
        expected = cell(torch.relu(agent.fc_in(x)), hidden[e, i])
        torch.testing.assert_close(new_hidden[e, i], expected)
        torch.testing.assert_close(values[e, i], agent.fc_out(expected))


@over(SMACV2 + MPE)
@pytest.mark.parametrize("lengths", [[5, 5, 5, 3, 0], [5] * 5], ids=["packed", "equal lengths"])
def test_unrolling_step_by_step_equals_the_gru_of_a_gpu(script, lengths, monkeypatch):
    """Values and gradients; a GPU's branch is run on the CPU, where nn.GRU takes packed sequences, too."""
    agent = parts(make_networks(script, make_args(script), torch.float64))["agent"]
    batch, _ = make_batch(script, random_episodes([n + 1 for n in lengths]), torch.float64)
    results, calls = [], []
    agent.gru.register_forward_hook(lambda *_: calls.append("nn.GRU"))
    for is_cuda in (False, True):
        monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda)
        values, hidden = agent(batch.obs, batch.last_action, sizes=batch.sizes)
        assert len(calls) == is_cuda
        loss = values.square().sum() + hidden.sum()
        results.append([values, hidden, *torch.autograd.grad(loss, list(agent.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@over(SOFT)
def test_the_policy_in_pieces_is_the_policy(script, monkeypatch):
    """Of a batch of more rows than a piece has: the same entropy and targets as of all at once, or row by row."""
    no_dice(script, monkeypatch)
    networks, split, sizes = make_networks(script, args := make_args(script)), torch.Tensor.split, []
    batch, _ = make_batch(script, random_episodes([150] * 10 + [7]))

    def losses(size):
        def split_rows(rows, size_or_sizes):
            sizes.append(size_or_sizes)
            return split(rows, size if isinstance(size_or_sizes, int) else size_or_sizes)

        monkeypatch.setattr(torch.Tensor, "split", split_rows)
        return compute_losses(script, networks, batch, args)[1]

    whole = losses(10**6)
    assert max(size for size in sizes if isinstance(size, int)) < 1507
    for size in (1024, 7):
        torch.testing.assert_close(losses(size), whole)


@over(SOFT)
@pytest.mark.parametrize("alpha", [10.0, 0.005, 1e-6])
def test_policy_never_takes_an_unavailable_action(script, alpha):
    mask = torch.rand(500, 5, 11) < 0.3
    mask[..., 4] |= ~mask.any(-1)
    policy = script.masked_log_policy(30 * torch.randn(mask.shape) / alpha, mask)
    assert (policy.exp().sum(-1) - 1).abs().max() < 1e-4
    assert (policy[~mask] == -torch.inf).all()
    assert policy[mask].isfinite().all()
    for _ in range(20):
        assert mask.gather(-1, script.sample_action(policy, mask).unsqueeze(-1)).all()


@over(SMACV2 + MPE)
def test_greedy_action_is_the_best_available_one(script):
    mask = torch.rand(200, 5, 11) < 0.3
    mask[..., 4] |= ~mask.any(-1)
    values = torch.randn(mask.shape)
    best = [max(m.nonzero()[:, 0].tolist(), key=lambda a: v[a].item()) for v, m in
            zip(values.flatten(0, 1), mask.flatten(0, 1), strict=True)]  # fmt: skip
    assert script.greedy_action(values, mask).flatten().tolist() == best


@pytest.mark.parametrize("script", [*SOFT, fop_smacv2, mappo_smacv2], ids=lambda script: script.__name__)
def test_samples_follow_the_policy(script):
    mask = torch.tensor([True, True, False, True])
    policy = script.masked_log_policy(torch.tensor([0.0, 1.0, 9.0, -1.0]), mask)
    n = 40_000
    actions = script.sample_action(policy.expand(n, 4), mask.expand(n, 4))
    frequency = torch.bincount(actions, minlength=4) / n
    assert (frequency - policy.exp()).abs().max() < 4 * math.sqrt(0.25 / n)


@over(SOFT)
def test_an_unavailable_action_is_not_taken_even_if_a_random_number_is_0(script, monkeypatch):
    """Its logarithm is then infinite, and -inf + inf not a number."""
    monkeypatch.setattr(torch.Tensor, "exponential_", torch.Tensor.zero_)
    mask = torch.tensor([False, False, True, False])
    policy = script.masked_log_policy(torch.zeros(7, 4), mask)
    assert (script.sample_action(policy, mask.expand(7, 4)) == 2).all()


@over(SOFT)
def test_a_dead_agent_adds_no_entropy(script):
    policy = script.masked_log_policy(torch.randn(3, 6), torch.tensor([True] + 5 * [False]))
    action = script.sample_action(policy, torch.tensor([True] + 5 * [False]).expand(3, 6))
    assert (policy.gather(-1, action.unsqueeze(-1)) == 0).all()


@over(PLAIN)
def test_epsilon_greedy_flips_a_coin_per_agent_over_available_actions(script):
    n, N = 20_000, 3
    values = torch.tensor([5.0, 1.0, 2.0, 0.0]).expand(n, N, 4)
    mask = torch.tensor([False, True, True, True]).expand(n, N, 4)  # the best available action is 2
    action = script.epsilon_greedy(values, mask, 0.6)
    frequency = torch.stack([(action == a).float().mean(0) for a in range(4)])  # (A, N)
    expected = torch.tensor([0.0, 0.2, 0.4 + 0.2, 0.2])[:, None].expand(4, N)
    assert (frequency - expected).abs().max() < 4 * math.sqrt(0.25 / n)
    explored = (action != 2).float()
    correlation = torch.corrcoef(explored.T)[~torch.eye(N, dtype=torch.bool)]
    assert correlation.abs().max() < 4 / math.sqrt(n)  # the agents' coins are independent
    assert (script.epsilon_greedy(values, mask, 0.0) == 2).all()


@over(SMACV2 + MPE)
def test_acting_is_by_the_online_networks_and_the_mask(script, monkeypatch):
    """The most probable action of softmax(f(g(values)) / alpha), or the greedy one; the target's would be another."""
    no_dice(script, monkeypatch)
    E = 50
    networks = make_networks(script, make_args(script))
    net = parts(networks)
    for part in net.values():
        random_parameters(part, 0.5)
    mask = torch.rand(E, 3, 5) < 0.6
    mask[..., 2] |= ~mask.any(-1)
    view = {"obs": torch.randn(E, 3, 4), "state": torch.randn(E, 6), "mask": mask}
    last_action, hidden = torch.randint(-1, 5, (E, 3)), torch.randn(E, 3, 64)
    action, new_hidden = act(script, networks, view, last_action, hidden, 0.8 if script in SOFT else 0.0)
    (values, expected), (others, _) = (
        step_agent(net[which], view["obs"], last_action, hidden) for which in ("agent", "target agent")
    )
    assert torch.equal(new_hidden, expected)
    assert torch.equal(action, values.masked_fill(~mask, -torch.inf).argmax(-1))
    assert not torch.equal(action, others.masked_fill(~mask, -torch.inf).argmax(-1))
    assert not action.requires_grad
    assert not new_hidden.requires_grad


@over(SOFT)
@pytest.mark.parametrize("alpha", [0.4, 3.0])
def test_soft_policy_is_equation_15(script, alpha):
    """softmax(f(g(values)) / alpha) over available actions; acting draws from it, each agent by itself."""
    networks = make_networks(script, make_args(script))
    net = parts(networks)
    for name in ("agent", "g", "f"):
        random_parameters(net[name], 0.3)
    E = 20_000
    view = {
        name: torch.tensor(random_episode(1, np.random.default_rng(2))[name][:1]) for name in ("obs", "state", "mask")
    }
    none, hidden = torch.full((1, 3), -1), torch.zeros(1, 3, 64)
    values, _ = step_agent(net["agent"], view["obs"], none, hidden)
    logits = net["f"](net["g"](values, view["state"]), view["state"])[0].detach()
    expected = torch.zeros(3, 5)
    for i in AGENTS:
        allowed = view["mask"][0, i].nonzero()[:, 0]
        weights = (logits[i, allowed].double() / alpha).exp()
        expected[i, allowed] = (weights / weights.sum()).float()
    policy = log_policy(script, networks, values, view["state"], view["mask"], alpha)
    torch.testing.assert_close(policy[0].exp(), expected, rtol=1e-4, atol=1e-6)
    many = {name: value.expand(E, *value.shape[1:]) for name, value in view.items()}
    action, _ = act(script, networks, many, none.expand(E, 3), hidden.expand(E, 3, 64), alpha)
    frequency = torch.stack([(action == a).float().mean(0) for a in range(5)], -1)
    assert (frequency - expected).abs().max() < 4 * math.sqrt(0.25 / E)


# --- Replay ---


def same_episode(one: dict, other: dict) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in other)


@over(SMACV2 + MPE)
def test_a_batch_of_everything_is_what_was_stored(script):
    """Every number of each episode, once, in order of time: the longest come first, and no row is padding."""
    rng = np.random.default_rng(0)
    stored = [random_episode(int(rng.integers(1, 12)), rng, ended=bool(i % 2)) for i in range(13)]
    batch = Replay(script, 5, stored).sample(99)
    expected, found = stored[-5:], batch_episodes(batch)
    assert len(found) == 5
    assert all(sum(same_episode(a, b) for a in found) == 1 for b in expected)
    lengths = sorted((len(episode["reward"]) for episode in expected), reverse=True)
    assert [len(episode["reward"]) for episode in found] == lengths
    assert batch.sizes == [sum(n >= t for n in lengths) for t in range(lengths[0] + 1)]
    assert len(batch.reward) == sum(lengths) + 5


@over(SMACV2 + MPE)
def test_the_row_after_the_ith_of_those_before_an_end_is_row_b_plus_i(script):
    batch, episodes = make_batch(script, random_episodes([3, 9, 5, 5, 14, 1]))
    before = [episode["obs"][t] for t in range(14) for episode in episodes if t < len(episode["reward"])]
    after = [episode["obs"][t + 1] for t in range(14) for episode in episodes if t < len(episode["reward"])]
    assert np.array_equal(batch.obs[batch.now], before)
    assert np.array_equal(batch.obs[6:], after)


@over(SMACV2 + MPE)
def test_batches_are_drawn_uniformly_and_without_repetition(script):
    episodes = [episode | {"reward": np.full(2, i, np.float32)} for i, episode in enumerate(random_episodes([2] * 6))]
    replay, n = Replay(script, 6, episodes), 500
    drawn = [[episode["reward"][0] for episode in batch_episodes(replay.sample(2))] for _ in range(n)]
    assert all(len(set(pair)) == 2 for pair in drawn)
    counts = np.bincount(np.array(drawn, int).flatten(), minlength=6)
    assert abs(counts / n - 2 / 6).max() < 4.5 * math.sqrt(2 / 9 / n)


# --- Update ---


@over(SMACV2 + MPE)
def test_targets_begin_as_copies(script):
    networks = script.Networks(SIZES, make_args(script))
    net = parts(networks)
    online, target = ([p for name in net if name in names for p in net[name].parameters()]
                      for names in (("agent", "g", "mixer"), ("target agent", "target g", "target mixer")))  # fmt: skip
    assert len(online) == len(target) > 0
    assert all(torch.equal(a, b) and a is not b for a, b in zip(online, target, strict=True))


@over(SMACV2 + MPE)
@pytest.mark.parametrize("tau", [1.0, 0.25])
def test_target_networks_follow(script, tau):
    """tau < 1 moves them after every update; a copy is the training loop's, every target_update_interval episodes."""
    networks = make_networks(script, args := make_args(script, tau=tau))
    before = parts(copy.deepcopy(networks))
    batch, _ = make_batch(script, random_episodes([4, 7]))
    update(script, networks, new_optimizer(script, networks), batch, args)
    net = parts(networks)
    for name in ("agent", "g", "mixer"):
        if name not in net:
            continue
        trios = [list(part[which].parameters()) for part, which in
                 ((net, "target " + name), (net, name), (before, "target " + name), (before, name))]  # fmt: skip
        for moved, online, old, old_online in zip(*trios, strict=True):
            assert not torch.equal(online, old_online)
            torch.testing.assert_close(moved, old if tau == 1.0 else tau * online + (1 - tau) * old, rtol=0, atol=1e-6)
    move_target(script, networks, 1.0)
    for name in net.keys() & {"agent", "g", "mixer"}:
        pairs = zip(net["target " + name].parameters(), net[name].parameters(), strict=True)
        assert all(torch.equal(target, online) for target, online in pairs)


@over(SMACV2 + MPE)
def test_gradient_norms_are_clipped_for_each_loss_by_itself(script):
    networks = make_networks(script, args := make_args(script, max_grad_norm=1e-3))
    before, net = parts(copy.deepcopy(networks)), parts(networks)
    optimizer = new_optimizer(script, networks, torch.optim.SGD, lr=1.0)
    update(script, networks, optimizer, make_batch(script, random_episodes([4, 7]))[0], args)
    for names in [("agent", "g", "mixer")] + [("f",)] * (script in SOFT):
        pairs = [zip(before[n].parameters(), net[n].parameters(), strict=True) for n in names if n in net]
        moved = math.sqrt(sum((a - b).square().sum().item() for part in pairs for a, b in part))
        assert moved == pytest.approx(1e-3, rel=1e-2)


@over(SMACV2 + MPE)
def test_updates_forget_the_gradients_of_earlier_ones(script):
    """Two updates of plain gradient descent at rate 0 leave the second batch's gradient alone."""
    networks = make_networks(script, args := make_args(script, max_grad_norm=1e6))
    optimizer = new_optimizer(script, networks, torch.optim.SGD, lr=0.0)
    gradients = []
    for seeds in ((1,), (0, 1)):
        for seed in seeds:
            torch.manual_seed(5)
            update(script, networks, optimizer, make_batch(script, random_episodes([4, 7], seed=seed))[0], args)
        gradients.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
