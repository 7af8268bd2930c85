"""The options' defaults and the networks' sizes, against the paper's tables."""

import pytest
from common import MPE, SMACV2, SOFT, make_args, make_networks, new_optimizer, over, parts

import fop_matrix
import qmix_matrix
import qmix_mpe
import qmix_smacv2
import softqmix_matrix
import softqmix_mpe
import softqmix_smacv2

TABLE_5 = {"hypernet_embed": 64, "embed_dim": 32}  # of mixer and g; f has one layer
TABLE_8 = {
    "num_envs": 4,  # "Batch Size Run"
    "buffer_size": 5000,
    "batch_size": 128,
    "learning_rate": 0.001,
    "mixer": "qmix",
}
TABLE_8_BOOTSTRAP = {"target_update_interval": 200, "td_lambda": 0.4}  # not in a game of one step
TABLE_8_QMIX = {"epsilon_start": 1.0, "epsilon_finish": 0.05, "epsilon_anneal_time": 100_000}
TABLE_8_QMIX_MPE = TABLE_8_QMIX | {"epsilon_anneal_time": 500_000}
TABLE_9 = {"protoss_5_vs_5": 0.03, "terran_10_vs_10": 0.005}

# What no table says. The number of steps is the text's (Table 8's t_max of SMACv2 lacks a digit), and so is MPE's alpha
# of 1.0, one of Table 3's three
ANY = {"max_grad_norm": 10.0, "seed": 1}
SOFT_ANY = {"use_g": True, "use_f": True}
LONG = {
    "gamma": 0.99, "tau": 1.0, "td_weight": 1.0, "episodes_per_update": 4, "checkpoint_interval": 500_000,
    "cuda": True, "track": False, "capture_video": False, "env_options": {}, "resume": None,
    "evaluate": None, "run_dir": None,
}  # fmt: skip
ON_SMACV2 = {
    "map": "protoss_5_vs_5", "backend": "auto", "total_timesteps": 10_050_000, "eval_interval": 10_000,
    "eval_episodes": 32,
}  # fmt: skip
ON_MPE = {
    "level": "hard", "backend": "batched", "total_timesteps": 10_000_000, "eval_interval": 20_000,
    "eval_episodes": 1000, "env": None,
}  # fmt: skip
ON_MATRIX = {
    "payoff": "table1", "num_seeds": 16, "total_timesteps": 10_000, "eval_interval": 500, "td_weight": 0.1,
    "run_dir": None,
}  # fmt: skip
FOP_ON_MATRIX = ON_MATRIX | {  # Table 10; what it leaves out is the released code's
    "num_envs": 1, "batch_size": 32, "buffer_size": 5000, "burn_in": 100, "learning_rate": 0.0005, "num_heads": 4,
    "epsilon_start": 1.0, "epsilon_finish": 0.05, "epsilon_anneal_time": 50_000, "alpha": None,
}  # fmt: skip
del FOP_ON_MATRIX["td_weight"]
BOTH_LONG = TABLE_8 | TABLE_8_BOOTSTRAP | ANY | LONG


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (softqmix_smacv2, BOTH_LONG | SOFT_ANY | ON_SMACV2),
        (qmix_smacv2, BOTH_LONG | TABLE_8_QMIX | ON_SMACV2),
        (softqmix_mpe, BOTH_LONG | SOFT_ANY | ON_MPE | {"alpha": 1.0}),
        (qmix_mpe, BOTH_LONG | TABLE_8_QMIX_MPE | ON_MPE),
        (softqmix_matrix, TABLE_8 | ANY | SOFT_ANY | ON_MATRIX | {"alpha": 1.0}),
        (qmix_matrix, TABLE_8 | ANY | TABLE_8_QMIX | ON_MATRIX | {"epsilon_anneal_time": 5000}),
        (fop_matrix, ANY | FOP_ON_MATRIX),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_defaults_are_the_papers(script, expected):
    defaults = vars(script.Args())
    assert {name: defaults[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("map_name", "alpha"),
    [
        *TABLE_9.items(),
        ("zerg_5_vs_6", 0.005),
        ("zerg_6_vs_5", 0.005),
        ("terran_3_vs_2", 0.03),
        ("zerg_10_vs_11", 0.005),
    ],
)
def test_alpha_is_table_9s(map_name, alpha):
    """Up to 5 a side .03, with more on either side .005; what is given stays."""
    assert make_args(softqmix_smacv2, map=map_name).alpha == alpha
    assert make_args(softqmix_smacv2, map=map_name, alpha=0.2).alpha == 0.2


def size(*layers) -> int:
    """Number of weights and biases of linear layers."""
    return sum(inputs * outputs + outputs for inputs, outputs in layers)


@over(SMACV2 + MPE)
def test_networks_have_table_5s_sizes(script):
    """With 3 agents, 5 actions, observations of 4 numbers and a state of 6; the agent's 64 units are in no table."""
    N, A, obs, S = 3, 5, 4, 6
    hyper, embed = TABLE_5["hypernet_embed"], TABLE_5["embed_dim"]

    def two(outputs):
        return [(S, hyper), (hyper, outputs)]

    expected = {
        "agent": size((obs + A + N, 64), (64, A)) + 2 * size((64, 3 * 64)),  # a GRU has two biases
        "mixer": size(*two(N * embed), (S, embed), *two(embed), *two(1)),
        "g": size(*two(N * embed), (S, N * embed), *two(N * embed), *two(N)),
        "f": size(*two(N), *two(N)),
    }
    found = {name: sum(p.numel() for p in part.parameters()) for name, part in
             parts(make_networks(script, make_args(script))).items() if "target" not in name}  # fmt: skip
    assert found == {name: expected[name] for name in (expected if script in SOFT else ("agent", "mixer"))}


@over(SMACV2 + MPE)
def test_optimizer_is_adam_for_everything_but_the_targets(script):
    """Theta and phi are groups of their own, both at the same rate (Table 8)."""
    networks = make_networks(script, args := make_args(script))
    optimizer = new_optimizer(script, networks, lr=args.learning_rate)
    theta = [name for name in parts(networks) if "target" not in name and name != "f"]
    groups = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    net = parts(networks)
    assert groups[0] == {id(p) for name in theta for p in net[name].parameters()}
    assert groups[1:] == ([{id(p) for p in net["f"].parameters()}] if script in SOFT else [])
