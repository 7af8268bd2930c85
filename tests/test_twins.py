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
    "Args": r"L_pi|alpha|use_[gf]|epsilon",
    "Critic": r"self\.g|Q_i",
    "Networks": r"self\.f|L_pi|theta-bar|phi|self\.critic\.parameters",
    "td_lambda_targets": r"alpha|log pi|log_policy|[Ss]oft|greedy",
    "compute_losses": r"alpha|entropy|log_policy|\.g\(|\bf\b|L_Q|l(oss)?_pi|loss_q, |Double Q|greedy_action|pieces|g's",
    "act": r"alpha|policy|[Ee]psilon",
    "train": r"alpha|epsilon",
}
SMACV2_DIFFERENCES = DIFFERENCES | {"prepare": r"alpha"}  # whose default depends on the map
OPTIONS = {"alpha", "use_g", "use_f"}, {"epsilon_start", "epsilon_finish", "epsilon_anneal_time"}  # soft, plain
SOFT_ONLY = {"TransformG", "TransformF", "masked_log_policy", "sample_action", "soft_log_policy"}
QMIX_ONLY = {"epsilon_at", "epsilon_greedy"}
PAIRS = [("qmix_smacv2.py", "softqmix_smacv2.py"), ("qmix_mpe.py", "softqmix_mpe.py")]

# What the SMACv2 and the MPE scripts share.
SHARED = {
    "Agent", "hypernetwork", "Mixer", "greedy_action", "act", "make_row", "sample_batch", "td_lambda_targets",
    "compute_losses", "update", "move_target", "InputError", "write", "load", "Unbroken",
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
    assert different == set(SMACV2_DIFFERENCES if "smacv2" in plain else DIFFERENCES)
    assert theirs.keys() - ours.keys() == SOFT_ONLY
    assert ours.keys() - theirs.keys() == QMIX_ONLY


@pytest.mark.parametrize(("plain", "soft"), PAIRS)
def test_the_diff_of_a_pair_is_short_enough_to_be_read_as_the_papers_contribution(plain, soft):
    ours, theirs = ((ROOT / file).read_text().splitlines() for file in (plain, soft))
    codes = difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes()
    changed = sum((j - i) + (m - k) for kind, i, j, k, m in codes if kind != "equal")
    assert 100 < changed <= 155


def remains(line: str, others: list[str]) -> bool:
    """Whether the line's words and signs, but for commas, stand in the other lines in the same order."""
    line, others = (re.findall(r"\w+|[^\w\s,]", text) for text in (line, " ".join(others)))
    rest = iter(others)
    return all(token in rest for token in line)


@pytest.mark.parametrize(("plain", "soft"), PAIRS)
@pytest.mark.parametrize("name", SMACV2_DIFFERENCES)
def test_every_differing_line_is_about_what_the_paper_adds(plain, soft, name):
    """It contains one of the words above, or is what remains of the twin's lines without them."""
    ours, theirs = (definitions(file)[name].splitlines() for file in (plain, soft))
    for kind, i, j, k, m in difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        if kind != "equal":
            sides = (ours[i:j], theirs[k:m]), (theirs[k:m], ours[i:j])
            others = [line for lines, twins in sides for line in lines if not remains(line, twins)]
            assert [line for line in others if not re.search(SMACV2_DIFFERENCES[name], line)] == []


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


def test_mappo_shares_what_means_the_same():
    ours, theirs = definitions("qmix_smacv2.py"), definitions("mappo_smacv2.py")
    assert {name for name in ours.keys() & theirs.keys() if ours[name] == theirs[name]} == {
        "InputError",
        "Unbroken",
        "evaluate",
        "evaluate_policy",
        "greedy_action",
        "load",
        "make_env",
        "write",
    }


def test_fop_shares_what_means_the_same_on_matrix_games():
    """With Soft-QMIX all but the learning and the check of its burn-in, and with QMIX the schedule of epsilon."""
    fop, soft, plain = (definitions(f"{name}_matrix.py") for name in ("fop", "softqmix", "qmix"))
    different = {name for name in fop.keys() & soft.keys() if fop[name] != soft[name]}
    assert different == {"Args", "Networks", "compute_losses", "prepare", "train"}
    assert fop.keys() - soft.keys() == {"Critic", "epsilon_at", "alpha_at", "acting_policy"}
    assert fop["epsilon_at"] == plain["epsilon_at"]
    lines = (set(source["prepare"].splitlines()) for source in (fop, soft))
    assert {re.sub(r"burn.in", "batch_size", line) for line in next(lines)} == {
        line.replace("batch-size", "batch_size") for line in next(lines)
    }


def test_fop_shares_what_means_the_same():
    """And is, in the order of qmix_smacv2.py, that script but for the method."""
    ours, theirs, soft = (definitions(f"{name}_smacv2.py") for name in ("qmix", "fop", "softqmix"))
    assert {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]} == {
        "Args", "Mixer", "Critic", "Networks", "epsilon_at", "act", "td_lambda_targets", "compute_losses", "update",
        "prepare", "train",
    }  # fmt: skip
    assert ours.keys() - theirs.keys() == {"hypernetwork", "epsilon_greedy"}
    assert theirs.keys() - ours.keys() == {"alpha_at", "masked_log_policy", "sample_action", "soft_value"}
    for name in ("masked_log_policy", "sample_action", "td_lambda_targets"):
        assert theirs[name] == soft[name]
    kept = [name for name in ours if name in theirs]
    assert kept == [name for name in theirs if name in ours]
    for name, words in {
        "prepare": r"burn_in|burn-in|sizes|batch_size|change one",
        "train": r"alpha|epsilon|RMSprop|Adam|actor|critic\.agent|burn_in|batch_size|sample_batch",
        "update": r"alpha|RMSprop|Adam|compute_losses",
    }.items():
        changed = [
            line for line in difflib.ndiff(ours[name].splitlines(), theirs[name].splitlines()) if line[0] in "+-"
        ]
        assert [line for line in changed if not re.search(words, line)] == []


def test_hasac_shares_what_means_the_same():
    ours = definitions("hasac_smacv2.py")
    for file, names in (
        ("qmix_smacv2.py", {"move_target"}),
        ("mappo_smacv2.py", {"has_choice", "masked_log_policy"}),
    ):
        theirs = definitions(file)
        assert {name for name in ours.keys() & theirs.keys() if ours[name] == theirs[name]} == names | {
            "InputError", "Unbroken", "evaluate", "evaluate_policy", "greedy_action", "load", "make_env", "write",
        }  # fmt: skip


def between(file: str) -> list[str]:
    """What stands between definitions: imports, constants, guards."""
    source = (ROOT / file).read_text()
    body = [n for n in ast.parse(source).body[1:] if not isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    return [ast.get_source_segment(source, node) for node in body]


@pytest.mark.parametrize(
    ("baseline", "words"),
    [("mappo_smacv2.py", "num_steps|batch_size|anneal_steps|made its"), ("hasac_smacv2.py", "buffer_size")],
)
def test_the_frame_of_a_baseline_is_that_of_qmix(baseline, words):
    """Definitions in the same order; refusals, command line, and the training loop but for playing, storing and
    learning, as in qmix_smacv2.py, unless a line is about what is learnt from or what learns."""
    ours, theirs = definitions("qmix_smacv2.py"), definitions(baseline)
    assert [name for name in ours if name in theirs] == [name for name in theirs if name in ours]

    def frame(source):
        before, _, loop = source.partition("# Act in all environments")
        return [line.strip() for line in (before + loop.partition("bar.close()")[2]).splitlines() if line.strip()]

    learner = r"cudnn|optimizer|replay|rollout|played|returns|hidden|row\b|E = |E, N = |saved\[|actor|critic\.agent"
    learner += r"|charts|alpha|Nothing was learnt"
    for name, what in (("prepare", words), ("main", "advice"), ("train", learner)):
        changed = [line for line in difflib.ndiff(frame(ours[name]), frame(theirs[name])) if line[0] in "+-"]
        assert [line for line in changed if not re.search(what, line)] == []
        assert len(changed) <= 40  # fewer than a third of train()'s lines


@pytest.mark.parametrize(
    ("baseline", "model", "unneeded"),
    [
        ("fop_smacv2.py", "qmix_smacv2.py", set()),
        ("mappo_smacv2.py", "qmix_smacv2.py", {"import copy", "from collections import deque"}),
        ("hasac_smacv2.py", "qmix_smacv2.py", {"from collections import deque"}),
        ("fop_matrix.py", "softqmix_matrix.py", {"from typing import Literal"}),
        ("qmix_matrix.py", "softqmix_matrix.py", set()),
    ],
)
def test_a_baseline_imports_and_guards_what_its_model_does(baseline, model, unneeded):
    """Its own options have ranges of their own; nothing else differs, but for imports that it does not need."""
    ours, theirs = ([line for line in between(file) if not line.startswith("RANGES")] for file in (baseline, model))
    assert ours == [line for line in theirs if line not in unneeded]
    assert set(theirs) - set(ours) == unneeded


@pytest.mark.parametrize(("plain", "soft"), PAIRS)
def test_what_stands_between_definitions_is_the_same(plain, soft):
    """Imports and constants, but for what Soft-QMIX's default of alpha and QMIX's epsilon need."""
    ours, theirs = between(plain), between(soft)
    assert [line for line in theirs if line not in ours and "parse_map_name" not in line] == []
    assert [line for line in ours if line not in theirs and "SMACv2Sim" not in line] == [
        'RANGES |= {"epsilon_start": (0, 1), "epsilon_finish": (0, 1)}'
    ]


@pytest.mark.parametrize("file", sorted(path.name for kind in ("smacv2", "mpe") for path in ROOT.glob(f"*_{kind}.py")))
def test_what_guards_a_scripts_start_and_output_is_the_same_everywhere(file):
    def guards(name):
        source = (ROOT / name).read_text()
        blocks = [n for n in ast.parse(source).body if isinstance(n, ast.If)]
        return [ast.get_source_segment(source, block) for block in blocks]

    assert len(guards(file)) == 2
    assert guards(file) == guards("softqmix_smacv2.py")
