"""softqmix_smacv2.py as a program: its files, resume, the command line, what a GPU does, and that it learns."""

import copy
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

import common
import fake_cuda
import numpy as np
import pytest
import torch
from common import CPU, checkpoint_of, random_episode, read_metrics, train

import softqmix_smacv2 as sq
from envs.smacv2_sim import SMACv2Sim

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def small_args(run_dir, **changes) -> sq.Args:
    """A run of a few seconds."""
    settings = dict(map="terran_3_vs_2", total_timesteps=1200, batch_size=8, buffer_size=24, eval_interval=400)
    settings |= dict(eval_episodes=4, checkpoint_interval=10**6, target_update_interval=8, run_dir=str(run_dir))
    return sq.Args(**(settings | changes))


def make_networks(args: sq.Args, dtype=torch.float32):
    """Untrained networks, and the environment they are for."""
    sq.check_args(args)
    env = sq.make_env(args, 4, 0)
    return common.make_networks(sq, args, dtype, env), env


def make_batch(env, lengths, dtype=torch.float32, cut_off=(), pad=False, seed=0) -> tuple[sq.Batch, list[dict]]:
    """A batch of all stored episodes, and these in the batch's order."""
    episodes = common.random_episodes(lengths, seed, cut_off, game=env)
    batch = common.Replay(sq, len(lengths), episodes).memory.sample(len(lengths), CPU, pad)
    for name in ("obs", "state", "reward"):
        setattr(batch, name, getattr(batch, name).to(dtype))
    return batch, sorted(episodes, key=lambda episode: len(episode["reward"]), reverse=True)


# --- Padding, and what a GPU does ---


def test_padding_changes_no_gradient(monkeypatch):
    monkeypatch.setattr(sq, "sample_action", lambda log_policy, mask: log_policy.argmax(-1))
    networks, env = make_networks(args := small_args("unused"), torch.float64)
    gradients = []
    for pad in (False, True):
        batch, _ = make_batch(env, [3, 17, 5, 40], torch.float64, cut_off=(1,), pad=pad)
        assert len(batch.reward) == (4 * 64 if pad else 3 + 17 + 5 + 40)
        loss = sq.compute_losses(networks, batch, args)[0]
        parameters = [*networks.critic.parameters(), *networks.f.parameters()]
        gradients.append([loss, *torch.autograd.grad(loss, parameters)])
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)  # the policy is float32 from the logits on
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients[0])


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


@pytest.mark.parametrize(("lengths", "steps"), [([32, 5, 31], 32), ([33, 1], 64), ([7, 7, 7], 7)], ids=str)
def test_padding_repeats_an_episodes_last_rows(lengths, steps, monkeypatch):
    monkeypatch.setattr(torch, "randperm", torch.arange)  # so that the order of episodes of one length is known
    env = SMACv2Sim("zerg_2_vs_2", 1)
    batch, episodes = make_batch(env, lengths, pad=True)
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


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run") / "a"
    return run_dir, train(sq, small_args(run_dir))


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
    train(sq, small_args(tmp_path / "same"))
    train(sq, small_args(tmp_path / "other", seed=2))
    assert read_metrics(tmp_path / "same") == read_metrics(finished_run[0])
    assert read_metrics(tmp_path / "other") != read_metrics(finished_run[0])


@pytest.mark.parametrize("num_envs", [4, 3])
def test_resume_equals_the_uninterrupted_run_to_the_last_bit(num_envs, tmp_path):
    args = dict(num_envs=num_envs, total_timesteps=1320)
    train(sq, small_args(tmp_path / "whole", **args))
    train(sq, small_args(tmp_path / "parts", **(args | {"total_timesteps": 660})))
    (tmp_path / "parts" / "checkpoints" / "100.tmp").mkdir()  # as a killed run leaves it
    train(sq, small_args(tmp_path / "parts", resume=str(tmp_path / "parts"), **args))
    assert [row for row in read_metrics(tmp_path / "parts") if row["step"] != "660"] == read_metrics(tmp_path / "whole")
    whole, parts = (checkpoint_of(tmp_path / name).networks for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert sorted(p.name for p in (tmp_path / "parts" / "checkpoints").iterdir()) == ["1320", "660"]
    assert not (tmp_path / "parts" / "checkpoints" / "660" / "replay.pt").exists()


def test_resume_without_replay_refills_it_first(tmp_path):
    train(sq, small_args(tmp_path, total_timesteps=800, checkpoint_replay=False))
    before = json.loads((tmp_path / "summary.json").read_text())
    after = train(sq, small_args(tmp_path, total_timesteps=1600, resume=str(tmp_path)))
    refilled_at = -(-(before["episodes"] + 8) // 4)  # the first multiple of 4 episodes with 8 stored
    assert after["updates"] - before["updates"] == after["episodes"] // 4 - refilled_at + 1


@pytest.mark.parametrize("flags", [{"use_g": False}, {"use_g": False, "use_f": False}, {"mixer": "vdn"}, {"tau": 0.04}])
def test_variants_train(flags, tmp_path):
    assert train(sq, small_args(tmp_path, **flags))["updates"] > 0


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
        for i in range(20):
            batch, _ = make_batch(env, rng.integers(1, 30, 8).tolist(), seed=i)
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
            replay.add(random_episode(n, np.random.default_rng(i), game=env))
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
                replay.add(random_episode(int(n), rng, game=env))
            logs = learn(networks, optimizer, replay.sample(8, device, pad=True), args)
            logged.append(torch.stack(list(logs.values())).tolist())
            view = {name: value[0] for name, value in sq.to_tensors(random_episode(1, rng, game=env), device).items()}
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
    train(sq, small_args(tmp_path, resume=str(finished_run[0]), learning_rate=1e-5, total_timesteps=1240))
    groups = torch.load(tmp_path / "checkpoints" / "1240" / "training.pt")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [1e-5, 1e-5]


def test_resuming_an_older_checkpoint_needs_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    train(sq, small_args(run, total_timesteps=800, checkpoint_interval=400))
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
        train(sq, small_args(tmp_path, total_timesteps=1200, eval_interval=400))
    assert (tmp_path / "checkpoints" / "800" / "replay.pt").exists()
    train(sq, small_args(tmp_path, resume=str(tmp_path), total_timesteps=1000, eval_interval=400))
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
    train(sq, small_args(tmp_path / "run", total_timesteps=400))
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
    train(sq, small_args(tmp_path / "run", total_timesteps=400))
    monkeypatch.setattr(sq, "td_lambda_targets", lambda reward, *rest: reward + math.nan)
    code, output = run_main(monkeypatch, capsys, "--resume", tmp_path / "run", "--total-timesteps", 800)
    assert code == 1
    assert "not finite" in output
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["400"]
    assert all(value.isfinite().all() for value in checkpoint_of(tmp_path / "run").networks.values())


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
    assert train(sq, args)["env_steps"] == stopped_at + 40


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
    result = train(sq, small_args(tmp_path, seed=seed, target_update_interval=40, **settings))["eval"]
    mean, deviation = random_play("terran_3_vs_2", 512)
    standard_error = math.sqrt(result["return_std"] ** 2 / 128 + deviation**2 / 512)
    assert result["return_mean"] > mean + 4 * standard_error
