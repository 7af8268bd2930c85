"""The SMACv2 scripts as programs: files, resume, the command line, lost games, and that Soft-QMIX learns.

What can befall any run has tests of its own, and so has the mathematics.
"""

import json
import math
import re

import common
import numpy as np
import pytest
import torch
from common import (
    CPU,
    SMACV2,
    checkpoint_of,
    event_log,
    make_args,
    make_batch,
    one_sentence,
    over,
    random_episode,
    read_metrics,
    resumed_args,
    run_main,
    small_args,
    train,
)

import softqmix_smacv2 as sq
from envs.smacv2_sim import SMACv2Sim

# --- Runs ---


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run") / "a"
    return run_dir, train(sq, small_args(sq, run_dir))


def test_run_leaves_the_promised_files(finished_run):
    run_dir, summary = finished_run
    assert summary == json.loads((run_dir / "summary.json").read_text())
    assert {"args", "backend", "simulator_version", "env_steps", "episodes", "updates", "sps", "eval"} <= set(summary)
    assert summary["algorithm"] == "softqmix_smacv2"
    assert set(summary["eval"]) == {"episodes", "return_mean", "return_std", "win_rate"}
    assert (summary["backend"], summary["env_steps"]) == ("sim", 1200)
    assert summary["updates"] == summary["episodes"] // 4 - 1  # the first one when 8 are stored
    rows = read_metrics(run_dir, drop=())
    assert [row["step"] for row in rows] == ["0", "400", "800", "1200"]
    assert list(rows[0]) == ["step", "episodes", "updates", "return_mean", "return_std", "win_rate", "sps", "seconds"]
    assert json.loads((run_dir / "config.json").read_text())["backend"] == "sim"
    files = {path.name for path in run_dir.iterdir() if "tfevents" not in path.name}
    assert files - {"run.lock"} == {"checkpoint.pt", "config.json", "metrics.csv", "policy.pt", "summary.json"}
    assert len(list(run_dir.glob("*tfevents*"))) == 1


def test_tensorboard_has_the_usual_tags(finished_run):
    events = event_log(finished_run[0])
    charts = [f"charts/{name}" for name in ("episodic_return", "SPS", "alpha", "env_restarts")]
    evals = ("return_mean", "return_std", "win_rate")
    assert {*charts, *(f"eval/{name}" for name in evals)} <= set(events.Tags()["scalars"])
    assert "NOT StarCraft II" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def test_same_seed_same_metrics_and_another_seed_others(finished_run, tmp_path):
    train(sq, small_args(sq, tmp_path / "same"))
    train(sq, small_args(sq, tmp_path / "other", seed=2))
    assert read_metrics(tmp_path / "same") == read_metrics(finished_run[0])
    assert read_metrics(tmp_path / "other") != read_metrics(finished_run[0])


@over(SMACV2)
@pytest.mark.parametrize(("num_envs", "options"), [(4, {}), (3, {}), (4, {"mixer": "vdn"})], ids=str)
def test_resume_equals_the_uninterrupted_run_to_the_last_bit(script, num_envs, options, tmp_path):
    args = dict(num_envs=num_envs, total_timesteps=1320, **options)
    train(script, small_args(script, tmp_path / "whole", **args))
    train(script, small_args(script, tmp_path / "parts", **(args | {"total_timesteps": 660})))
    train(script, resumed_args(script, tmp_path / "parts", total_timesteps=1320))
    assert [row for row in read_metrics(tmp_path / "parts") if row["step"] != "660"] == read_metrics(tmp_path / "whole")
    whole, parts = (checkpoint_of(tmp_path / name) for name in ("whole", "parts"))
    torch.testing.assert_close(parts.networks, whole.networks, rtol=0, atol=0)
    torch.testing.assert_close(parts.optimizer["state"], whole.optimizer["state"], rtol=0, atol=0)
    torch.testing.assert_close(parts.replay, whole.replay, rtol=0, atol=0)


@pytest.mark.parametrize("flags", [{"use_g": False}, {"use_g": False, "use_f": False}, {"mixer": "vdn"}, {"tau": 0.04}])
def test_variants_train(flags, tmp_path):
    assert train(sq, small_args(sq, tmp_path, **flags))["updates"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["of different lengths", "of one length"])
def test_a_gpu_computes_the_losses_and_gradients_of_a_cpu(kind, monkeypatch):
    """On a batch of the usual size, with its best action as u', since the devices' random numbers differ."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(sq, "sample_action", sq.greedy_action)
    torch.manual_seed(0)
    args = make_args(sq, map="protoss_5_vs_5", alpha=0.3)
    env, rng = sq.make_env(args, 4, 0), np.random.default_rng(0)
    networks = common.make_networks(sq, args, game=env)
    lengths = [60] * 128 if kind == "of one length" else rng.integers(20, 100, 128).tolist()
    episodes = [random_episode(n, np.random.default_rng(i), game=env) for i, n in enumerate(lengths)]
    results = []
    for device in (CPU, torch.device("cuda")):
        batch, _ = make_batch(sq, episodes, device=device)
        networks.zero_grad()
        loss, logs = sq.compute_losses(networks.to(device), batch, args)
        loss.backward()
        gradients = {name: p.grad.cpu() for name, p in networks.named_parameters() if p.grad is not None}
        results.append(gradients | {name: value.cpu() for name, value in logs.items()})
    assert results[0].keys() > {"critic.agent.gru.weight_hh_l0", "critic.g.w1.0.weight", "f.w.0.weight", "td"}
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item())


@pytest.mark.gpu
@over(common.SMACV2 + common.MPE)
def test_a_run_on_a_gpu_goes_on_without_one(script, tmp_path):
    """And its policy is a CPU's."""
    assert train(script, small_args(script, tmp_path, total_timesteps=800))["updates"] > 0
    assert common.config_of(tmp_path)["device"] == "cuda"
    assert {value.device.type for value in checkpoint_of(tmp_path).policy["agent"].values()} == {"cpu"}
    assert train(script, resumed_args(script, tmp_path, total_timesteps=1000, cuda=False))["env_steps"] == 1000


# --- The command line ---


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
    "--run-dir README.md/run": "README.md/run cannot be used",
    "--num-envs many": "num-envs",
    "--learning-rate inf": "--learning-rate",
    "--resume a --evaluate b": "a/checkpoint.pt holds no checkpoint of this version of softqmix_smacv2: there is no",
    "--env-options prob_obs_enemy 0": "The simulator has no option prob_obs_enemy",
    "--env-options enemy_wipe maybe": "enemy_wipe",
    "--env-options speed 2": "no option speed",
    "--env-options seed 3": "--env-options cannot set map_name, num_envs or seed: use --map, --num-envs or --seed",
    f"--run-dir {300 * 'x'}": "cannot be used",
    f"--resume {300 * 'x'}": "there is no such file",
    "--backend starcraft2": "docs/starcraft2.md",
    "--check-env": "docs/starcraft2.md",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options_get_one_sentence_and_exit_code_2(options, tmp_path, monkeypatch, capsys):
    """And nothing is made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").touch()
    monkeypatch.setenv("SC2PATH", str(tmp_path / "no game"))
    backend = [] if "--backend" in options or "--check-env" in options else ["--backend", "sim"]
    code, output = run_main(sq, capsys, *options.split(), *backend, "--total-timesteps", 8)
    assert code == 2
    assert BAD_OPTIONS[options] in output
    assert "Traceback" not in output
    if "--help" not in output:  # tyro's own message, for malformed numbers
        assert len(output.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@over(SMACV2)
def test_options_of_the_game_reach_it(script, tmp_path, monkeypatch, capsys):
    options = ["--map", "terran_3_vs_2", "--backend", "sim", "--env-options", "enemy_wipe", "True"]
    options += ["reward_scale", "first_episode", "--total-timesteps", 4, "--eval-episodes", 2, "--run-dir", tmp_path]
    assert run_main(script, capsys, *options)[0] == 0
    options = common.config_of(tmp_path)["args"]
    assert options["env_options"] == {"enemy_wipe": True, "reward_scale": "first_episode"}
    env, eval_env, *_ = script.prepare(script.Args(**options))
    assert {(game.enemy_wipe, game.reward_scale) for game in (env, eval_env)} == {(True, "first_episode")}
    assert run_main(script, capsys, "--resume", tmp_path, "--total-timesteps", 8)[0] == 0
    seen, make_env = [], script.make_env
    monkeypatch.setattr(script, "make_env", lambda args, *rest: seen.append(args.env_options) or make_env(args, *rest))
    assert run_main(script, capsys, "--evaluate", tmp_path, "--env-options", "enemy_wipe", "False")[0] == 0
    assert seen == [{"enemy_wipe": False, "reward_scale": "first_episode"}] * 2  # what is not given is as it was
    asked, results = [], {"return_mean": 1.0, "return_std": 1.0, "win_rate": 0.5}
    monkeypatch.setattr(script, "evaluate", lambda *inputs: asked.append(inputs[3]) or results)
    assert run_main(script, capsys, "--evaluate", tmp_path, "--seed", 7)[0] == 0
    assert asked == [[7, 2**40]]  # battles that no test of a run has
    monkeypatch.undo()
    line = ("--resume", tmp_path, "--total-timesteps", 12, "--env-options", "enemy_wipe", "False")
    assert "error: env_options is" in one_sentence(run_main(script, capsys, *line))


def test_a_policy_of_another_map_gets_one_sentence(finished_run, capsys):
    sentence = one_sentence(run_main(sq, capsys, "--evaluate", finished_run[0], "--map", "zerg_5_vs_5"))
    assert "other sizes than zerg_5_vs_5" in sentence


@pytest.mark.parametrize("during", ["a test", "a battle"])
@over(SMACV2)
def test_a_game_lost_for_good_costs_no_steps(script, during, tmp_path, monkeypatch, capsys):
    """One sentence, exit code 1, and a checkpoint of the step at which it was lost."""
    tests, steps, evaluate, step = [], [], script.evaluate, SMACv2Sim.step

    def lose():
        raise ConnectionError("StarCraft II failed")

    def evaluate_or_lose(*arguments):
        tests.append(tuple(arguments[3]))
        return lose() if during == "a test" and len(tests) == 3 else evaluate(*arguments)

    def step_or_lose(env, action):
        steps.append(len(tests)) if env.num_envs == 3 else None
        return lose() if during == "a battle" and len(steps) == 200 else step(env, action)

    monkeypatch.setattr(script, "evaluate", evaluate_or_lose)
    monkeypatch.setattr(SMACv2Sim, "step", step_or_lose)
    options = vars(small_args(script, tmp_path, num_envs=3, total_timesteps=1200, eval_interval=300))
    with pytest.raises(ConnectionError):
        train(script, script.Args(**options))
    lost_at = 600 if during == "a test" else 3 * 199
    assert checkpoint_of(tmp_path).counts[0] == lost_at
    assert checkpoint_of(tmp_path).policy["agent"]
    assert run_main(script, capsys, "--resume", tmp_path, "--total-timesteps", 750)[0] == 0
    assert [row["step"] for row in read_metrics(tmp_path)] == ["0", "300", "600", "750"]
    assert len(set(tests)) == 4  # each test has battles of its own


def test_a_lost_game_gets_one_sentence(tmp_path, monkeypatch, capsys):
    def lose(*_):
        raise ConnectionError("StarCraft II failed")

    monkeypatch.setattr(sq, "evaluate", lose)
    code, output = run_main(sq, capsys, "--backend", "sim", "--run-dir", tmp_path, "--total-timesteps", 8)
    assert code == 1
    assert "error: StarCraft II failed" in output
    assert "Traceback" not in output


@over(SMACV2)
def test_evaluate_prints_the_win_rate_with_wilsons_interval(script, tmp_path, monkeypatch, capsys):
    train(script, small_args(script, tmp_path, total_timesteps=4))
    for wins, low, high in ((8, 0.490, 0.943), (0, 0.0, 0.278), (10, 0.722, 1.0)):
        result = {"return_mean": 1.5, "return_std": 0.25, "win_rate": wins / 10}
        monkeypatch.setattr(script, "evaluate", lambda *_, result=result: result)
        for what in (tmp_path, tmp_path / "policy.pt"):
            code, output = run_main(script, capsys, "--evaluate", what, "--eval-episodes", 10)
            assert code == 0
            assert "NOT StarCraft II" in output
            numbers = re.search(r"win rate ([\d.]+) \(95 % interval ([\d.]+) to ([\d.]+)\)", output).groups()
            assert list(map(float, numbers)) == [wins / 10, low, high]
            assert "return 1.50 +- 0.25 in 10 battles" in output


def test_evaluate_plays_the_policy(finished_run, capsys):
    outputs = {run_main(sq, capsys, "--evaluate", finished_run[0], "--eval-episodes", 8) for _ in range(2)}
    ((code, output),) = outputs
    assert code == 0
    assert "in 8 battles" in output


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


@pytest.mark.parametrize("seed", [1, 2, 3, pytest.param(4, marks=pytest.mark.gpu)])
def test_it_learns(seed, tmp_path):
    """Greedy test battles return more than random play's mean by at least 4 standard errors of the difference."""
    settings = dict(total_timesteps=6000, eval_interval=6000, eval_episodes=128, batch_size=32, buffer_size=1000)
    result = train(sq, small_args(sq, tmp_path, seed=seed, target_update_interval=40, **settings))["eval"]
    mean, deviation = random_play("terran_3_vs_2", 512)
    standard_error = math.sqrt(result["return_std"] ** 2 / 128 + deviation**2 / 512)
    assert result["return_mean"] > mean + 4 * standard_error
