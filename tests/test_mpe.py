"""softqmix_mpe.py and qmix_mpe.py as programs: files, resume, seeds, video, bad input, and that they learn.

The environment and the mathematics have their own tests.
"""

import json

import pytest
import torch
from common import MPE, checkpoint_of, event_log, over, read_metrics, resumed_args, run_main, small_args, train
from PIL import Image

import softqmix_mpe
from envs.spread import Spread


def spread_args(script, run_dir, **changes):
    settings = dict(total_timesteps=1000, eval_interval=500, eval_episodes=5)
    return small_args(script, run_dir, **(settings | changes))


@over(MPE)
def test_run_leaves_the_promised_files_and_a_video(script, tmp_path):
    summary = train(script, spread_args(script, tmp_path, capture_video=True))
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert (summary["backend"], summary["env_steps"], summary["episodes"]) == ("batched", 1000, 40)
    assert summary["updates"] == 40 // 4 - 1  # the first one when 8 are stored
    assert summary["eval_mpe2"]["return_mean"] == pytest.approx(summary["eval"]["return_mean"], abs=1e-4)
    assert [row["step"] for row in read_metrics(tmp_path)] == ["0", "500", "1000"]
    video = Image.open(tmp_path / "evaluation.gif")
    shown = [video.seek(i) or video.info["duration"] for i in range(video.n_frames)]  # a still is one longer frame
    assert sum(shown) == 3 * (26 + 9) * 100  # the end of each episode is shown for a second
    images = event_log(tmp_path).Images("evaluation")
    assert images[0].encoded_image_string == (tmp_path / "evaluation.gif").read_bytes()


@over(MPE)
@pytest.mark.parametrize("backend", ["batched", "mpe2"])
def test_resume_equals_the_uninterrupted_run(script, backend, tmp_path):
    args = dict(backend=backend, total_timesteps=600, eval_interval=300)
    train(script, spread_args(script, tmp_path / "whole", **args))
    train(script, spread_args(script, tmp_path / "parts", **(args | {"total_timesteps": 300})))
    train(script, resumed_args(script, tmp_path / "parts", total_timesteps=600))
    assert read_metrics(tmp_path / "parts") == read_metrics(tmp_path / "whole")
    networks = [checkpoint_of(tmp_path / name).networks for name in ("whole", "parts")]
    assert all(torch.equal(networks[0][name], networks[1][name]) for name in networks[0])


def test_both_backends_train_alike_and_another_seed_differently(tmp_path):
    for name, changes in {"a": {}, "b": {"backend": "mpe2"}, "c": {"seed": 2}}.items():
        train(softqmix_mpe, spread_args(softqmix_mpe, tmp_path / name, total_timesteps=600, **changes))
    a, b, c = (read_metrics(tmp_path / name) for name in "abc")
    assert [float(row["return_mean"]) for row in a] == pytest.approx([float(row["return_mean"]) for row in b], abs=1e-3)
    assert a != c


@over(MPE)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--level harder", "harder"),
        ("--batch-size 64 --buffer-size 32", "--buffer-size"),
        ("--eval-episodes 0", "--eval-episodes"),
        ("--seed -1", "--seed"),
        ("--evaluate nowhere.pt", "nowhere.pt"),
        ("--env-options seed 3", "--env-options cannot set level, num_envs or seed: use --level"),
        ("--env-options level hard", "--env-options cannot set level, num_envs or seed"),
        ("--env mpe2.simple_reference_v3 --env-options make 1", "cannot be made with the options {'make': 1}"),
    ],
)
def test_bad_options_get_one_message_and_exit_code_2(script, options, expected, capsys):
    code, output = run_main(script, capsys, *options.split())
    assert code == 2
    assert expected in output
    assert "Traceback" not in output


@over(MPE)
@pytest.mark.parametrize("what", ["", "policy.pt"])
def test_evaluate_gives_both_backends_and_a_video(script, what, tmp_path, capsys):
    train(script, spread_args(script, tmp_path, total_timesteps=300))
    options = ["--evaluate", tmp_path / what, "--eval-episodes", 4, "--capture-video"]
    code, output = run_main(script, capsys, *options)
    assert code == 0
    assert "Spread (medium), batched" in output
    assert "Spread (medium), mpe2" in output
    assert (tmp_path / "evaluation.gif").exists()


def test_it_learns(tmp_path, monkeypatch):
    """Better than standing still, -204.2 on this level, by at least 4 standard errors; random play scores -218.4.

    alpha is 3: with the paper's 1, exploration this early depends on the seed.
    """
    settings = dict(level="simple", total_timesteps=8000, batch_size=32, buffer_size=600, eval_episodes=1000)
    settings |= dict(episodes_per_update=1, target_update_interval=20, eval_interval=8000, learning_rate=3e-3)
    monkeypatch.setattr(softqmix_mpe, "SpreadMPE2", Spread)  # the last test is not about mpe2, and costs more there
    result = train(softqmix_mpe, spread_args(softqmix_mpe, tmp_path, gamma=0.8, alpha=3.0, **settings))["eval"]
    assert result["return_mean"] > -204.2 + 4 * result["return_se"]
