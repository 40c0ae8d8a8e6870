"""handout.py: its table is right, each exercise fails without its functions, passes with them."""

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from handout import EXERCISES, find, write_copy

FUNCTIONS = []  # (file, name)
for exercise in EXERCISES:
    FUNCTIONS += [(exercise["file"], name) for name in exercise["functions"]]


def handout(out):
    return subprocess.run(
        [sys.executable, f"{ROOT}/tests/handout.py", str(out)], capture_output=True, text=True
    )


def put_back(copy, file, name):
    """Give a function of the copy its body again."""
    source = (ROOT / file).read_text()
    changed = (copy / file).read_text()
    ours = find(source, name)
    theirs = find(changed, name)
    body = source.split("\n")[ours.lineno - 1 : ours.end_lineno]
    lines = changed.split("\n")
    lines[theirs.lineno - 1 : theirs.end_lineno] = body
    (copy / file).write_text("\n".join(lines))


def results(copy, exercises):
    """What became of each exercise's tests in the copy: a set of "PASSED" and "FAILED".

    FAILED is by NotImplementedError alone; any other end of a test, a skip too, is an error here.
    """
    tests = []
    for exercise in exercises:
        tests += exercise["tests"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rfEp", "--tb=no", *tests],
        cwd=copy,
        env=os.environ | {"COLUMNS": "300"},
        capture_output=True,
        text=True,
    )
    ends = {test: set() for test in tests}
    for word, test, why in re.findall(r"^(PASSED|FAILED) ([^\s\[]+)\S*(.*)$", done.stdout, re.M):
        assert word == "PASSED" or why.startswith(" - NotImplementedError"), (test, why)
        ends[test].add(word)
    assert all(ends.values()), done.stdout[-3000:] + done.stderr[-1000:]
    return [set().union(*(ends[test] for test in exercise["tests"])) for exercise in exercises]


def test_the_table_names_what_is_there():
    assert len(EXERCISES) == 8
    assert len(set(FUNCTIONS)) == len(FUNCTIONS)
    page = (ROOT / "assets/course.md").read_text()
    for file, name in FUNCTIONS:
        node = find((ROOT / file).read_text(), name)
        assert ast.get_docstring(node), name
        assert len(node.body) > 1, name
        assert f"`{name}`" in page
    for exercise in EXERCISES:
        for test in exercise["tests"]:
            file, name = test.split("::")
            assert find((ROOT / file).read_text(), name)
            assert f" {name}" in page


@pytest.mark.slow
def test_exercises_fail_and_pass_again(tmp_path):
    copy = tmp_path / "copy"
    done = handout(copy)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pytest tests/") == 8
    assert {f.name for f in ROOT.glob("*.py")} == {f.name for f in copy.glob("*.py")}
    assert (copy / "assets" / "toy_decoder.pt").exists()
    assert (copy / "LICENSE").exists()
    assert not (copy / ".git").exists()
    assert not list(copy.rglob("*.pyc"))

    assert results(copy, EXERCISES) == [{"FAILED"}] * 8
    for file, name in FUNCTIONS:
        put_back(copy, file, name)
    for file, _ in FUNCTIONS:
        assert (copy / file).read_bytes() == (ROOT / file).read_bytes()
    assert results(copy, EXERCISES) == [{"PASSED"}] * 8


@pytest.mark.slow
def test_exercises_can_be_done_in_their_order(tmp_path):
    """With those before it done an exercise still fails, and with its own functions it passes."""
    copy = tmp_path / "copy"
    write_copy(copy)
    assert results(copy, EXERCISES[:1]) == [{"FAILED"}]
    for i, exercise in enumerate(EXERCISES):
        for name in exercise["functions"]:
            put_back(copy, exercise["file"], name)
        got = results(copy, EXERCISES[i : i + 2])  # this one and the next
        assert got == [{"PASSED"}, {"FAILED"}][: len(got)], exercise["title"]


def test_mistakes(tmp_path):
    thesis = tmp_path / "used" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("x")
    for out, message in (
        (thesis.parent, "not an empty folder"),
        (ROOT / "copy", "inside the repository"),
        (thesis, "not an empty folder"),
        (thesis / "copy", "Not a directory"),
    ):
        done = handout(out)
        assert done.returncode == 1
        assert re.fullmatch(f"error: .*{message}.*\n", done.stderr), done.stderr
