"""The course: write a student's copy of this repository, and grade what comes back.

    python extras/course/handout.py ../exercises            # a new folder elsewhere
    python extras/course/handout.py ../exercises --upto 2   # only sittings 1 and 2
    python extras/course/handout.py ../exercises --only 4   # one exercise, or several with commas
    python extras/course/handout.py --grade submission.zip  # points, results.json; --upto

In the copy the functions of the exercises are stubbed out: signature and docstring stay and say
what to write. The copy has its own README, but no git history, which has the answers, and no hidden
tests. Each exercise is graded on its own: we put the submitted bodies of its functions into a fresh
copy of our files, run the visible tests there, and compare what the functions give on new inputs
with what ours give (hidden.py). This process never imports anything of the submission.
"""

import argparse
import ast
import io
import json
import lzma
import os
import secrets
import sys
import zipfile
import zlib
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import hidden  # noqa: E402
from worker import protect, run_in_tree, write_files  # noqa: E402

from rae import UsageError, run_script  # noqa: E402

COPIED = ("*.py", "requirements.txt", "pyproject.toml", "LICENSE", ".gitignore")
COPIED += ("toy", "docs", "extras", "tests")
# Answers, hidden tests, and tests of files that the copy lacks.
NOT_COPIED = ("__pycache__", "*.md", "lab.*", "why_shift.*", "claims.*", "to_diffusers.py")
NOT_COPIED += ("handout.py", "hidden.py", "mutants.py", "worker.py", "notebook.py")
NOT_COPIED += (
    "test_handout.py",
    "test_claims.py",
    "test_docs.py",
    "test_diffusers.py",
    "test_notebook.py",
)
HIDDEN = "extras/course/hidden.py"
# What ast raises for text that isn't Python, or is nested too deeply.
NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError)
# What zipfile raises for a bad archive, a RuntimeError for one with a password.
BAD_ZIP = (OSError, RuntimeError, ValueError, EOFError)
BAD_ZIP += (zipfile.BadZipFile, zlib.error, lzma.LZMAError)
# In rae.run_script: which errors a script prints as one line. In the copy that includes the error
# of a function that is still to be written.
CAUGHT = "except (UsageError, "
CAUGHT_IN_COPY = "except (UsageError, NotImplementedError, "

# Exercise 5's hint: the docstring alone does not say it.
DIT_DH = """The condition c is the time's embedding plus the label's. The plain DiT:

    x = x_embedder(x_t) + pos_embed     through all blocks (feat_rope) and final_layer, under c

With a wide head (section 5):

    s = s_embedder(x_t) + pos_embed     through the backbone (enc_feat_rope), under SiLU(c)
    s = s_projector(SiLU(s + t_emb))    one condition per token; t_emb embeds the time
    x = x_embedder(x_t), in float32     through the head (dec_feat_rope) and final_layer, under s

self.run_blocks runs blocks."""

EXERCISES = [
    {
        "sitting": 1,
        "minutes": 30,
        "title": "Latent statistics",
        "functions": [("train_decoder.py", "latent_statistics")],
        "tests": ["tests/test_train_decoder.py::test_statistics_equal_numpy"],
        "expect": "the mean and variance of every channel at every position, over all images and "
        "their mirror images, in one pass.",
        "paper": "section 3",
        "hints": {
            "latent_statistics": "rae.rank_batches(len(data), batch_size) gives the indices of "
            "every batch,\nand rae.read_batches(...) reads these images. If dist.is_initialized(), "
            "dist.all_reduce\nadds up the sums of all ranks."
        },
    },
    {
        "sitting": 1,
        "minutes": 30,
        "title": "Schedule shift",
        "functions": [
            ("dit_dh.py", "shift_alpha"),
            ("dit_dh.py", "shift_time"),
            ("dit_dh.py", "time_grid"),
        ],
        "tests": ["tests/test_dit_dh.py::test_shift", "tests/test_dit_dh.py::test_time_grid"],
        "expect": "256 tokens of 768 channels have alpha 6.928; times 0 and 1 are fixed. Answer in "
        "answers.txt: why the square root?",
        "paper": "section 4.2",
    },
    {
        "sitting": 1,
        "minutes": 30,
        "title": "Time and flow loss",
        "functions": [("dit_dh.py", "draw_time"), ("dit_dh.py", "flow_loss")],
        "tests": [
            "tests/test_dit_dh.py::test_draw_time",
            "tests/test_dit_dh.py::test_loss_is_zero_for_the_true_velocity",
            "tests/test_dit_dh.py::test_the_loss_by_hand",
            "tests/test_dit_dh.py::test_the_loss_draws_times_and_noise",
        ],
        "expect": "logit(t) has mean 0 and standard deviation 1; a model that knows the velocity "
        "has a loss of 0.",
        "paper": "appendix J",
    },
    {
        "sitting": 1,
        "minutes": 25,
        "title": "Rotary positions",
        "functions": [("dit_dh.py", "RoPE2d.forward")],
        "tests": [
            "tests/test_dit_dh.py::test_rope_turns_by_the_distance",
            "tests/test_dit_dh.py::test_rope_by_hand",
        ],
        "expect": "q k depends only on the number of rows and columns between two tokens; norms "
        "don't change.",
        "paper": "appendix D",
    },
    {
        "sitting": 2,
        "minutes": 40,
        "title": "DiT^DH",
        "functions": [("dit_dh.py", "DiTDH.forward")],
        "tests": [
            "tests/test_golden.py::test_velocity",
            "tests/test_golden.py::test_plain_dit",
            "tests/test_dit_dh.py::test_bf16_keeps_float32_where_it_matters",
            "tests/test_golden.py::test_loss",
        ],
        "expect": "the velocities of the official model, to 2e-5.",
        "paper": "section 5",
        "hints": {"DiTDH.forward": DIT_DH},
    },
    {
        "sitting": 2,
        "minutes": 40,
        "title": "Theorem 1",
        "functions": [("extras/course/experiments.py", "theorem_1")],
        "tests": [
            "extras/course/test_experiments.py::test_theorem_1_draws_uniform_times",
            "extras/course/test_experiments.py::test_theorem_1",
        ],
        "expect": "losses less than 0.1 above 1 - d / 128; with a head even a backbone of width 16 "
        "fits. Hand in figures/theorem_1.png.",
        "paper": "section 4.1",
    },
    {
        "sitting": 2,
        "minutes": 20,
        "title": "EMA",
        "functions": [("rae.py", "update_ema")],
        "tests": ["tests/test_rae.py::test_ema_warms_up_and_is_no_alias"],
        "expect": "after step 0 the EMA is 0.1 times the old plus 0.9 times the new weights.",
        "paper": "appendix D",
    },
    {
        "sitting": 2,
        "minutes": 50,
        "title": "Sampling and guidance",
        "functions": [("dit_dh.py", "sample")],
        "tests": [
            "tests/test_dit_dh.py::test_euler_is_exact_on_a_straight_flow",
            "tests/test_dit_dh.py::test_guidance_costs_and_formula",
            "tests/test_dit_dh.py::test_guidance_of_scale_1_costs_nothing",
            "tests/test_dit_dh.py::test_both_ends_of_the_interval_are_guided",
            "tests/test_golden.py::test_samples",
        ],
        "expect": "one Euler step is exact on a straight flow; CFG calls the model once per step, "
        "on 2 B latents. Now python train_diffusion.py draws your first pictures, in minutes: hand "
        "in its last samples_*.png.",
        "paper": "section 5.1, appendix I",
    },
    {
        "sitting": 3,
        "minutes": 30,
        "title": "Frechet distance",
        "functions": [("fid.py", "frechet_distance")],
        "tests": ["tests/test_fid.py::test_frechet_distance_of_gaussians"],
        "expect": "|mu1 - mu2|^2 + |sqrt(s1) - sqrt(s2)|^2 for diagonal covariances s1 and s2, but "
        "not for matrices that don't commute.",
        "paper": "appendix E",
    },
    {
        "sitting": 3,
        "minutes": 30,
        "title": "Sweep of the shift",
        "functions": [("extras/course/experiments.py", "shift_sweep")],
        "tests": [
            "extras/course/test_experiments.py::test_shift_sweep_runs_what_it_should",
            "extras/course/test_experiments.py::test_shift_sweep",
        ],
        "expect": "a distance that falls and rises again. Hand in figures/shift_sweep.png.",
        "paper": "section 4.2",
    },
    {
        "sitting": 3,
        "minutes": 40,
        "title": "Noise and the adaptive GAN weight",
        "functions": [
            ("train_decoder.py", "draw_sigma"),
            ("train_decoder.py", "add_noise"),
            ("train_decoder.py", "adaptive_weight"),
        ],
        "tests": [
            "tests/test_train_decoder.py::test_noise_levels_and_noise",
            "tests/test_train_decoder.py::test_adaptive_weight_by_hand",
        ],
        "expect": "with tau 0.8 sigma is 0.4 on average, 0.64 if half-normal; gradients (3, 3) and "
        "(2, 0) give a weight of 2.12, and a GAN gradient of 0 gives 10000. No gradient flows "
        "through the weight.",
        "paper": "section 4.3, appendix C",
    },
    {
        "sitting": 3,
        "minutes": 30,
        "title": "Sweep of the noise",
        "functions": [("extras/course/experiments.py", "noise_sweep")],
        "tests": [
            "extras/course/test_experiments.py::test_noise_sweep_runs_what_it_should",
            "extras/course/test_experiments.py::test_noise_sweep",
        ],
        "expect": "from clean tokens, PSNR falls with tau; from noisy ones it first rises. Hand "
        "in figures/noise_sweep.png.",
        "paper": "section 4.3",
    },
]


def find(source, name):
    """The syntax tree of the function "f" or "Class.method" in a file's text."""
    node = ast.parse(source)
    for part in name.split("."):
        node = next((child for child in node.body if getattr(child, "name", None) == part), None)
        if node is None:
            raise ValueError(f"{name} is missing")
    return node


def place_of(source, name):
    """The slice of a file's lines that hold a function, with its decorators."""
    node = find(source, name)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return slice(first - 1, node.end_lineno)


def replace(source, name, text):
    """A file's text with the function's lines replaced by `text`."""
    lines = source.split("\n")
    lines[place_of(source, name)] = text.split("\n")
    return "\n".join(lines)


def lines_of(source, name):
    """The text of a function."""
    return "\n".join(source.split("\n")[place_of(source, name)])


def with_body(source, name, other):
    """A file's text with a function's body from another text, and the signature that it had."""
    body = find(other, name).body
    lines = other.split("\n")[body[0].lineno - 1 : body[-1].end_lineno]
    first = lines[0].encode()
    before = first[: body[0].col_offset].decode()  # indentation; "def f(x): " if on the same line
    lines[0] = " " * len(before) if before.strip() else before
    lines[0] += first[body[0].col_offset :].decode()
    ours = lines_of(source, name).split("\n")
    node = find(source, name)
    kept = len(ours) - (node.end_lineno - node.body[0].lineno + 1)
    return replace(source, name, "\n".join([*ours[:kept], *lines]))


def without_body(source, name, message, hint=""):
    """A file's text with a function stubbed out: docstring, hint as a comment, and a raise."""
    node = find(source, name)
    lines = lines_of(source, name).split("\n")
    kept = len(lines) - (node.end_lineno - node.body[0].end_lineno)
    indent = " " * node.body[0].col_offset
    comment = [f"{indent}# {line}".rstrip() for line in hint.splitlines()]
    lines[kept:] = [*comment, f"{indent}raise NotImplementedError({message!r})"]
    return replace(source, name, "\n".join(lines))


# ---------------------------------------------------------------------------------------------
# The copy


def read_files():
    """{path: content} of what a student gets, with all bodies still there."""
    files = {}
    for pattern in COPIED:
        for top in ROOT.glob(pattern):
            for path in (top, *top.rglob("*")):
                parts = path.relative_to(ROOT).parts
                unwanted = any(fnmatch(part, name) for part in parts for name in NOT_COPIED)
                if path.is_file() and not unwanted:
                    files["/".join(parts)] = path.read_bytes()
    return files


def stub_out(files, numbers):
    """Remove the bodies of these exercises' functions."""
    for number in numbers:
        exercise = EXERCISES[number - 1]
        for file, name in exercise["functions"]:
            message = f"exercise {number}, {name} in {file}: {command_of(exercise)}"
            hint = exercise.get("hints", {}).get(name, "")
            files[file] = without_body(files[file].decode(), name, message, hint).encode()


def command_of(exercise):
    """The student's test command. Tests of experiments are marked slow."""
    flag = "-m slow " if "experiments" in exercise["tests"][0] else ""
    return f"pytest {flag}{' '.join(exercise['tests'])}"


def write_copy(out, numbers):
    """Write the copy, with these exercises, to a new or empty folder outside the repository."""
    out = Path(out).resolve()
    if ROOT in (out, *out.parents):  # pytest would find the copy's tests too
        raise UsageError(f"{out}: inside the repository; pass a folder outside")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out}: not an empty folder")
    files = read_files()
    stub_out(files, numbers)
    rae = files["rae.py"].decode().replace(CAUGHT, CAUGHT_IN_COPY)
    readme = student_readme(numbers)
    write_files(files | {"rae.py": rae.encode(), "README.md": readme.encode()}, out)
    submit = out / "submit.sh"
    submit.write_text(SUBMIT)
    submit.chmod(0o755)
    (out / "answers.txt").write_text("Schedule shift: why the square root?\n\n")


README = """# Exercises

You write the core of a Representation Autoencoder (https://arxiv.org/abs/2510.11690), from the
latents to your own samples. The functions below are stubbed out. Their docstrings, sometimes with a
comment, say what to write, and tests tell you when you are done. Keep this order: later exercises
use earlier ones.

    pip install -r requirements.txt matplotlib       # best in an environment: python -m venv .venv
    {first}

A test fails until its exercise is done; pytest --tb=short prints less. A script that reaches a
function you have not written yet stops with one line that names the exercise. Change only the
bodies of these functions: nothing else is graded. An import of yours belongs inside a body. The
graders also run tests with other inputs. Three exercises, marked E, are experiments. Their tests
take a minute or two, and `python extras/course/experiments.py NAME` draws a figure of your results.

{table}
To hand in, run `./submit.sh`. It runs the tests of dit_dh.py once more and writes submission.zip
with your files, the figures, the last pictures of train_diffusion.py and answers.txt. It also says
what is missing.
"""

SUBMIT = """#!/bin/sh
# Run the tests, and zip the files to hand in.
python -m pytest -q tests/test_dit_dh.py || echo "some tests fail; you can hand in anyway"
python - <<'END'
import zipfile
from pathlib import Path
files = ["rae.py", "dit_dh.py", "train_decoder.py", "fid.py"]
files += ["extras/course/experiments.py", "answers.txt"]
files += [f"figures/{name}.png" for name in ("theorem_1", "shift_sweep", "noise_sweep")]
files += sorted(map(str, Path("out/diffusion").glob("samples_*.png")))[-1:]
with zipfile.ZipFile("submission.zip", "w", zipfile.ZIP_DEFLATED) as archive:
    for file in files:
        if Path(file).exists():
            archive.write(file)
            print(file)
        else:
            print(f"missing: {file}")
END
echo wrote submission.zip
"""


def student_readme(numbers):
    """The copy's README: the exercises in order, and how to hand in."""
    table = ""
    sitting = 0
    for number in numbers:
        exercise = EXERCISES[number - 1]
        if exercise["sitting"] != sitting:
            sitting = exercise["sitting"]
            table += f"## Sitting {sitting}\n\n"
        functions = ", ".join(f"`{name}` in {file}" for file, name in exercise["functions"])
        kind = " (E)" if "experiments" in functions else ""
        table += (
            f"{number}. **{exercise['title']}**{kind}, {exercise['minutes']} minutes, "
            f"{exercise['paper']}. Write {functions}.\n   Expect: {exercise['expect']}\n\n"
            f"       {command_of(exercise)}\n\n"
        )
    return README.format(first=command_of(EXERCISES[numbers[0] - 1]), table=table)


# ---------------------------------------------------------------------------------------------
# Grading


def one_line(text):
    """Text of a submission, fit to print."""
    return "".join(filter(str.isprintable, str(text)))[:300]


def read_submission(path):
    """{file: text} of the files to grade in a zip, and remarks on the others.

    All may lie in a folder. If several files have a name that we look for, the topmost counts.
    """
    wanted = {file for exercise in EXERCISES for file, _ in exercise["functions"]}
    texts = {}
    remarks = []
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in sorted(archive.infolist(), key=lambda entry: entry.filename.count("/")):
                name = entry.filename
                file = next((file for file in wanted if f"/{name}".endswith(f"/{file}")), None)
                if name.startswith("/") or ".." in Path(name).parts:
                    remarks.append(f"{name}: a path outside the zip, not read")
                elif file and file not in texts and entry.file_size < 10**6:
                    # This drops a byte order mark and the "\r" at the ends of lines.
                    texts[file] = io.TextIOWrapper(archive.open(entry), "utf-8-sig").read()
    except BAD_ZIP as error:
        raise UsageError(f"{path}: cannot be read ({one_line(error)})") from error
    remarks += [f"{file}: missing" for file in sorted(wanted - texts.keys())]
    return texts, remarks


def changed_elsewhere(file, text):
    """Whether a student's file differs from the handout's outside the bodies of the functions."""
    ours = (ROOT / file).read_text()
    for exercise in EXERCISES:
        for other, name in exercise["functions"]:
            if other == file:
                text = with_body(text, name, ours)
    theirs = text.replace(CAUGHT_IN_COPY, CAUGHT)
    return ast.dump(ast.parse(theirs)) != ast.dump(ast.parse(ours))


def check_report(report, tests):
    """None if pytest's XML report names all tests as passed, or why not."""
    if not report.is_file() or report.stat().st_size > 10**6:
        return "no report of the tests"
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        return f"no complete report of the tests ({error})"
    passed, not_passed = set(), set()
    for case in cases:
        name = f"{case.get('classname')}.{case.get('name')}".split("[")[0]
        (not_passed if len(case) else passed).add(name)  # a child says why it failed or was skipped
    wanted = {test.replace(".py::", ".").replace("/", ".") for test in tests}
    missing = sorted(wanted - (passed - not_passed))
    return f"not passed: {', '.join(missing)}" if missing else None


def grade_exercise(number, texts, files, nonce, ours):
    """Test the submitted bodies in copies of our files. None for full points, or why not."""
    exercise = EXERCISES[number - 1]
    files = dict(files)
    # A submission can read its tree, so the tree holds no answers to this and to later exercises.
    stub_out(files, range(number, len(EXERCISES) + 1))
    for file, name in exercise["functions"]:
        if file not in texts:
            return f"{file} is missing"
        try:
            files[file] = with_body(files[file].decode(), name, texts[file]).encode()
        except NOT_PYTHON as error:
            return f"{file}: {type(error).__name__}: {error}"
    flags = ["-q", "-x", "--tb=no", "-m", "slow or not slow", "--junit-xml=../out/report.xml"]
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        why = run_in_tree(folder, files, "-m", "pytest", *flags, *exercise["tests"])
        why = why or check_report(Path(folder, "out/report.xml"), exercise["tests"])
    if why:
        return why
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        why = run_in_tree(folder, files, HIDDEN, "../out", str(nonce), exercise["title"])
        return why or hidden.difference(exercise["title"], Path(folder, "out"), ours)


def grade(path, numbers):
    """Print a submission's points, ten per exercise, and write results.json.

    One exercise after the other: the tree of each holds answers to earlier ones.
    """
    Path("results.json").unlink(missing_ok=True)
    texts, remarks = read_submission(path)
    for file, text in texts.items():
        try:
            if changed_elsewhere(file, text):
                remarks.append(f"{file}: changed outside the exercises; those changes are ignored")
        except NOT_PYTHON as error:
            remarks.append(f"{file}: {type(error).__name__}: {error}")

    # All that we need of our own, before the submission runs.
    files = read_files() | {HIDDEN: (ROOT / HIDDEN).read_bytes()}
    nonce = secrets.randbelow(2**31)
    titles = [EXERCISES[number - 1]["title"] for number in numbers]
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        why = run_in_tree(folder, files, HIDDEN, "../out", str(nonce), *titles)
        if why:
            raise RuntimeError(f"our own functions fail: {why}")
        ours = {path.name: path.read_bytes() for path in Path(folder, "out").iterdir()}

    results = []
    for number, title in zip(numbers, titles):
        why = grade_exercise(number, texts, files, nonce, ours)
        points = 10 if why is None else 0
        why = one_line(why or "")
        name = f"{number}. {title}"
        results.append({"name": name, "score": points, "max_score": 10, "output": why})
        print(f"{points:2d}  {name}  {why}", flush=True)
    total = sum(result["score"] for result in results)
    remarks = [one_line(remark) for remark in remarks]
    for remark in remarks:
        print(remark)
    print(f"{total} of {10 * len(results)} points")
    result = {"score": total, "output": "\n".join(remarks), "tests": results}
    Path("results.json.tmp").write_text(json.dumps(result, indent=1))
    os.replace("results.json.tmp", "results.json")


def numbers_of(args):
    """The exercises that --only and --upto select."""
    numbers = list(range(1, len(EXERCISES) + 1))
    if args.only:
        wanted = args.only.split(",")
        if not {str(n) for n in numbers} >= set(wanted):
            raise UsageError(f"--only {args.only}: exercises are 1 to {len(EXERCISES)}")
        numbers = sorted(map(int, wanted))
    if args.upto:
        numbers = [n for n in numbers if EXERCISES[n - 1]["sitting"] <= args.upto]
    return numbers


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("out", metavar="OUT", nargs="?", help="new or empty folder")
    p.add_argument("--upto", type=int, choices=[1, 2, 3], help="only sittings 1 to this")
    p.add_argument("--only", help="exercises such as 4 or 4,5")
    p.add_argument("--grade", metavar="ZIP", help="submission to grade, from submit.sh")
    args = p.parse_args()
    numbers = numbers_of(args)
    if args.grade:
        protect()
        return grade(args.grade, numbers)
    if args.out is None:
        raise UsageError("OUT: name a folder for the copy, or --grade a submission")
    write_copy(args.out, numbers)
    for number in numbers:
        exercise = EXERCISES[number - 1]
        print(f"{number}. {exercise['title']}, {exercise['minutes']} minutes")
        print(f"   {command_of(exercise)}")


if __name__ == "__main__":
    run_script(main)
