"""handout.py: an exercise fails without its functions and passes with them; grading."""

import ast
import json
import os
import re
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import handout as kit
import hidden
import pytest
import worker
from handout import EXERCISES, find, lines_of, replace, with_body, write_copy
from hidden import CASES

from tests.conftest import ROOT

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
    assert CASES.keys() == {exercise["title"] for exercise in EXERCISES}
    sittings = [exercise["sitting"] for exercise in EXERCISES]
    assert sittings == sorted(sittings)


@pytest.mark.slow
def test_the_copy_holds_no_answers(tmp_path):
    copy = tmp_path / "copy"
    done = handout(copy)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pytest ") == 12
    assert {f.name for f in ROOT.glob("*.py")} == {f.name for f in copy.glob("*.py")}
    assert (copy / "toy/decoder.pt").exists()
    for name in ("LICENSE", "pyproject.toml", "docs/images/method.png", "extras/budget.py"):
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
@pytest.mark.parametrize("numbers", [NUMBERS[:9], NUMBERS[9:11], NUMBERS[11:]])
def test_exercises_fail_and_pass_again(tmp_path, numbers):
    """An exercise fails until its own functions are written, even if earlier ones are."""
    copy = tmp_path / "copy"
    write_copy(copy, range(numbers[0], 13))  # earlier ones are written
    exercises = EXERCISES[numbers[0] - 1 :]
    assert results(copy, exercises) == [{"FAILED"}] * len(exercises)
    for number in numbers:
        exercise = EXERCISES[number - 1]
        for file, name in exercise["functions"]:
            put_back(copy, file, name)
        got = results(copy, EXERCISES[number - 1 : number + 1])  # this one and the next
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
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, text in texts.items():
            archive.writestr(file, text)
    return path


def grade(folder, change, numbers):
    """The points for exercises of a submission, and what the grader printed."""
    path = submission(folder / "a.zip", change)
    done = handout("--grade", path, "--only", ",".join(map(str, numbers)), cwd=folder)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "results.json").read_text())
    scores = [test["score"] for test in result["tests"]]
    assert sum(scores) == result["score"]
    return scores, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(1, 2, 3, 4, 5), (6,), (7, 8, 9, 11)])
def test_our_own_answers_get_all_points(tmp_path, numbers):
    scores, _ = grade(tmp_path, lambda texts: None, numbers)
    assert scores == [10] * len(numbers)


@pytest.mark.slow
def test_no_answers_get_no_points(tmp_path):
    scores, said = grade(tmp_path, lambda texts: texts.clear(), NUMBERS)
    assert scores == [0] * 12
    assert "rae.py: missing" in said


@pytest.mark.slow
def test_wrong_answers_get_no_points(tmp_path, monkeypatch, capsys):
    """Three wrong functions, a line elsewhere, a path outside, an endless loop, bad syntax."""

    def wrong(texts):
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

    monkeypatch.setattr(worker, "SECONDS", 30)
    monkeypatch.chdir(tmp_path)
    numbers = [2, 3, 4, 7, 9, 11]  # 3 is right
    kit.grade(submission(tmp_path / "a.zip", wrong), numbers)
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "results.json").read_text())
    failed = [number for number, test in zip(numbers, result["tests"]) if test["score"] == 0]
    assert failed == [2, 4, 7, 9, 11]
    assert "dit_dh.py: changed outside the exercises" in said
    assert "not finished after" in said
    assert "../evil.py: a path outside the zip, not read" in said
    assert not (tmp_path.parent / "evil.py").exists()


# Edits that make functions wrong, and the exercises whose hidden tests notice.
EXPERIMENTS = "extras/course/experiments.py"
ROUNDS = [
    (
        [
            ("train_decoder.py", " - mean.square()).clamp(min=0)", ").clamp(min=0)"),
            ("dit_dh.py", "max(1.0, math.sqrt(", "abs(math.sqrt("),
            ("dit_dh.py", "[-b, a]", "[b, -a]"),
            ("rae.py", "model.parameters()), 1 - d)", "model.parameters()), d)"),
            ("fid.py", "- 2 * trace_of_root", "- trace_of_root"),
            (EXPERIMENTS, '"--hold", steps // 2', '"--hold", steps // 3'),
            ("train_decoder.py", "sigma[:, None, None] * eps", "sigma.mean() * eps"),
            (EXPERIMENTS, '"--disc-weight", 0', '"--disc-weight", 0.1'),
        ],
        [1, 2, 4, 5, 7, 8, 9, 10, 11, 12],
    ),
    (
        [
            ("dit_dh.py", ".square().mean(dim=(1, 2))", ".abs().mean(dim=(1, 2))"),
            ("dit_dh.py", "F.silu(s + t_emb)", "F.silu(s + c)"),
            (EXPERIMENTS, 'f"{out}/samples.npz", "toy"', 'f"{out}/samples.npz", "other"'),
        ],
        [3, 5, 6, 8, 10],
    ),
    (
        [
            ("dit_dh.py", "v = v_null + cfg_scale * (v", "v = v + cfg_scale * (v"),
            ("dit_dh.py", "return torch.randn(n, generator", "return torch.rand(n, generator"),
            (EXPERIMENTS, "lr=4e-3", "lr=4e-4"),
            ("train_decoder.py", "tau * torch.rand(n, generator=generator,", "tau * torch.rand(n,"),
        ],
        [3, 6, 8, 11],
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("edits, numbers", ROUNDS)
def test_hidden_tests_notice_wrong_functions(tmp_path, edits, numbers):
    titles = [exercise["title"] for exercise in EXERCISES]
    files = kit.read_files() | {kit.HIDDEN: (ROOT / kit.HIDDEN).read_bytes()}
    command = (kit.HIDDEN, "../out", "7", *titles)
    assert kit.run_in_tree(tmp_path / "ours", files, *command) is None
    for file, old, new in edits:
        assert files[file].count(old.encode()) == 1, old
        files[file] = files[file].replace(old.encode(), new.encode())
    assert kit.run_in_tree(tmp_path / "theirs", files, *command) is None
    ours = {path.name: path.read_bytes() for path in (tmp_path / "ours/out").iterdir()}
    found = [hidden.difference(title, tmp_path / "theirs/out", ours) for title in titles]
    assert [number for number, why in zip(NUMBERS, found) if why] == numbers, found


def forward(code, first_lines="def forward(self, x):"):
    """A change to a submission: other code for RoPE2d.forward, exercise 4."""
    imports = "import os, signal, shutil, subprocess, sys, time\nfrom pathlib import Path\n"
    text = textwrap.indent(textwrap.dedent(first_lines), "    ") + "\n"
    text += textwrap.indent(imports + textwrap.dedent(code).strip(), " " * 8)

    def change(texts):
        texts["dit_dh.py"] = replace(texts["dit_dh.py"], "RoPE2d.forward", text)

    return change


# Code that a student hands in for RoPE2d.forward to get points without an answer.
FORGED_REPORT = """
    for word in sys.argv:
        if word.startswith("--junit-xml="):
            names = ("test_rope_turns_by_the_distance", "test_rope_by_hand")
            cases = [f'<testcase classname="tests.test_dit_dh" name="{name}"/>' for name in names]
            Path(word.split("=")[1]).write_text(f"<testsuite>{''.join(cases)}</testsuite>")
"""
CHEATS = {
    "exit": "os._exit(0)",
    "exec": "os.execv(shutil.which('true'), ['true'])",
    "exit at the end": "import atexit; atexit.register(os._exit, 0)",
    "pytest.exit": "import pytest; pytest.exit('done', returncode=0)",
    "skip": """
        import pytest
        if "PYTEST_CURRENT_TEST" in os.environ:
            pytest.skip("done")
        raise SystemExit(0)
        """,
    "patched pytest": """
        import _pytest.python
        _pytest.python.Function.runtest = lambda self: None
        import pytest
        if "PYTEST_CURRENT_TEST" in os.environ:
            pytest.skip("done")
        sys.exit(0)
        """,
    "forged report": FORGED_REPORT + "    os._exit(0)",
    "partial report": FORGED_REPORT.replace(', "test_rope_by_hand")', ",)") + "    os._exit(0)",
    "forged outputs": FORGED_REPORT
    + """
    if len(sys.argv) > 1 and sys.argv[1] == "../out":
        import numpy as np
        for i, shape in enumerate(((2, 3, 16, 12), (4, 4))):
            np.save(f"../out/rotations-{i}.npy", np.ones(shape))
    os._exit(0)
    """,
    "pickled outputs": FORGED_REPORT
    + """
    import numpy as np
    for i in range(2):
        np.save(f"../out/rotations-{i}.npy", np.array([Path()], dtype=object))
    os._exit(0)
    """,
    "our code next door": """
        import importlib.util
        folder = Path(__file__).resolve().parents[1]
        for path in [*folder.rglob("dit_dh.py"), *(Path(p, "dit_dh.py") for p in sys.path)]:
            if not path.exists() or path.resolve() == Path(__file__).resolve():
                continue
            spec = importlib.util.spec_from_file_location("ours", path)
            ours = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(ours)
            return ours.RoPE2d.forward(self, x)
        """,
    "emptied files": FORGED_REPORT
    + """
    for path in Path("..").resolve().rglob("*.py"):
        path.write_text("")
    os._exit(0)
    """,
    "open pipe": FORGED_REPORT
    + """
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    os._exit(0)
    """,
    "named pipes": """
        for path in ("../log", "../out/report.xml"):
            Path(path).unlink(missing_ok=True)
            os.mkfifo(path)
        os._exit(0)
        """,
    "unprintable reason": "Path('../log').write_text(chr(1)); os._exit(1)",
    "endless output": """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            while True:
                os.write(1, bytes(10**8))
        finally:
            os._exit(0)
        """,
}


@pytest.mark.slow
@pytest.mark.parametrize("code", CHEATS.values(), ids=CHEATS)
def test_cheating_gets_no_points(tmp_path, code):
    scores, said = grade(tmp_path, forward(code), [4])
    assert scores == [0], said


@pytest.mark.slow
def test_code_outside_bodies_does_not_run(tmp_path):
    """Decorators and default values: the body below them is right, so it gets its points."""
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    ours = lines_of((ROOT / "dit_dh.py").read_text(), "RoPE2d.forward").split("\n", 1)[1]
    change = forward("", f"@({code}, lambda f: f)[1]\ndef forward(self, x, y={code}):")

    def decorate(texts):
        change(texts)
        text = texts["dit_dh.py"]
        first = lines_of(text, "RoPE2d.forward").split("\n        import")[0]
        texts["dit_dh.py"] = replace(text, "RoPE2d.forward", f"{first}\n{ours}")
        assert code in texts["dit_dh.py"]

    scores, said = grade(tmp_path, decorate, [4])
    assert scores == [10]
    assert not (tmp_path / "ran").exists()
    assert "dit_dh.py: changed outside the exercises" in said


@pytest.mark.slow
def test_one_exercise_cannot_pass_on_answers(tmp_path):
    """Exercise 4 keeps its tree, and exercise 5 looks there for an answer."""
    stash = tmp_path / "stash.py"
    ours = lines_of((ROOT / "dit_dh.py").read_text(), "RoPE2d.forward").split("\n", 1)[1]
    keep = f"        import shutil; shutil.copy(__file__, {str(stash)!r})"
    use = f"""
        import importlib.util
        spec = importlib.util.spec_from_file_location("stash", {str(stash)!r})
        stash = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(stash)
        return stash.DiTDH.forward(self, x_t, t, y)
    """

    def change(texts):
        text = texts["dit_dh.py"]
        text = replace(text, "RoPE2d.forward", f"    def forward(self, x):\n{keep}\n{ours}")
        text = replace(text, "DiTDH.forward", "    def forward(self, x_t, t, y):\n" + use)
        texts["dit_dh.py"] = text

    scores, said = grade(tmp_path, change, [4, 5])
    assert scores == [10, 0]
    assert stash.exists()
    assert "exercise 5" in said  # the stub


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process can hide from the grader")
def test_no_process_survives_and_signals_do_not_stop_the_grader(tmp_path):
    """Exercise 4 sends signals, and leaves a process that gives itself points forever."""
    result = tmp_path / "results.json"
    change = forward(
        FORGED_REPORT
        + f"""
    for name in ("SIGHUP", "SIGTERM", "SIGUSR1", "SIGALRM", "SIGTSTP"):
        os.kill(os.getppid(), getattr(signal, name))
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
            while True:
                Path({str(result)!r}).write_text('{{"score": 100, "tests": []}}')
                time.sleep(0.1)
    time.sleep(1)
    os._exit(0)
    """
    )
    scores, _ = grade(tmp_path, change, [4, 7])
    assert scores == [0, 10]
    time.sleep(0.5)
    assert json.loads(result.read_text())["score"] == 10
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


@pytest.mark.slow
def test_a_killed_grader_leaves_no_result(tmp_path):
    path = submission(tmp_path / "a.zip", forward("os.kill(os.getppid(), signal.SIGKILL)"))
    (tmp_path / "results.json").write_text("of an earlier submission")
    assert handout("--grade", path, "--only", 4, cwd=tmp_path).returncode == -9
    assert not (tmp_path / "results.json").exists()


def test_honest_files_are_read(tmp_path):
    """With byte order marks and Windows' line ends, in a folder, next to files of other names."""
    ours = {file: (ROOT / file).read_text() for file in FILES}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("exercises/old/dit_dh.py", "old")
        archive.writestr("__MACOSX/exercises/._dit_dh.py", b"\x00\xff")
        for file, text in ours.items():
            text = text.replace("\n", "\r\n")
            archive.writestr(f"exercises/{file}", b"\xef\xbb\xbf" + text.encode())
    assert kit.read_submission(tmp_path / "a.zip") == (ours, [])


def test_bodies_are_put_into_our_signatures():
    ours = '@cache\ndef f(x):\n    """Doc."""\n    return x\n\n\ny = 1'
    for other, want in (
        (
            "@evil\ndef f(x=evil()):\n    # note\n    x = 2 * x\n    return x",
            "    x = 2 * x\n    return x",
        ),
        ("def f(x): return 'ä', x", "          return 'ä', x"),
        ("def f(\n    x\n): x = 1; return x", "   x = 1; return x"),
        ("def f(x):\n\tif x:\n\t\treturn x\ny = 2", "\tif x:\n\t\treturn x"),
    ):
        assert with_body(ours, "f", other) == f"@cache\ndef f(x):\n{want}\n\n\ny = 1"
        ast.parse(with_body(ours, "f", other))


@pytest.mark.parametrize("code", ["-" * 10**5 + "1", "1" + "+1" * 10**5, "(" * 10**5, "\0"])
def test_code_that_cannot_be_parsed(tmp_path, monkeypatch, capsys, code):
    monkeypatch.setattr(kit, "run_in_tree", lambda folder, *_: (Path(folder) / "out").mkdir())
    monkeypatch.chdir(tmp_path)
    kit.grade(submission(tmp_path / "a.zip", forward(f"return {code}")), [4])
    assert json.loads(Path("results.json").read_text())["score"] == 0
    assert len(capsys.readouterr().out.splitlines()) <= 3


def test_damaged_zips(tmp_path):
    """Whatever byte is wrong, the grader reads the zip or says so in one line."""
    data = submission(tmp_path / "a.zip").read_bytes()
    for position in range(0, len(data), len(data) // 300):
        damaged = bytearray(data)
        damaged[position] ^= 0x55
        (tmp_path / "b.zip").write_bytes(damaged)
        try:
            kit.read_submission(tmp_path / "b.zip")
        except kit.UsageError as error:
            assert "\n" not in str(error)


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


@pytest.mark.slow
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
