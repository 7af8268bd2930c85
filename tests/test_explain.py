"""explain.py: its numbers are the networks', its actions a test's, and what it cannot read it refuses."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from common import MPE, SMACV2, SOFT, evaluate, one_sentence, over, run_main, small_args, train, walk_agent
from PIL import Image

import explain
from envs.smacv2_sim import MEDIVAC, SMACv2Sim

DRAWN = (SMACV2[0], MPE[1])  # a picture with and one without entropies


class Watched:
    """An environment that always begins with this seed, and remembers what was seen and done."""

    def __init__(self, env, seed):
        self.env, self.seed, self.views, self.actions = env, seed, [], []

    def __getattr__(self, name):
        return getattr(self.env, name)

    def reset(self, seed=None):
        obs, info = self.env.reset(seed=self.seed)
        self.views.append((obs, info))
        return obs, info

    def step(self, actions):
        self.actions.append(actions.copy())
        result = self.env.step(actions)
        self.views.append((result[0], result[-1]))
        return result


def read(path) -> list[dict]:
    return list(csv.DictReader(path.read_text().splitlines()))


@over([*SMACV2, *MPE])
@torch.no_grad()
def test_numbers_are_the_networks_and_actions_those_of_a_test(script, tmp_path, monkeypatch, capsys):
    if script not in DRAWN:
        monkeypatch.setattr(explain, "draw", lambda rows, title: b"")
    changes = dict(total_timesteps=4, eval_interval=4, eval_episodes=1)
    changes |= dict(map="zerg_2_vs_5") if script in SMACV2 else {}  # over soon
    train(script, small_args(script, tmp_path / "run", **changes))
    code, output = run_main(explain, capsys, tmp_path / "run", "--seed", 3, "--out", tmp_path / "out")
    assert code == 0, output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["battle.csv", "battle.png"]
    if script in DRAWN:
        with Image.open(tmp_path / "out" / "battle.png") as picture:
            assert picture.size[0] == 13 * 200
    rows = read(tmp_path / "out" / "battle.csv")

    *_, args, env, networks = explain.load_run(str(tmp_path / "run"))
    env, N = Watched(env, 3), env.num_agents
    result = evaluate(script, networks.critic.agent, env, 1)
    action = np.concatenate(env.actions)  # (L, N)
    assert [int(row["action"]) for row in rows] == action.ravel().tolist()
    assert sum(float(row["reward"]) for row in rows[::N]) == pytest.approx(result["return_mean"], rel=1e-4)
    assert float(rows[-N]["return_to_go"]) == pytest.approx(float(rows[-1]["reward"]))

    obs = np.concatenate([obs for obs, _ in env.views])
    values = walk_agent(networks.critic.agent, {"obs": obs[: len(action)], "action": action})
    for t, u in enumerate(action):
        state, mask = (torch.from_numpy(env.views[t][1][name]) for name in ("state", "action_mask"))
        q = values[t].unsqueeze(0)  # (1, N, A)
        q = networks.critic.g(q, state) if script in SOFT else q
        chosen = torch.stack([q[0, i, u[i]] for i in range(N)])
        q_tot = networks.critic.mixer(chosen.unsqueeze(0), state).item()
        for i, row in enumerate(rows[t * N : (t + 1) * N]):
            expected = {"step": t, "agent": i, "q_i": chosen[i], "q_tot": q_tot}
            if script in SOFT:
                f = networks.f(q, state)[0, i].tolist()
                weights = [math.exp(f[a] / args.alpha) if mask[0, i, a] else 0.0 for a in range(env.num_actions)]
                policy = [weight / sum(weights) for weight in weights]
                expected |= {"stage1": values[t][i, u[i]], "f": f[u[i]], "probability": policy[u[i]]}
                expected["entropy"] = -sum(p * math.log(p) for p in policy if p > 0)
            assert row.keys() - expected.keys() == {"action", "name", "reward", "return_to_go"}
            for name, value in expected.items():
                assert float(row[name]) == pytest.approx(float(value), rel=1e-3, abs=1e-5), (t, i, name)


def test_actions_have_the_games_names():
    env = SMACv2Sim("terran_5_vs_3", 1, seed=2)
    for seed in range(3):
        env.reset(seed=seed)
        medics = env._world.units[0]["type"][:5] == MEDIVAC
        names = explain.action_names(SMACV2[0].Args(backend="sim"), env)
        assert [agent[:4] for agent in names] == [["no-op", "stop", "move north", "move south"]] * 5
        assert [agent[8] for agent in names] == ["heal 2" if medic else "attack 2" for medic in medics]
        assert {len(agent) for agent in names} == {env.num_actions}
    for name in ("stop", "move east", "attack 9", "heal 4", "push west", "action 30"):
        assert len(explain.color_of(name)) == 3


def damage(path):
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("change", "words", "expected"),
    [
        (None, "nowhere", "nowhere is no run's folder"),
        (None, "run/policy.pt", "a policy.pt has no mixer"),
        (lambda run: (run / "config.json").write_text('{"args": {"exp_name": "fop"}}'), "run", "a run of 'fop'"),
        (lambda run: (run / "config.json").unlink(), "run", "it has no config.json"),
        (lambda run: damage(run / "config.json"), "run", "config.json is damaged"),
        (lambda run: (run / "config.json").write_text('{"algorithm": "mappo_smacv2"}'), "run", "of 'mappo_smacv2'"),
        (lambda run: (run / "config.json").write_text("[1]"), "run", "not a training script's"),
        (lambda run: (run / "checkpoint.pt").unlink(), "run", "there is no such file"),
        (lambda run: damage(run / "checkpoint.pt"), "run", "it is damaged"),
        (None, "run --seed -1", "--seed is -1"),
        (None, "run --out run/config.json/x", "cannot be written"),
        (lambda run: (run / "battle.csv").mkdir(), "run", "battle.csv cannot be written"),
    ],
)
def test_what_cannot_be_explained_gets_one_sentence(change, words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(explain, "draw", lambda rows, title: b"")
    args = small_args(MPE[1], tmp_path / "run", total_timesteps=4, eval_interval=4, eval_episodes=1)
    train(MPE[1], args)
    capsys.readouterr()
    if change:
        change(tmp_path / "run")
    assert expected in one_sentence(run_main(explain, capsys, *words.split()))
    assert not list(tmp_path.rglob("battle.*p*"))


@pytest.mark.parametrize(
    ("outcome", "code", "words"),
    [({"invalid": np.array([True])}, 2, "failed during the episode: try again"), (ConnectionError("gone"), 1, "gone")],
)
def test_a_game_that_fails_is_not_explained(outcome, code, words, tmp_path, monkeypatch, capsys):
    """As StarCraft II may: the views after a lost battle are those of another one."""
    train(SMACV2[1], small_args(SMACV2[1], tmp_path, total_timesteps=4, eval_interval=4, eval_episodes=1))
    capsys.readouterr()
    step = SMACv2Sim.step

    def fails(env, action):
        if isinstance(outcome, Exception):
            raise outcome
        *views, info = step(env, action)
        return *views, info | outcome

    monkeypatch.setattr(SMACv2Sim, "step", fails)
    ended, output = run_main(explain, capsys, tmp_path)
    assert (ended, output.count("\n")) == (code, 1)
    assert output.startswith("error: ")
    assert words in output
    assert not list(tmp_path.glob("battle.*"))


def test_networks_of_another_size_are_refused(tmp_path, capsys):
    train(MPE[1], small_args(MPE[1], tmp_path, total_timesteps=4, eval_interval=4, eval_episodes=1))
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    saved["args"]["env"] = "mpe2.simple_reference_v3"
    torch.save(saved, tmp_path / "checkpoint.pt")
    capsys.readouterr()
    assert "cannot be played" in one_sentence(run_main(explain, capsys, tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["algorithm"] == "qmix_mpe"
