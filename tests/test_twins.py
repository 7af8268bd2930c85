"""The pairs qmix_X.py / softqmix_X.py differ only in what the paper adds; what files share is letter-identical."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What differs within the pairs, and why. Everything else that two twins both define is the same to the letter.
DIFFERENCES = {
    "Args": "alpha, use_g and use_f against epsilon's schedule",
    "check_args": "their limits",
    "Critic": "g",
    "Networks": "f",
    "td_lambda_targets": "the entropy term",
    "compute_losses": "the policy that chooses u', and L_pi",
    "act": "softmax policy against epsilon-greedy",
    "train": "act's last argument, and the log line of alpha or epsilon",
}
SOFT_ONLY = {"TransformG", "TransformF", "masked_log_policy", "sample_action", "soft_log_policy"}
QMIX_ONLY = {"epsilon_at", "epsilon_greedy"}
PAIRS = [("qmix_smacv2.py", "softqmix_smacv2.py"), ("qmix_mpe.py", "softqmix_mpe.py")]

# What the SMACv2 and the MPE scripts share.
SHARED = {
    "InputError", "Agent", "hypernetwork", "Mixer", "VDNMixer", "compile_networks", "greedy_action", "Batch", "Replay",
    "td_lambda_targets", "compute_losses", "update", "move_target", "act", "write_file", "write_metrics",
    "save_checkpoint", "load_file", "checkpoint_folder", "policy_file", "to_tensors", "to_arrays",
}  # fmt: skip


def definitions(file: str) -> dict[str, str]:
    """Source of each class and function at the top level, decorators included."""
    source = (ROOT / file).read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
    return found


@pytest.mark.parametrize(("plain", "soft"), PAIRS)
def test_twins_differ_only_where_the_algorithms_do(plain, soft):
    ours, theirs = definitions(plain), definitions(soft)
    different = {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    assert different == set(DIFFERENCES)
    assert theirs.keys() - ours.keys() == SOFT_ONLY
    assert ours.keys() - theirs.keys() == QMIX_ONLY


@pytest.mark.parametrize(
    ("smacv2", "mpe", "names"),
    [
        ("softqmix_smacv2.py", "softqmix_mpe.py", SHARED | SOFT_ONLY),
        ("qmix_smacv2.py", "qmix_mpe.py", SHARED | QMIX_ONLY),
    ],
)
def test_the_pairs_share_their_algorithms(smacv2, mpe, names):
    ours, theirs = definitions(smacv2), definitions(mpe)
    assert {name for name in names if ours[name] != theirs[name]} == set()


@pytest.mark.parametrize(("plain", "soft"), PAIRS)
def test_what_stands_between_definitions_differs_in_two_lines(plain, soft):
    """Imports and constants: only the algorithm's name, and the options that a resumed run cannot change."""

    def rest(file):
        source = (ROOT / file).read_text()
        body = [n for n in ast.parse(source).body[1:] if not isinstance(n, (ast.ClassDef, ast.FunctionDef))]
        return [ast.get_source_segment(source, node) for node in body]

    different = [(a, b) for a, b in zip(rest(plain), rest(soft), strict=True) if a != b]
    assert [a.split(" = ")[0] for a, _ in different] == ["ALGORITHM", "FIXED"]
