"""The loops of mappo_smacv2.py, fop_smacv2.py and hasac_smacv2.py: seeds, tests, checkpoints, clock, optimisers."""

import pytest
import torch
from common import config_of, logged_steps, read_metrics, resumed_args
from test_training import Clock, Clockwork, E, results_of

import fop_smacv2
import hasac_smacv2
import mappo_smacv2

OPTIONS = {
    mappo_smacv2: dict(num_steps=12, chunk_length=4, anneal_steps=2000),
    fop_smacv2: dict(batch_size=4, buffer_size=50, burn_in=6),
    hasac_smacv2: dict(batch_size=8, buffer_size=600, learning_starts=60),
}
pytestmark = pytest.mark.parametrize("script", OPTIONS, ids=lambda script: script.__name__)


def train(script, folder, env=Clockwork, clock=None, **changes) -> tuple[list, list, list]:
    """In the clockwork, with tests that play nothing. Returns the arguments of make_env and of evaluate, and the steps
    of the checkpoints."""
    made, tests, checkpoints, write = [], [], [], script.write

    def evaluate(*arguments):
        tests.append(arguments)
        return results_of(arguments[0])

    def spy(path, content):
        if path.name == "checkpoint.pt":
            checkpoints.append(content["step"])
        write(path, content)

    options = dict(num_envs=E, backend="sim", total_timesteps=360, eval_interval=100, checkpoint_interval=150)
    options |= OPTIONS[script] | ({} if "resume" in changes else {"run_dir": str(folder)}) | changes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "make_env", lambda *arguments: made.append(arguments) or env())
        patch.setattr(script, "evaluate", evaluate)
        patch.setattr(script, "write", spy)
        if clock:
            patch.setattr(script, "time", clock)
        script.train(script.Args(**options))
    return made, tests, checkpoints


def test_tests_and_checkpoints_come_at_the_first_step_after_their_interval(script, tmp_path):
    """Tests of all networks that were there, in other battles each time; training has the run's seed."""
    made, tests, checkpoints = train(script, tmp_path, seed=5)
    assert [int(row["step"]) for row in read_metrics(tmp_path)] == [0, 102, 201, 300, 360]
    assert [arguments[3] for arguments in tests] == [[5, step] for step in (0, 102, 201, 300, 360)]
    assert checkpoints == [0, 150, 300, 360]
    assert made[0][1:] == (E, 5)


def test_a_seed_fixes_the_run_and_another_gives_other_networks(script, tmp_path):
    means = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(script, tmp_path / name, seed=seed, total_timesteps=120)
        means.append([row["return_mean"] for row in read_metrics(tmp_path / name)])  # of the actor's parameters
    assert means[0] == means[1]
    assert means[0][0] != means[2][0]
    assert len(set(means[0])) > 1  # it has learnt something


def test_the_hours_of_a_resumed_run_are_those_of_its_parts(script, tmp_path):
    """A second a step of the batch, and none for the time between the two parts."""
    clock = Clock()
    train(script, tmp_path, clock.game, clock, total_timesteps=60)
    clock.now += 10_000
    train(script, tmp_path, clock.game, clock, total_timesteps=150, resume=str(tmp_path))
    rows = read_metrics(tmp_path, drop=())
    assert [int(row["step"]) for row in rows] == [0, 60, 102, 150]
    assert [float(row["seconds"]) for row in rows] == pytest.approx([0, 20, 34, 50], abs=0.11)


def test_tensorboard_shows_no_step_twice_after_a_kill(script, tmp_path):
    """What a killed process had logged after its last checkpoint is dropped there when that checkpoint is resumed."""
    train(script, tmp_path, total_timesteps=60)
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    for steps in (150, 210):
        (tmp_path / "checkpoint.pt").write_bytes(kept)
        train(script, tmp_path, total_timesteps=steps, eval_interval=30, resume=str(tmp_path))
    assert logged_steps(tmp_path, "eval/return_mean") == [0, 60, 90, 120, 150, 180, 210]


@pytest.mark.gpu
def test_a_run_on_a_gpu_goes_on_without_one(script, tmp_path):
    """In battles; and its policy is a CPU's."""
    options = dict(map="terran_3_vs_2", backend="sim", num_envs=E, total_timesteps=800, eval_episodes=4)
    assert script.train(script.Args(**options | OPTIONS[script], run_dir=str(tmp_path)))["updates"] > 0
    assert config_of(tmp_path)["device"] == "cuda"
    policy = torch.load(tmp_path / "policy.pt", weights_only=True)
    assert {value.device.type for value in policy["agent"].values()} == {"cpu"}
    resumed = resumed_args(script, tmp_path, total_timesteps=1000, cuda=False)
    assert script.train(resumed)["env_steps"] == 1002  # of three environments


def test_the_optimiser_is_as_described(script, tmp_path):
    train(script, tmp_path, total_timesteps=60)
    groups = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizer"]["param_groups"]
    adam = {"betas": (0.9, 0.999), "eps": 1e-5 if script is mappo_smacv2 else 1e-8, "weight_decay": 0, "amsgrad": False}
    rmsprop = {"alpha": 0.99, "eps": 1e-5, "weight_decay": 0, "momentum": 0, "centered": False}
    for group in groups:
        expected = rmsprop if script is fop_smacv2 else adam
        assert {name: group[name] for name in expected} == expected
