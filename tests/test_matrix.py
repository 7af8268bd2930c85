"""softqmix_matrix.py and qmix_matrix.py: their mathematics, their files, and who finds the optimum."""

import ast
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import plot
import qmix_matrix
import softqmix_matrix
import softqmix_smacv2

ROOT = Path(__file__).parent.parent
SCRIPTS = (softqmix_matrix, qmix_matrix)
TABLE_1 = softqmix_matrix.GAMES["table1"]
WIDE = ((1, -2, 3), (0, 5, -1))  # 2 x 3: the first agent has an action less

pytestmark = pytest.mark.usefixtures("fixed_seed")
both = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)


@pytest.fixture
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_networks(script, seed=1, payoff=WIDE, **settings):
    """Those with which train() begins this seed."""
    torch.manual_seed(seed)
    return script.Networks(torch.tensor(payoff, dtype=torch.float64), script.Args(**settings))


def losses_of(script, networks, played, reward, td_weight=1.0):
    """The losses of one seed's networks at joint actions and rewards (B,)."""
    _, q_tot, *soft = (value.unsqueeze(0) for value in networks())  # of Soft-QMIX logits and the sum of f_i, too
    return script.compute_losses(q_tot, *soft[1:], played[None], reward[None], torch.tensor([td_weight]))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(script, payoff=.., ..): trains and returns the calls of train()'s parts, each as arguments and result, and
    what it returned; parameters are those of the end, with the gradients of the last update."""

    def record(patch, module, name):
        function, calls = getattr(module, name), []
        patch.setattr(module, name, lambda *a, **k: calls.append((a, function(*a, **k))) or calls[-1][1])
        return calls

    def run(script, payoff=TABLE_1, **settings):
        with monkeypatch.context() as patch:
            patch.setitem(script.GAMES, "here", payoff)
            calls = {name: record(patch, script, name) for name in ("act", "compute_losses", "stack_module_state")}
            calls["optimizer"] = record(patch, torch.optim, "Adam")
            folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
            summary = script.train(script.Args(payoff="here", run_dir=str(folder), **settings))
        parameters = calls["stack_module_state"][0][1][0]
        return SimpleNamespace(**calls, folder=folder, summary=summary, parameters=parameters)

    return run


def randomise(module, scale=3.0):
    """Any parameters, not only those near the initialisation."""
    for p in module.parameters():
        p.data = torch.randn_like(p) * scale / p.shape[-1] ** 0.5
    return module


# --- networks ---


def test_agent_is_a_gru_from_a_zero_hidden_state(float64):
    agent, cell = softqmix_matrix.Agent(2, 3), torch.nn.GRUCell(64, 64)
    cell.weight_ih.data, cell.bias_ih.data = agent.gru.weight.data, agent.gru.bias.data
    cell.bias_hh.data = agent.gru_hidden_bias.data
    obs = torch.randn(2, 1)
    x = torch.relu(agent.fc_in(torch.cat([obs, torch.eye(2)], dim=1)))
    torch.testing.assert_close(agent(obs), agent.fc_out(cell(x)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("trial", range(20))
def test_mixer_is_monotonic_and_transformations_keep_the_order(trial, float64):
    torch.manual_seed(trial)
    state = torch.randn(7, 1)
    mixer = randomise(softqmix_matrix.Mixer(1, 2))
    q = torch.randn(7, 2, requires_grad=True)
    (slope,) = torch.autograd.grad(mixer(q, state).sum(), q)
    assert (slope >= 0).all()
    assert (slope > 0).any()
    x = torch.randn(7, 2, 5).sort(dim=-1).values * 10
    assert (randomise(softqmix_matrix.TransformG(1, 2))(x, state).diff(dim=-1) >= x.diff(dim=-1) - 1e-9).all()
    f = randomise(softqmix_matrix.TransformF(1, 2))(x, state).diff(dim=-1)
    assert (f >= 0).all()
    assert (f > 0).any()


@both
def test_q_tot_of_every_joint_action_is_the_mixers(script, float64):
    networks = script.Networks(torch.tensor(WIDE), script.Args())
    (stage1, q_tot, *soft), state = networks(), torch.ones(1, 1)
    q_i = networks.g(stage1[None], state)[0] if script is softqmix_matrix else stage1
    for j, (row, column) in enumerate((i, k) for i in range(2) for k in range(3)):
        q = torch.stack([q_i[0, row], q_i[1, column]])[None]
        torch.testing.assert_close(q_tot[j], networks.mixer(q, state)[0])
        assert networks.joint_actions[j].tolist() == [row, column]
        if script is softqmix_matrix:
            f = networks.f(q.unsqueeze(-1), state)
            torch.testing.assert_close(soft[1][j], f.sum())


# --- acting ---


@both
def test_acting_follows_the_policy_and_the_mask(script, float64):
    values, mask = torch.randn(3, 2, 3), torch.tensor([[True, True, False], [True, True, True]])
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    if script is softqmix_matrix:
        action = script.act(values, mask, 20_000, generators)
        pi = values.exp() * mask
        pi /= pi.sum(-1, keepdim=True)
    else:
        action = script.act(values, mask, 0.6, 20_000, generators)
        pi = torch.stack([0.6 * mask[i] / mask[i].sum() for i in range(2)]).repeat(3, 1, 1)  # (K, N, A)
        for k in range(3):
            pi[k, 0, values[k, 0, :2].argmax()] += 0.4
            pi[k, 1, values[k, 1].argmax()] += 0.4
    counts = torch.stack([torch.bincount(3 * a[:, 0] + a[:, 1], minlength=9) for a in action]).view(3, 3, 3)
    expected = pi[:, 0, :, None] * pi[:, 1, None, :]
    torch.testing.assert_close(counts / 20_000, expected, rtol=0, atol=0.016)  # 4.5 standard errors
    assert (counts[:, 2] == 0).all()  # the first agent's missing action
    assert expected.std() > 0.02  # else any policy would pass


def test_soft_policy_is_equation_15(run, float64):
    """In acting and in what is reported; nothing moves at so small a learning rate."""
    trained = run(softqmix_matrix, payoff=WIDE, alpha=0.2, num_seeds=2, total_timesteps=128, learning_rate=1e-9)
    for k in range(2):
        logits = make_networks(softqmix_matrix, 1 + k)()[2]  # (N, A)
        torch.testing.assert_close(trained.act[0][0][0][k], logits / 0.2)
        for i, size in enumerate((2, 3)):
            weights = (logits[i, :size] / 0.2).exp()
            expected = (weights / weights.sum()).tolist()
            assert trained.summary["policy"][k][i] == pytest.approx(expected, abs=1e-5)


def test_reported_policy_of_qmix_is_epsilon_greedy(run):
    trained = run(qmix_matrix, payoff=WIDE, num_seeds=2, total_timesteps=128, epsilon_finish=0.3, epsilon_anneal_time=1)
    for (row, column), policies in zip(trained.summary["greedy"], trained.summary["policy"], strict=True):
        for chosen, policy in zip((row, column), policies, strict=True):
            n = len(policy)
            assert policy == pytest.approx([0.3 / n + 0.7 * (u == chosen) for u in range(n)])


@pytest.mark.parametrize(("step", "expected"), [(0, 1.0), (50, 0.6), (100, 0.2), (10**6, 0.2)])
def test_epsilon_schedule(step, expected):
    args = qmix_matrix.Args(epsilon_finish=0.2, epsilon_anneal_time=100)
    assert qmix_matrix.epsilon_at(step, args) == pytest.approx(expected)


# --- losses and update ---


def test_losses_by_hand():
    """Q_tot is (3, 1), the batch holds 3 against 1, 3 against 4 and 1 against 1.5: only the first is too high."""
    q_tot, f_sum = torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0, 5.0]])
    batch = torch.tensor([[0, 0, 1]]), torch.tensor([[1.0, 4.0, 1.5]])
    losses = softqmix_matrix.compute_losses(q_tot, f_sum, *batch, torch.tensor([0.1]))
    loss_q, loss_pi = losses["td"], losses["policy"]
    assert loss_q.item() == pytest.approx(0.5 * (0.1 * 4 + 1 + 0.25) / 3)
    assert loss_pi.item() == pytest.approx(0.5 * (1 + 1 + 16) / 3)
    assert qmix_matrix.compute_losses(q_tot, *batch, torch.tensor([0.1])) == {"td": loss_q}


def test_gradients_stop_where_the_paper_says():
    """L_Q trains agent, g and mixer, L_pi trains f, and neither touches the other's parameters."""
    networks, batch = make_networks(softqmix_matrix), (torch.randint(6, (16,)), torch.randn(16))
    names, parameters = zip(*networks.named_parameters(), strict=True)
    for which, trained in (("td", ("agent.", "mixer.", "g.")), ("policy", ("f.",))):
        loss = losses_of(softqmix_matrix, networks, *batch)[which].sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        reached = {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
        assert reached == {name for name in names if name.startswith(trained)}


def test_clipping_is_per_seed():
    gradients = [torch.randn(3, 4, 5) * torch.tensor([0.1, 1, 10]).view(3, 1, 1), torch.randn(3, 6)]
    batched = [torch.zeros_like(g) for g in gradients]
    for p, g in zip(batched, gradients, strict=True):
        p.grad = g.clone()
    softqmix_matrix.clip_grad_norm(batched, 3.0)
    for k in range(3):
        single = [torch.zeros_like(g[k]) for g in gradients]
        for p, g in zip(single, gradients, strict=True):
            p.grad = g[k].clone()
        torch.nn.utils.clip_grad_norm_(single, 3.0)
        for p, q in zip(single, batched, strict=True):
            torch.testing.assert_close(p.grad, q.grad[k])


@both
def test_batched_seeds_equal_seeds_trained_one_by_one(script, run, float64):
    """At both weights; what they play is the same, and what they learn but for rounding."""
    settings = {"total_timesteps": 200, "td_weight": 0.3}
    batched = run(script, seed=5, num_seeds=3, **settings)
    for k in range(3):
        single = run(script, seed=5 + k, num_seeds=1, **settings)
        for i in (0, 1):  # of both weights
            actions = [torch.cat([action for _, action in x.act], dim=1) for x in (single, batched)]
            assert torch.equal(actions[0][i], actions[1][3 * i + k])
            for name, p in single.parameters.items():
                torch.testing.assert_close(p[i], batched.parameters[name][3 * i + k], rtol=0, atol=1e-9)
    fresh = torch.stack([make_networks(script, 5 + k, TABLE_1).agent.fc_out.weight for k in range(3)])
    moved = batched.parameters["agent.fc_out.weight"].view(2, 3, 3, 64) - fresh
    assert (moved.flatten(2).abs().amax(2) > 1e-3).all()


@both
def test_replay_holds_the_last_games_and_updates_see_games_that_were_played_only(script, run):
    """6 games at a time into room for 14; the first update comes with the 12th game."""
    settings = {"num_envs": 6, "batch_size": 12, "buffer_size": 14, "total_timesteps": 60, "td_weight": 0.3}
    trained = run(script, payoff=WIDE, num_seeds=3, **settings)
    assert len(trained.act) == 10
    assert len(trained.compute_losses) == 9
    rewards, oldest = torch.tensor(WIDE).flatten(), 0
    for update, (arguments, _) in enumerate(trained.compute_losses):
        drawn, reward, td_weight = arguments[-3:]
        assert drawn.shape == (6, 12)
        played = torch.cat([action for _, action in trained.act[: update + 2]], dim=1)  # (K, games, N)
        games = (3 * played[..., 0] + played[..., 1])[:, -14:]
        assert all(set(ours) <= set(theirs) for ours, theirs in zip(drawn.tolist(), games.tolist(), strict=True))
        assert torch.equal(reward, rewards[drawn].float())
        assert td_weight.tolist() == pytest.approx([0.3] * 3 + [1.0] * 3)
        oldest += sum(games[k, 0] in drawn[k] for k in range(6))
    assert oldest > 20  # of 54: the oldest game that there is room for is drawn as often as others


@both
def test_updates_see_nothing_of_games_yet_to_come(script, run, monkeypatch):
    """Room is left in the replay; its zeros, which would mean the first joint action, are never drawn."""
    monkeypatch.setattr(script, "act", lambda *_: torch.ones(2, 8, 2, dtype=torch.long))
    trained = run(script, payoff=WIDE, num_seeds=1, num_envs=8, batch_size=8, total_timesteps=40)
    assert [set(arguments[-3].flatten().tolist()) for arguments, _ in trained.compute_losses] == [{4}] * 5


@both
@pytest.mark.parametrize("max_grad_norm", [1e-3, 1e6], ids=["clipped", "whole"])
def test_every_update_follows_the_gradient_of_its_own_batch(script, max_grad_norm, run, float64):
    """In a game of one cell every batch is the same: L_Q and L_pi of the first pass, clipped for each by itself."""
    settings = {"learning_rate": 1e-9, "max_grad_norm": max_grad_norm, "td_weight": 0.3}
    trained = run(script, payoff=((-5.0,),), num_seeds=2, batch_size=8, total_timesteps=16, **settings)
    for k, (seed, weight) in enumerate([(1, 0.3), (2, 0.3), (1, 1.0), (2, 1.0)]):
        networks, cells = make_networks(script, seed, ((-5.0,),)), torch.zeros(8, dtype=torch.long)
        loss = sum(losses_of(script, networks, cells, cells - 5.0, weight).values()).sum()
        names, parameters = zip(*networks.named_parameters(), strict=True)
        expected = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        for is_f in (False, True):
            group = [name for name in names if name.startswith("f.") == is_f]
            norm = sum(expected[name].square().sum() for name in group) ** 0.5
            for name in group:
                gradient = expected[name] * min(1, max_grad_norm / norm)
                torch.testing.assert_close(trained.parameters[name].grad[k], gradient, rtol=1e-2, atol=1e-9)


@both
def test_greedy_actions_pay_their_cell(script, run):
    """Nothing is learnt at so small a learning rate, and different seeds begin with different actions."""
    tested = run(script, payoff=WIDE, num_seeds=20, total_timesteps=128, learning_rate=1e-9).summary
    for k, (row, column) in enumerate(tested["greedy"]):
        stage1 = make_networks(script, 1 + k)()[0]
        assert (row, column) == (stage1[0, :2].argmax(), stage1[1].argmax())
        assert tested["pays"][k] == WIDE[row][column]
    assert len(set(tested["pays"])) > 2


@both
def test_options_of_adam_and_its_groups(script, run):
    """theta, and phi where there is one, both at --learning-rate."""
    trained = run(script, num_seeds=1, total_timesteps=128, learning_rate=3e-4)
    groups = trained.optimizer[0][1].param_groups
    assert [group["lr"] for group in groups] == [3e-4] * (2 if script is softqmix_matrix else 1)
    phi = sum(p.numel() for name, p in trained.parameters.items() if name.startswith("f."))
    assert sum(p.numel() for group in groups[1:] for p in group["params"]) == phi


def test_exploration_falls_with_the_games_played(run):
    trained = run(qmix_matrix, num_envs=500, epsilon_finish=0.0, epsilon_anneal_time=1000, total_timesteps=1500)
    for chance, (arguments, action) in zip((1.0, 0.5, 0.0), trained.act, strict=True):
        others = (action != qmix_matrix.greedy_action(*arguments[:2]).unsqueeze(1)).any(-1).double().mean(1)  # (K,)
        assert arguments[2] == chance
        assert (others > 0).all() == (chance > 0)
        assert (others <= chance * (2 - chance)).all()  # that one of both coins falls


@pytest.mark.parametrize("changes", [{"use_g": False}, {"use_f": False}, {"use_g": False, "use_f": False}])
def test_ablations_and_the_sum_learn(changes, run):
    """Without f the policy is softmax(Q_i / alpha); with --mixer vdn Table 2(a)'s Q_tot is exactly additive."""
    trained = run(softqmix_matrix, mixer="vdn", num_seeds=3, total_timesteps=368, **changes)  # 61 updates
    q_tot = torch.tensor(trained.summary["q_tot"])
    torch.testing.assert_close(q_tot[:, 0, 0] + q_tot[:, 1, 1], q_tot[:, 0, 1] + q_tot[:, 1, 0])
    games = torch.cat([action for _, action in trained.act], dim=1)  # (K, games, N)
    for k, (seed, weight) in enumerate((seed, weight) for weight in (0.1, 1.0) for seed in (1, 2, 3)):
        networks = make_networks(softqmix_matrix, seed, TABLE_1, mixer="vdn", **changes)
        played = 3 * games[k, :, 0] + games[k, :, 1]
        batch = played, torch.tensor(TABLE_1).flatten()[played], weight
        before = losses_of(softqmix_matrix, networks, *batch)
        networks.load_state_dict({name: p[k] for name, p in trained.parameters.items()})
        after = losses_of(softqmix_matrix, networks, *batch)
        assert after["td"] < 0.8 * before["td"]  # a sum cannot fit this game
        if changes.get("use_f", True):
            assert after["policy"] < max(0.5 * before["policy"], 0.01)
    stage1, _, logits, _ = networks()
    if changes == {"use_g": False, "use_f": False}:
        assert torch.equal(logits, stage1)
    assert any(name.startswith("f.") for name in trained.parameters) == changes.get("use_f", True)


# --- scripts ---


def run_script(monkeypatch, script, *options) -> int:
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, options)])
    return script.main()


@both
@pytest.mark.parametrize("make", [np.empty, torch.empty])
def test_running_out_of_memory_gets_one_sentence(script, make, monkeypatch, capsys):
    monkeypatch.setattr(script, "train", lambda _: make(10**15))
    monkeypatch.setattr(sys, "argv", [script.__name__])
    assert script.main() == 1
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory; lower --num-seeds or --buffer-size: ")
    assert err.count("\n") == 1


@both
def test_other_errors_of_pytorch_are_not_hidden(script, monkeypatch):
    monkeypatch.setattr(script, "train", lambda _: torch.zeros(2) @ torch.zeros(3))
    monkeypatch.setattr(sys, "argv", [script.__name__])
    with pytest.raises(RuntimeError, match="size"):
        script.main()


@both
def test_from_the_command_line(script, tmp_path, monkeypatch):
    """Defaults, but 1,000 games (after 500 the outcome hardly changes): optimum with the weight, mostly not without."""
    command = [sys.executable, f"{script.__name__}.py", "--run-dir", str(tmp_path), "--total-timesteps", "1000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    ours, theirs = summary, summary["weight_1"]
    assert ours["seeds"] == theirs["seeds"] == list(range(1, 17))
    assert (ours["td_weight"], theirs["td_weight"]) == (0.1, 1.0)
    assert ours["successes"] >= 15
    assert theirs["successes"] <= 8
    for result in (ours, theirs):
        optimal = sum(greedy == [0, 0] for greedy in result["greedy"])
        assert result["successes"] == optimal == round(16 * result["success_rate"])
        assert result["interval"][0] < result["success_rate"] < result["interval"][1] + 1e-12
        assert f"optimal joint action in {optimal} of 16 seeds" in done.stdout
        assert np.shape(result["q_tot"]) == (16, 3, 3)
        np.testing.assert_allclose(np.sum(result["policy"], axis=-1), 1, atol=1e-5)
    # Table 2(c), and its likeness for Soft-QMIX at weight 1: those that fail choose B or C, worth 0, and know it
    failed = [k for k, greedy in enumerate(theirs["greedy"]) if 0 not in greedy]
    assert len(failed) == 16 - theirs["successes"]
    values = [theirs["q_tot"][k][row][column] for k in failed for row, column in [theirs["greedy"][k]]]
    assert abs(np.median(values)) < 1
    assert done.stdout.endswith(f"Picture: python plot.py '{tmp_path}'\n")
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path)])
    assert plot.main() == 0
    with Image.open(tmp_path / "q_tot.png") as picture:
        assert picture.width > 2000
        assert picture.info["dpi"] == pytest.approx((200, 200), abs=0.1)
    assert json.loads((tmp_path / "config.json").read_text())["algorithm"] == script.__name__
    assert not list(tmp_path.rglob("*.tmp"))
    assert done.stderr == ""  # a bar is for terminals
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows[::2]] == [500, 1000]
    assert [float(row["success_rate"]) for row in rows[-2:]] == [ours["success_rate"], theirs["success_rate"]]
    assert {"episodic_return", "td", "q_tot", "entropy", "return_mean", "SPS"} <= rows[0].keys()


@both
def test_own_payoff_of_any_shape(script, tmp_path, monkeypatch, capsys):
    path = tmp_path / "wide.csv"
    path.write_text("\ufeff1, -2, 3\n\n0,9,-1\n", encoding="utf-8")  # with a byte order mark and an empty line
    run_dir = tmp_path / "run"
    options = ["--payoff", path, "--num-seeds", 2, "--total-timesteps", 600, "--run-dir", run_dir, "--td-weight", 1]
    assert run_script(monkeypatch, script, *options) == 0
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["payoff"] == [[1, -2, 3], [0, 9, -1]]
    assert [len(pi) for pi in summary["policy"][0]] == [2, 3]
    assert all(row < 2 and column < 3 for row, column in summary["greedy"])
    assert {key: summary[key] for key in summary["weight_1"]} == summary["weight_1"]  # trained once, not twice
    assert capsys.readouterr().out.count("optimal joint action in") == 1
    assert run_script(monkeypatch, script, *options) == 2  # the folder holds a run now
    assert "already holds a run" in capsys.readouterr().err


def any_outcome(payoff) -> dict[str, torch.Tensor]:
    """What three seeds may have learnt of a game."""
    greedy = torch.stack([torch.randint(size, (3,)) for size in payoff.shape], dim=1)
    mask = torch.arange(max(payoff.shape)) < torch.tensor(payoff.shape).unsqueeze(1)
    policy = torch.randn(3, *mask.shape).masked_fill(~mask, -torch.inf).softmax(-1)
    return {
        "greedy": greedy,
        "pays": payoff[greedy.unbind(1)],
        "q_tot": torch.randn(3, *payoff.shape),
        "policy": policy,
    }


def picture_of(run_dir, monkeypatch, args: dict, payoff, tested: list[dict], weights):
    """What plot.py draws of a run with these results at these weights."""
    pairs = zip(tested, weights, strict=True)
    results = [softqmix_matrix.summarise(learnt, payoff, [1, 2, 3], {"td_weight": w})[0] for learnt, w in pairs]
    summary = {"args": args, "payoff": payoff.tolist(), **results[0], "weight_1": results[-1]}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    figures, make = [], plot.plt.Figure
    monkeypatch.setattr(plot.plt, "Figure", lambda **options: figures.append(make(**options)) or figures[-1])
    assert plot.matrix_picture(run_dir) == run_dir / "q_tot.png"
    return figures[0]


@pytest.mark.parametrize(
    ("script", "shape"), [*((SCRIPTS[0], shape) for shape in ((1, 1), (3, 3), (2, 6), (30, 1))), (SCRIPTS[1], (3, 3))]
)
def test_nothing_collides_in_the_picture(script, shape, tmp_path, monkeypatch):
    """Neither titles nor numbers, and all that is written lies in the picture."""
    payoff = torch.randn(shape, dtype=torch.float64) * 100
    tested = any_outcome(payoff)
    args = vars(script.Args(payoff="an_own_game.csv"))
    figure = picture_of(tmp_path, monkeypatch, args, payoff, [tested, tested], (0.1, 1.0))
    figure.set_dpi(200)  # as it was saved
    figure.canvas.draw()
    texts = [figure._suptitle, *(axes.title for axes in figure.axes), *(t for axes in figure.axes for t in axes.texts)]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert len(boxes) > 3 * payoff.numel() + 4
    for i, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:i])
    assert [axes.get_ylabel() for axes in figure.axes][-1] == "payoff, Q_tot"  # the colour bar
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"agent 1", "agent 2"}


@both
def test_large_payoffs_keep_their_digits_and_columns_their_distance(script, tmp_path, monkeypatch):
    payoff = torch.tensor([[1e6, 999999.99], [-1e6, 0.0]], dtype=torch.float64)
    tested = any_outcome(payoff) | {"pays": payoff[0, [1, 1, 0]], "q_tot": payoff.expand(3, 2, 2)}
    result, text = script.summarise(tested, payoff, [1, 2, 3], {"td_weight": 1.0})
    assert result["successes"] == 1
    lines = text.splitlines()
    assert "pays 999999.99, the most frequent" in text
    assert [line.split()[2:] for line in lines[3:5]] == [["1000000.00", "999999.99"], ["-1000000.00", "0.00"]]
    assert len({len(line) for line in lines[2:5]}) == 1
    figure = picture_of(tmp_path, monkeypatch, vars(script.Args(td_weight=1)), payoff, [tested], [1.0])
    assert len(figure.axes) == 4  # two panels, the policies below the second, the colour bar
    assert [text.get_text() for text in figure.axes[0].texts] == ["1000000", "999999.99", "-1000000", "0"]


@both
def test_copied_alone_it_runs_in_a_folder_of_its_own(script, tmp_path):
    """Named after payoff, experiment, seed, time and process, so that runs started at once never share one;
    standard output and error are closed, as by `>&- 2>&-`."""
    copy = shutil.copy(ROOT / f"{script.__name__}.py", tmp_path)
    command = [sys.executable, copy, "--num-seeds", "1", "--total-timesteps", "140", "--seed", "7"]
    with subprocess.Popen(command, cwd=tmp_path, preexec_fn=lambda: (os.close(1), os.close(2))) as run:
        assert run.wait() == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"table1__{script.__name__}__7__\d{{8}}-\d{{6}}-{run.pid}", folder.name)
    assert {path.name for path in folder.iterdir()} == {"config.json", "metrics.csv", "summary.json"}


@both
def test_of_two_runs_started_at_once_in_one_folder_one_is_refused(script, tmp_path, monkeypatch, capsys):
    """Both find it empty; the second finds the first one's config.json all the same, and leaves it as it is."""
    (tmp_path / "config.json").write_text("the first one's")
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    assert run_script(monkeypatch, script, "--run-dir", tmp_path) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["the first one's"]


@both
def test_foreign_files_are_left_alone(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "summary.json").write_text("mine")
    assert run_script(monkeypatch, script, "--run-dir", tmp_path) == 2
    assert "already holds a run or files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    assert (tmp_path / "summary.json").read_text() == "mine"


SHORT = ["--num-seeds", "1", "--total-timesteps", "140"]


@pytest.mark.parametrize(("script", "closed"), [("softqmix_matrix", "stdout"), ("qmix_matrix", "stderr")])
def test_a_closed_pipe_loses_no_file(script, closed, tmp_path):
    command = [sys.executable, ROOT / f"{script}.py", *SHORT, "--run-dir", tmp_path / "run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        getattr(run, closed).close()
        said = (run.stderr if closed == "stdout" else run.stdout).read()
    assert (run.returncode, said == "") == ((1, True) if closed == "stdout" else (0, False))
    assert {"summary.json", "metrics.csv"} <= {path.name for path in (tmp_path / "run").iterdir()}


@both
def test_a_file_is_whole_or_as_it_was(script, tmp_path, monkeypatch):
    script.write(tmp_path / "file", "old")

    def fill_the_disk(path, text):
        path.write_bytes(b"ne")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        script.write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1  # nothing temporary is left on the full disk


@both
def test_all_files_are_written_before_the_words(script, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(
        "builtins.print", lambda *words, **_: said.append(({p.name for p in tmp_path.iterdir()}, words))
    )
    script.train(script.Args(num_seeds=1, total_timesteps=140, run_dir=str(tmp_path)))
    assert {"config.json", "summary.json", "metrics.csv"} <= said[0][0]
    assert "Q_tot of seed 1" in said[1][1][0]


@both
def test_durations_come_from_a_clock_that_nobody_sets(script, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e9 - len(list(tmp_path.iterdir())) * 1e6)  # set back again and again
    summary = script.train(script.Args(num_seeds=1, total_timesteps=140, run_dir=str(tmp_path)))
    assert 0 < summary["seconds"] < 60
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert all(float(row["SPS"]) > 0 for row in csv.DictReader(file))


BAD_FILES = {
    "ragged": "1,2\n3\n",
    "words": "1,two\n",
    "empty": "\n",
    "nan": "1,nan\n",
    "huge": "1,1e300\n",
    "binary": "\0\1",
}


@both
@pytest.mark.parametrize(
    "options",
    [
        *(["--payoff", name] for name in (*BAD_FILES, "no_such_game", ".")),
        *(["--num-seeds", "0"], ["--total-timesteps", "-4"], ["--learning-rate", "0"], ["--max-grad-norm", "nan"]),
        *(["--td-weight", "-1"], ["--seed", "-1"], ["--batch-size", "6000"], ["--total-timesteps", "100"]),
        *(["--num-envs", "6000"], ["--eval-interval", "0"], ["--run-dir", "words/below"], ["--run-dir", "."]),
        *(["--learning-rate", "1e-50"], ["--learning-rate", "inf"], ["--num-seeds", "10001"]),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_sentence(script, options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in BAD_FILES.items():
        Path(name).write_text(text)
    assert run_script(monkeypatch, script, *options) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert options[0] in err
    assert not out
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("script", "options"),
    [
        (softqmix_matrix, ["--alpha", "0"]),
        (softqmix_matrix, ["--alpha", "inf"]),
        (softqmix_matrix, ["--alpha", "1e-50"]),
        (softqmix_matrix, ["--alpha", "1e30"]),
        (qmix_matrix, ["--epsilon-start", "1.5"]),
        (qmix_matrix, ["--epsilon-finish", "-0.1"]),
        (qmix_matrix, ["--epsilon-anneal-time", "-1"]),
    ],
)
def test_bad_settings_of_one_script(script, options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_script(monkeypatch, script, *options) == 2
    assert options[0] in capsys.readouterr().err


@both
@pytest.mark.parametrize("options", [["--mixer", "qplex"], ["--num-seeds", "many"], ["--no-such-flag"]], ids=" ".join)
def test_malformed_flags(script, options, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_script(monkeypatch, script, *options)
    assert stopped.value.code == 2


def test_wilson_interval():
    """Against the definition: the proportions whose score test at 95 % does not reject 3 of 16."""
    payoff, pays = torch.tensor([[0.0, 1.0]]), (torch.arange(16) < 3).long()
    greedy, q_tot = torch.stack([torch.zeros_like(pays), pays], dim=1), payoff.expand(16, 1, 2)
    tested = {"greedy": greedy, "pays": pays, "q_tot": q_tot, "policy": torch.ones(16, 2, 2)}
    result, _ = softqmix_matrix.summarise(tested, payoff, list(range(16)), {})
    assert result["success_rate"] == 3 / 16
    for bound in result["interval"]:
        assert abs(3 / 16 - bound) / math.sqrt(bound * (1 - bound) / 16) == pytest.approx(1.959964)


def test_twins_share_their_blocks():
    """Everything that is the same in both scripts is the same letter by letter."""
    sources = [(ROOT / f"{script.__name__}.py").read_text() for script in SCRIPTS]
    soft, qmix = (
        {node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body if hasattr(node, "name")}
        for source in sources
    )
    different = {name for name in soft.keys() & qmix.keys() if soft[name] != qmix[name]}
    assert different == {"Args", "Networks", "act", "compute_losses", "train"}
    assert soft.keys() - qmix.keys() == {"TransformG", "TransformF", "masked_log_policy"}
    assert qmix.keys() - soft.keys() == {"epsilon_at"}


SHARED = ("InputError", "hypernetwork", "Mixer", "TransformF", "greedy_action", "masked_log_policy")


@pytest.mark.parametrize("name", SHARED)
def test_shared_blocks_are_those_of_smacv2(name):
    ours, theirs = ((ROOT / f"softqmix_{place}.py").read_text() for place in ("matrix", "smacv2"))
    sources = [
        ast.get_source_segment(s, n)
        for s in (ours, theirs)
        for n in ast.parse(s).body
        if name == getattr(n, "name", "")
    ]
    assert len(sources) == 2
    assert sources[0] == sources[1]


@both
def test_beginning_is_that_of_smacv2(script):
    """What stands before the imports, but for envs/, which these scripts do without."""
    ours, theirs = ((ROOT / name).read_text() for name in (f"{script.__name__}.py", "softqmix_smacv2.py"))
    block, other = (
        text[text.index("if __name__") :].partition("import json")[0].splitlines() for text in (ours, theirs)
    )
    assert len(block) >= 5
    assert [line for line in block if line and line not in other] == []


@both
def test_pep_723_block_names_what_is_imported(script):
    source = (ROOT / f"{script.__name__}.py").read_text()
    block = [line.removeprefix("# ") for line in source.splitlines() if line.startswith("#")][:4]
    assert (block[0], block[-1]) == ("/// script", "///")
    wanted = set(re.findall(r'"([^"]+)"', block[2]))
    known = {line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert wanted <= known
    imported = {re.split(r"[. ]", line)[1] for line in re.findall(r"^(?:import|from) .*", source, re.MULTILINE)}
    named = {re.match(r"\w+", text)[0] for text in wanted}
    assert imported - sys.stdlib_module_names == named


def test_g_computes_what_that_of_smacv2_does():
    """Only the text differs, and with it the rounding."""
    ours, theirs = (script.TransformG(1, 2).double() for script in (softqmix_matrix, softqmix_smacv2))
    theirs.load_state_dict(ours.state_dict())
    x, state = torch.randn(300, 2, 3).double(), torch.randn(300, 1).double()
    torch.testing.assert_close(ours(x, state), theirs(x, state), rtol=0, atol=1e-12)
