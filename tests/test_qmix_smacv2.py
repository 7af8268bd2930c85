"""qmix_smacv2.py where it differs from its twin: exploration, and that it learns."""

import math

import pytest
from common import PLAIN, over, small_args, train
from test_softqmix_smacv2 import random_play

import qmix_smacv2 as qm


@over(PLAIN)
@pytest.mark.parametrize(("step", "epsilon"), [(0, 1.0), (25_000, 0.7625), (100_000, 0.05), (10**7, 0.05)])
def test_epsilon_falls_linearly(script, step, epsilon):
    assert script.epsilon_at(step, script.Args(epsilon_anneal_time=100_000)) == pytest.approx(epsilon)


@pytest.mark.parametrize(
    ("field", "value"), [("epsilon_start", 1.5), ("epsilon_anneal_time", 0), ("map", "elf_1_vs_1")]
)
def test_bad_options_are_refused(field, value):
    with pytest.raises(qm.InputError, match=field.replace("_", "-")):
        qm.prepare(qm.Args(backend="sim", **{field: value}))


def test_it_learns(tmp_path):
    settings = dict(total_timesteps=12_000, eval_interval=12_000, eval_episodes=128, batch_size=32, buffer_size=1000)
    args = small_args(qm, tmp_path, target_update_interval=40, epsilon_anneal_time=4000, **settings)
    result = train(qm, args)["eval"]
    mean, deviation = random_play("terran_3_vs_2", 512)
    assert result["return_mean"] > mean + 4 * math.sqrt(result["return_std"] ** 2 / 128 + deviation**2 / 512)
