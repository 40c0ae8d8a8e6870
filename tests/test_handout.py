"""handout.py: its table is right, each exercise fails without its functions and passes with them."""

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from handout import EXERCISES, find, write

FUNCTIONS = [(file, name) for _, file, names, *_ in EXERCISES for name in names.split()]
TESTS = [exercise[3].split() for exercise in EXERCISES]


def handout(out):
    return subprocess.run([sys.executable, f"{ROOT}/tests/handout.py", str(out)], capture_output=True,
                          text=True)


def put_back(copy, file, name):
    """Give a function of the copy its body again."""
    source, theirs = (ROOT / file).read_text(), (copy / file).read_text()
    a, b, lines = find(source, name), find(theirs, name), theirs.split("\n")
    lines[b.lineno - 1:b.end_lineno] = source.split("\n")[a.lineno - 1:a.end_lineno]
    (copy / file).write_text("\n".join(lines))


def results(copy, exercises):
    """What became of each exercise's tests in the copy: a set of "PASSED" and "FAILED".

    FAILED is by NotImplementedError alone; any other end of a test, a skip too, is an error here."""
    tests = [test for i in exercises for test in TESTS[i]]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rfEp", "--tb=no", *tests], cwd=copy,
                          env=os.environ | {"COLUMNS": "300"}, capture_output=True, text=True)
    said = dict.fromkeys(tests, ())
    for word, test, why in re.findall(r"^(PASSED|FAILED) ([^\s\[]+)\S*(.*)$", done.stdout, re.M):
        assert word == "PASSED" or why.startswith(" - NotImplementedError"), (test, why)
        said[test] = {word, *said[test]}
    assert all(said.values()), done.stdout[-3000:] + done.stderr[-1000:]
    return [set().union(*(said[test] for test in TESTS[i])) for i in exercises]


def test_the_table_names_what_is_there():
    assert len(EXERCISES) == 8 and len(set(FUNCTIONS)) == len(FUNCTIONS)
    for file, name in FUNCTIONS:
        node = find((ROOT / file).read_text(), name)
        assert ast.get_docstring(node) and len(node.body) > 1, name
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in readme for _, name in FUNCTIONS)
    for file, name in (test.split("::") for tests in TESTS for test in tests):
        assert find((ROOT / file).read_text(), name) and f" {name}" in readme


def test_exercises_fail_and_pass_again(tmp_path):
    copy, everything = tmp_path / "copy", range(len(EXERCISES))
    said = handout(copy)
    assert said.returncode == 0 and said.stdout.count("pytest tests/") == 8, said.stderr
    assert {f.name for f in ROOT.glob("*.py")} == {f.name for f in copy.glob("*.py")}
    assert (copy / "assets/toy_decoder.pt").exists() and (copy / "LICENSE").exists()
    assert not (copy / ".git").exists() and not list(copy.rglob("*.pyc"))
    assert results(copy, everything) == [{"FAILED"}] * 8
    for file, name in FUNCTIONS:
        put_back(copy, file, name)
    assert all((copy / file).read_bytes() == (ROOT / file).read_bytes() for file, _ in FUNCTIONS)
    assert results(copy, everything) == [{"PASSED"}] * 8


@pytest.mark.slow
def test_exercises_can_be_done_in_their_order(tmp_path):
    """With those before it done an exercise still fails, and with its own functions it passes."""
    write(tmp_path / "copy")
    assert results(tmp_path / "copy", [0]) == [{"FAILED"}]
    for i, (_, file, names, *_) in enumerate(EXERCISES):
        for name in names.split():
            put_back(tmp_path / "copy", file, name)
        got = results(tmp_path / "copy", range(i, min(i + 2, len(EXERCISES))))
        assert got == [{"PASSED"}, {"FAILED"}][:len(got)], f"exercise {i + 1} and the next"


def test_mistakes(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("x")
    for out, message in ((tmp_path / "used", "not an empty folder"), (ROOT / "copy", "inside the repository"),
                         (tmp_path / "used" / "thesis.tex", "not an empty folder"),
                         (tmp_path / "used" / "thesis.tex" / "copy", "Not a directory")):
        said = handout(out)
        assert said.returncode == 1 and re.fullmatch(f"error: .*{message}.*\n", said.stderr), said.stderr
