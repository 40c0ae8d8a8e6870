"""handout.py: an exercise fails without its functions and passes with them; grading."""

import ast
import json
import os
import re
import subprocess
import sys
import zipfile

import handout as kit
import pytest
from conftest import ROOT
from handout import EXERCISES, find, lines_of, replace, write_copy
from hidden import CASES

FUNCTIONS = []  # (file, name)
for exercise in EXERCISES:
    FUNCTIONS += exercise["functions"]
NUMBERS = range(1, len(EXERCISES) + 1)
FILES = sorted({file for file, _ in FUNCTIONS})


def handout(*arguments, cwd=None):
    command = [sys.executable, f"{ROOT}/extras/course/handout.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def put_back(copy, file, name):
    """Restore the body of a function in the copy."""
    text = lines_of((ROOT / file).read_text(), name)
    (copy / file).write_text(replace((copy / file).read_text(), name, text))


def results(copy, exercises):
    """How each exercise's tests end in the copy: a set of "PASSED" and "FAILED".

    A test may fail only because of a missing function. Any other end, even a skip, is an error.
    """
    tests = []
    for exercise in exercises:
        tests += exercise["tests"]
    flags = ["-q", "-rfEp", "--tb=no", "-m", "slow or not slow"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, *tests],
        cwd=copy,
        env=os.environ | {"COLUMNS": "300"},
        capture_output=True,
        text=True,
    )
    ends = {test: set() for test in tests}
    for word, test, why in re.findall(r"^(PASSED|FAILED) ([^\s\[]+)\S*(.*)$", done.stdout, re.M):
        assert word == "PASSED" or "exercise" in why or "SystemExit" in why, (test, why)
        ends[test].add(word)
    assert all(ends.values()), done.stdout[-3000:] + done.stderr[-1000:]
    return [set().union(*(ends[test] for test in exercise["tests"])) for exercise in exercises]


def test_the_table_of_exercises():
    assert len(EXERCISES) == 12
    assert len(set(FUNCTIONS)) == len(FUNCTIONS)
    page = (ROOT / "docs/course.md").read_text()
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
    assert CASES.keys() == {exercise["title"] for exercise in EXERCISES}
    sittings = [exercise["sitting"] for exercise in EXERCISES]
    assert sittings == sorted(sittings)


def test_the_copy_holds_no_answers(tmp_path):
    copy = tmp_path / "copy"
    done = handout(copy)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pytest ") == 12
    assert {f.name for f in ROOT.glob("*.py")} == {f.name for f in copy.glob("*.py")}
    assert (copy / "toy/decoder.pt").exists()
    for name in ("LICENSE", "pyproject.toml", "docs/method.png", "extras/bench.py"):
        assert (copy / name).exists(), name
    for name in (".git", "extras/course/hidden.py", "extras/course/mutants.py"):
        assert not (copy / name).exists()
    assert not list(copy.rglob("*.pyc"))
    texts = "".join(path.read_text() for path in copy.rglob("*.py"))
    for file, name in FUNCTIONS:
        source = (ROOT / file).read_text()
        body = lines_of(source, name).split("\n")[find(source, name).body[0].end_lineno :]
        assert "\n".join(body) not in texts or not body
    readme = (copy / "README.md").read_text()
    for _, name in FUNCTIONS:
        assert f"`{name}`" in readme

    done = handout(tmp_path / "two", "--upto", 2)
    assert done.stdout.count("pytest ") == 8
    for file, name in [*EXERCISES[8]["functions"], *EXERCISES[10]["functions"]]:  # of sitting 3
        text = (tmp_path / "two" / file).read_text()
        assert lines_of(text, name) == lines_of((ROOT / file).read_text(), name)
    done = handout(tmp_path / "one", "--only", 5)
    assert re.findall(r"^\d+\.", done.stdout, re.M) == ["5."]


@pytest.mark.slow
def test_exercises_fail_and_pass_again(tmp_path):
    """An exercise fails until its own functions are written, even if earlier ones are."""
    copy = tmp_path / "copy"
    write_copy(copy, NUMBERS)
    assert results(copy, EXERCISES) == [{"FAILED"}] * 12
    for i, exercise in enumerate(EXERCISES):
        for file, name in exercise["functions"]:
            put_back(copy, file, name)
        got = results(copy, EXERCISES[i : i + 2])  # this one and the next
        assert got == [{"PASSED"}, {"FAILED"}][: len(got)], exercise["title"]


@pytest.mark.slow
def test_scripts_name_the_exercise_that_is_missing(tmp_path):
    """In one line, before any long work. After sitting 2, training draws samples."""
    copy = tmp_path / "copy"
    write_copy(copy, NUMBERS)

    def run(*command):
        return subprocess.run(
            [sys.executable, *command], cwd=copy, capture_output=True, text=True, timeout=60
        )

    for command, number in (("train_diffusion.py", 3), ("train_decoder.py", 1)):
        done = run(command)
        assert done.returncode == 1
        line = rf"error: exercise {number}, .*: pytest .*\n"
        assert re.fullmatch(line, done.stderr), done.stderr
    for exercise in EXERCISES:
        if exercise["sitting"] < 3:
            for file, name in exercise["functions"]:
                put_back(copy, file, name)
    tiny = "--steps 4 --global-batch-size 8".split()
    assert run("train_diffusion.py", *tiny).returncode == 0
    assert (copy / "out/diffusion/samples_0000004.png").exists()
    assert run("sample.py", "--num", "20", "--steps", "2").returncode == 0
    done = run("fid.py")
    assert re.fullmatch(r"error: exercise 9, frechet_distance in fid.py: .*\n", done.stderr)


def submission(path, change=lambda texts: None):
    """A zip of our own files, after a change to their texts."""
    texts = {file: (ROOT / file).read_text() for file in FILES}
    change(texts)
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in texts.items():
            archive.writestr(file, text)
    return path


@pytest.mark.slow
def test_grading(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def points(change, numbers=NUMBERS):
        kit.grade(submission(tmp_path / "a.zip", change), numbers)
        said = capsys.readouterr().out
        result = json.loads((tmp_path / "results.json").read_text())
        scores = [test["score"] for test in result["tests"]]
        assert sum(scores) == result["score"]
        return scores, said

    scores, _ = points(lambda texts: None)
    assert scores == [10] * 12
    scores, said = points(lambda texts: texts.clear())
    assert scores == [0] * 12
    assert "rae.py: missing" in said

    def wrong(texts):
        """Three wrong functions, a line elsewhere, a path outside, an endless loop, bad syntax."""
        dit_dh = texts["dit_dh.py"].replace("[-b, a]", "[b, -a]")
        dit_dh = dit_dh.replace("return alpha * t / (1 +", "return alpha * t / (2 +")
        texts["dit_dh.py"] = dit_dh.replace("import math\n", "import math\nimport os\n", 1)
        texts["rae.py"] = texts["rae.py"].replace("1 - d)", "d)")
        start = '    if dist == "uniform":\n'  # of draw_sigma
        decoder = texts["train_decoder.py"].replace(
            start, f"    while True:\n        pass\n{start}"
        )
        texts["train_decoder.py"] = decoder
        texts["fid.py"] += "\n)("
        texts["../evil.py"] = ""

    monkeypatch.setattr(kit, "SECONDS", 60)
    quick = [number for number in NUMBERS if number not in (6, 10, 12)]
    scores, said = points(wrong, quick)
    failed = [number for number, score in zip(quick, scores) if score == 0]
    assert failed == [2, 4, 7, 9, 11]
    assert "dit_dh.py: changed outside the exercises" in said
    assert "not finished after" in said
    assert "../evil.py: a path outside the zip, not read" in said
    assert not (tmp_path.parent / "evil.py").exists()


@pytest.mark.slow
def test_wrong_answers_fail_and_right_ones_pass():
    done = subprocess.run(
        [sys.executable, f"{ROOT}/extras/course/mutants.py"], capture_output=True, text=True
    )
    said = done.stdout.splitlines()
    assert len(said) == 2, done.stdout + done.stderr[-1000:]  # no surprises
    for line in said:
        found, count = re.match(r"(\d+) of (\d+)", line).groups()
        assert found == count


def test_mistakes(tmp_path):
    thesis = tmp_path / "used" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("x")
    for arguments, message in (
        ([thesis.parent], "not an empty folder"),
        ([ROOT / "copy"], "inside the repository"),
        ([thesis], "not an empty folder"),
        ([], "OUT: name a folder"),
        ([tmp_path / "x", "--only", "13"], "--only 13"),
        ([tmp_path / "x", "--only", "5,a"], "--only 5,a"),
        (["--grade", thesis], "thesis.tex: cannot be read"),
        (["--grade", tmp_path / "no.zip"], "no.zip: cannot be read"),
    ):
        done = handout(*arguments)
        assert done.returncode == 1
        assert re.fullmatch(f"error: .*{message}.*\n", done.stderr), done.stderr
