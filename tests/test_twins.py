"""The pairs qmix_X.py / softqmix_X.py differ only in what the paper adds; what files share is letter-identical."""

import ast
import dataclasses
import difflib
import functools
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What differs within the pairs, and which words, as a regular expression, the differing lines contain. Everything else
# that two twins both define is the same to the letter.
DIFFERENCES = {
    "Args": r"exp_name|torch\.compile|L_pi|alpha|use_[gf]|temperature|g_i|f_i|epsilon|random action",
    "check_args": r"alpha|num_enemies|epsilon|impossible settings",
    "Critic": r"self\.g|local_q|Q_i",
    "Networks": r"self\.f|L_pi|theta-bar|self\.critic\.parameters",
    "td_lambda_targets": r"alpha|entropy|log_policy|soft|value|greedy",
    "compute_losses": r"alpha|entropy|log_policy|local_q|\bf\b|l(oss)?_pi|return loss_q|L_Q|Double Q|greedy_action",
    "act": r"alpha|policy|[Ee]psilon",
    "train": r"alpha|epsilon",
}
OPTIONS = {"alpha", "use_g", "use_f"}, {"epsilon_start", "epsilon_finish", "epsilon_anneal_time"}  # soft, plain
SOFT_ONLY = {"TransformG", "TransformF", "masked_log_policy", "sample_action", "soft_log_policy"}
QMIX_ONLY = {"epsilon_at", "epsilon_greedy"}
PAIRS = [("qmix_smacv2.py", "softqmix_smacv2.py"), ("qmix_mpe.py", "softqmix_mpe.py")]

# What the SMACv2 and the MPE scripts share.
SHARED = {
    "InputError", "Agent", "hypernetwork", "Mixer", "VDNMixer", "compile_networks", "greedy_action", "Batch", "Replay",
    "td_lambda_targets", "compute_losses", "update", "move_target", "CUDAGraphs", "act", "write_file", "write_metrics",
    "save_checkpoint", "load_file", "checkpoint_folder", "policy_file", "to_tensors", "to_arrays",
}  # fmt: skip


@functools.cache
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


def remains(line: str, others: list[str]) -> bool:
    """Whether the line's words and signs, but for commas, stand in the other lines in the same order."""
    line, others = (re.findall(r"\w+|[^\w\s,]", text) for text in (line, " ".join(others)))
    rest = iter(others)
    return all(token in rest for token in line)


@pytest.mark.parametrize(("plain", "soft"), PAIRS)
@pytest.mark.parametrize("name", DIFFERENCES)
def test_every_differing_line_is_about_what_the_paper_adds(plain, soft, name):
    """It contains one of the words above, or is what remains of the twin's lines without them."""
    ours, theirs = (definitions(file)[name].splitlines() for file in (plain, soft))
    for kind, i, j, k, m in difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        if kind != "equal":
            sides = (ours[i:j], theirs[k:m]), (theirs[k:m], ours[i:j])
            others = [line for lines, twins in sides for line in lines if not remains(line, twins)]
            assert [line for line in others if not re.search(DIFFERENCES[name], line)] == []


@pytest.mark.parametrize(("plain", "soft"), [*PAIRS, ("qmix_matrix.py", "softqmix_matrix.py")])
def test_twins_have_the_same_options_and_defaults(plain, soft):
    modules = (importlib.import_module(file.removesuffix(".py")) for file in (soft, plain))
    theirs, ours = ({f.name: (f.type, f.default) for f in dataclasses.fields(m.Args)} for m in modules)
    assert (theirs.keys() - ours.keys(), ours.keys() - theirs.keys()) == OPTIONS
    assert {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]} == {"exp_name"}


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
