"""Documents point at lines of code: [`fragment`](../file.py#L7) in `function`. Such a line holds its fragment.

    python tests/test_docs.py        # after a script has changed: write the right numbers into the documents

A fragment stands on one line of its function; `Class.method`, `Class` or a constant may stand in the function's place.
"""

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = {path.name: path for path in sorted(ROOT.glob("docs/*.md"))}
LINK = r"\[`(?P<code>[^`\n]+)`\]\(\.\./(?P<file>[\w/]+\.py)#L(?P<line>\d+)\)"
REFERENCE = re.compile(LINK + r"\s+in\s+`(?P<where>[\w.]+)`")


@functools.cache
def spans(source: str) -> dict[str, range]:
    """Lines of each function, class, method (Class.method) and top-level constant."""
    found = {}

    def look(body, prefix):
        for node in body:
            names = [getattr(node, "name", None)]
            if isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            for name in filter(None, names):
                found[prefix + name] = range(node.lineno, node.end_lineno + 1)
                look(node.body if hasattr(node, "body") else (), f"{prefix}{name}.")

    look(ast.parse(source).body, "")
    return found


def right_line(reference: re.Match, source: str) -> int | str:
    """The number of the only line of that function with that fragment, or what is wrong with the reference."""
    code, file, where = reference["code"], reference["file"], reference["where"]
    if where not in spans(source):
        return f"{file} has no `{where}` any more (looked for `{code}`)"
    lines = source.splitlines()
    found = [number for number in spans(source)[where] if code in lines[number - 1]]
    if len(found) == 1:
        return found[0]
    return f"`{code}` stands on {len(found)} lines of `{where}` in {file}: {found}; it must be one"


def mistakes(text: str, read) -> list[str]:
    """One sentence for each reference that is not right; read(file) returns a file's source."""
    found = []
    for reference in REFERENCE.finditer(text):
        line = right_line(reference, read(reference["file"]))
        if line != int(reference["line"]):
            told = f"`{reference['code']}` in `{reference['where']}` of {reference['file']}"
            found.append(f"{told} is L{line}, not L{reference['line']}" if isinstance(line, int) else line)
    return found


def mended(text: str, read) -> str:
    """The text with the right numbers; what has no right number stays."""

    def mend(reference):
        line = right_line(reference, read(reference["file"]))
        link = f"{reference['file']}#L{{}})".format
        return reference[0].replace(link(reference["line"]), link(line)) if isinstance(line, int) else reference[0]

    return REFERENCE.sub(mend, text)


def read(file: str) -> str:
    path = ROOT / file
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("name", DOCUMENTS)
def test_references_point_at_the_lines_they_speak_of(name):
    wrong = mistakes(DOCUMENTS[name].read_text(), read)
    assert not wrong, f"docs/{name}: run python tests/test_docs.py\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_line_is_linked_in_another_form(name):
    text = DOCUMENTS[name].read_text()
    assert len(re.findall(r"\.py#", text)) == len(REFERENCE.findall(text))


def test_a_page_for_each_algorithm_points_into_its_scripts():
    for name in ("qmix", "softqmix", "mappo", "fop", "hasac"):
        files = {reference["file"] for reference in REFERENCE.finditer(DOCUMENTS[f"{name}.md"].read_text())}
        assert {path.name for path in ROOT.glob(f"{name}_*.py")} <= files, name
    assert len(REFERENCE.findall(DOCUMENTS["paper_to_code.md"].read_text())) >= 30


SOURCE = "A = 1\n\n\ndef f(x):\n    y = x + 1\n    return y\n\n\nclass C:\n    def f(self):\n        return 1\n"
MARKDOWN = "[`{}`](../a.py#L{})\nin `{}`"


@pytest.mark.parametrize(
    ("code", "line", "where", "complaint"),
    [
        ("y = x + 1", 5, "f", None),
        ("return 1", 11, "C.f", None),
        ("A = 1", 1, "A", None),
        ("y = x + 1", 6, "f", "`y = x + 1` in `f` of a.py is L5, not L6"),
        ("return 1", 5, "f", "`return 1` stands on 0 lines of `f` in a.py: []; it must be one"),
        ("y", 5, "f", "`y` stands on 2 lines of `f` in a.py: [5, 6]; it must be one"),
        ("y = x + 1", 5, "g", "a.py has no `g` any more (looked for `y = x + 1`)"),
    ],
)
def test_a_wrong_number_is_told_and_mended_and_only_that(code, line, where, complaint):
    text = "See " + MARKDOWN.format(code, line, where) + "."
    assert mistakes(text, lambda file: SOURCE) == ([complaint] if complaint else [])
    right = mended(text, lambda file: SOURCE)
    assert right == (text.replace("#L6", "#L5") if line == 6 else text)


if __name__ == "__main__":
    left = 0
    for name, path in DOCUMENTS.items():
        text = path.read_text()
        for wrong in mistakes(text, read):
            print(f"docs/{name}: {wrong}")
        if (right := mended(text, read)) != text:
            path.write_text(right)
        left += len(mistakes(right, read))
    print(f"{left} to mend by hand")
    sys.exit(left > 0)
