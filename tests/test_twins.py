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
PAIRS = [("qmix_smacv2.py", "softqmix_smacv2.py")]


def definitions(file: str) -> dict[str, str]:
    """Source of each class and function at the top level, decorators included."""
    source = (ROOT / file).read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
    return found


def differing(one: str, other: str) -> set[str]:
    ours, theirs = definitions(one), definitions(other)
    return {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}


@pytest.mark.parametrize(("plain", "soft"), PAIRS)
def test_twins_differ_only_where_the_algorithms_do(plain, soft):
    assert differing(plain, soft) == set(DIFFERENCES)
    ours, theirs = definitions(plain), definitions(soft)
    assert theirs.keys() - ours.keys() == {
        "TransformG", "TransformF", "masked_log_policy", "sample_action", "soft_log_policy"
    }  # fmt: skip
    assert ours.keys() - theirs.keys() == {"epsilon_at", "epsilon_greedy"}
