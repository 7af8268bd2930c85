"""The house: how long a script may be, who may know whom, and that each script names what it needs."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("*_smacv2.py")) + sorted(ROOT.glob("*_mpe.py")) + sorted(ROOT.glob("*_matrix.py"))
LENGTHS = {  # lines, blank ones included: what a class can be taken through in an hour
    "softqmix_smacv2": 640, "qmix_smacv2": 580, "mappo_smacv2": 640, "fop_smacv2": 660, "hasac_smacv2": 660,
    "softqmix_mpe": 640, "qmix_mpe": 580, "softqmix_matrix": 350, "qmix_matrix": 315, "fop_matrix": 350,
}  # fmt: skip
PACKAGES = {"PIL": "pillow"}  # whose modules are called otherwise


def script_id(path: Path) -> str:
    return path.stem


def imported(path: Path) -> set[str]:
    """First names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


def requirements(text: str) -> dict[str, str]:
    """Package -> the whole requirement, of lines or of a PEP 723 list."""
    found = re.findall(r"^\s*\"?([\w-]+)((?:[<>=!~][^\s#\"]*)?)", text, re.MULTILINE)
    return {name.lower(): name + version for name, version in found}


@pytest.mark.parametrize("path", SCRIPTS, ids=script_id)
def test_a_script_is_one_lecture(path):
    """So that a reader can follow a whole algorithm in one file; a longer one has to lose what is not the algorithm."""
    text = path.read_text()
    assert len(text.splitlines()) <= LENGTHS[path.stem]
    assert max(map(len, text.splitlines())) <= 120


def test_no_script_knows_another_and_no_environment_knows_a_script():
    scripts = {path.stem for path in ROOT.glob("*.py")} | {"benchmarks", "tests"}
    for path in [*SCRIPTS, *ROOT.glob("envs/*.py")]:
        assert imported(path) & scripts == set(), path.name
    assert all("envs" in imported(path) for path in SCRIPTS if "matrix" not in path.stem)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
@pytest.mark.parametrize("path", SCRIPTS, ids=script_id)
def test_the_metadata_for_uv_are_the_requirements_of_what_is_imported(path):
    import tomllib

    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", path.read_text(), re.MULTILINE).group(1)
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    assert metadata["requires-python"] == ">=3.10"
    named = requirements("\n".join(metadata["dependencies"]))
    known = requirements((ROOT / "requirements.txt").read_text())
    assert {package: known.get(package) for package in named} == named
    modules = imported(path)
    for module in re.findall(r"^from (envs\.\w+) import", path.read_text(), re.MULTILINE):
        modules |= imported(ROOT / f"{module.replace('.', '/')}.py")
    needed = {PACKAGES.get(name, name).lower() for name in modules} & known.keys()
    assert needed <= named.keys()
