"""Write a student copy of this repository: the functions of eight exercises lose their bodies.

    python tests/handout.py ../exercises           # a new or empty folder outside the repository
    cd ../exercises
    pytest tests/test_dit_dh.py::test_shift        # fails until exercise 1 is done

Signatures and docstrings stay and say what to write. The tests named in EXERCISES grade it, in
order, since later ones use earlier functions. The copy has no git history, where the answers are,
and no runs.
"""

import argparse
import ast
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("*.py", "*.md", "*.txt", "LICENSE", ".gitignore", "assets", "tests")

EXERCISES = [
    {
        "title": "The schedule shift",
        "file": "dit_dh.py",
        "functions": ["shift_alpha", "shift_time", "time_grid"],
        "tests": ["tests/test_dit_dh.py::test_shift", "tests/test_dit_dh.py::test_time_grid"],
        "expect": "256 tokens of 768 channels have alpha 6.928; 0 and 1 stay in place",
    },
    {
        "title": "Rotary positions",
        "file": "dit_dh.py",
        "functions": ["Rope.forward"],
        "tests": [
            "tests/test_dit_dh.py::test_rope_turns_by_the_distance",
            "tests/test_golden.py::test_velocity",
        ],
        "expect": "q times k depends on how many rows and columns lie between; lengths stay",
    },
    {
        "title": "Flow matching",
        "file": "dit_dh.py",
        "functions": ["draw_time", "flow_loss"],
        "tests": [
            "tests/test_dit_dh.py::test_draw_time",
            "tests/test_dit_dh.py::test_loss_is_zero_for_the_true_velocity",
            "tests/test_golden.py::test_loss",
        ],
        "expect": "logit(t) has mean 0 and deviation 1; a model that knows the velocity has loss 0",
    },
    {
        "title": "Sampling and guidance",
        "file": "dit_dh.py",
        "functions": ["sample"],
        "tests": [
            "tests/test_dit_dh.py::test_euler_is_exact_on_a_straight_flow",
            "tests/test_dit_dh.py::test_guidance_costs_and_formula",
            "tests/test_golden.py::test_samples",
        ],
        "expect": "one Euler step is exact on a straight flow; CFG calls the model once a step, on "
        "2 B latents",
    },
    {
        "title": "Noise on the latents",
        "file": "rae.py",
        "functions": ["RAE.noised"],
        "tests": ["tests/test_rae.py::test_noise_in_training_only"],
        "expect": "with tau 0.8 sigma is 0.4 on average, 0.64 if half-normal; none in eval()",
    },
    {
        "title": "The averaged weights",
        "file": "rae.py",
        "functions": ["update_ema"],
        "tests": ["tests/test_rae.py::test_ema_warms_up_and_is_no_alias"],
        "expect": "after step 0 the average is 0.1 of the old and 0.9 of the new",
    },
    {
        "title": "The GAN's weight",
        "file": "train_decoder.py",
        "functions": ["adaptive_weight"],
        "tests": ["tests/test_stage1.py::test_adaptive_weight_by_hand"],
        "expect": "gradients (3, 3) and (2, 0) give 2.12; a GAN gradient of 0 gives 10000",
    },
    {
        "title": "The Frechet distance",
        "file": "fid.py",
        "functions": ["frechet_distance"],
        "tests": ["tests/test_fid.py::test_frechet_distance_of_gaussians"],
        "expect": "|mu1 - mu2|^2 + |sqrt(s1) - sqrt(s2)|^2 where both covariances are diagonal, "
        "s1 and s2",
    },
]


def find(source, name):
    """The syntax tree of the function "f" or "Class.method" in a file's text."""
    node = ast.parse(source)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return node


def without_body(source, name, number):
    """A file's text in which the lines of a function, below its docstring, are one that raises."""
    node = find(source, name)
    lines = source.split("\n")
    first = node.body[0]
    if ast.get_docstring(node):
        start = first.end_lineno
    else:
        start = first.lineno - 1
    indent = " " * first.col_offset
    lines[start : node.end_lineno] = [f"{indent}raise NotImplementedError  # exercise {number}"]
    return "\n".join(lines)


def write_copy(out):
    """Write the copy to a folder; ValueError if that is not new or empty, or in the repository."""
    out = Path(out).resolve()
    if ROOT in (out, *out.parents):  # else pytest would find the copy's tests as well
        raise ValueError(f"{out}: inside the repository; pass a folder outside")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out}: not an empty folder")
    out.mkdir(parents=True, exist_ok=True)

    unwanted = shutil.ignore_patterns("__pycache__", "test_handout.py")  # compiled answers; ours
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, out / path.name, ignore=unwanted)
            else:
                shutil.copy(path, out)

    for number, exercise in enumerate(EXERCISES, start=1):
        path = out / exercise["file"]
        for name in exercise["functions"]:
            path.write_text(without_body(path.read_text(), name, number))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("out", metavar="OUT", help="new or empty folder")
    args = p.parse_args()
    write_copy(args.out)
    for number, exercise in enumerate(EXERCISES, start=1):
        functions = " ".join(exercise["functions"])
        print(f"{number}. {exercise['title']} ({exercise['file']}: {functions})")
        print(f"   {exercise['expect']}")
        print(f"   pytest {' '.join(exercise['tests'])}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
