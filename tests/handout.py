"""Write a student copy of this repository: the functions of eight exercises lose their bodies.

    python tests/handout.py ../exercises               # a new or empty folder outside the repository
    cd ../exercises
    pytest tests/test_dit_dh.py::test_shift            # fails until exercise 1 is done

Signatures and docstrings stay and say what to write; the tests named in EXERCISES grade it, in order, since
later ones use earlier functions. The copy has no git history, where the answers are, and no runs.
"""

import argparse
import ast
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = "*.py", "*.md", "*.txt", "LICENSE", ".gitignore", "assets", "tests"
# (title, file, functions, tests that grade them, what to expect)
EXERCISES = [
    ("The schedule shift", "dit_dh.py", "shift_alpha shift_time time_grid",
     "tests/test_dit_dh.py::test_shift tests/test_dit_dh.py::test_time_grid",
     "256 tokens of 768 channels have alpha 6.928; 0 and 1 stay in place"),
    ("Rotary positions", "dit_dh.py", "Rope.forward",
     "tests/test_dit_dh.py::test_rope_turns_by_the_distance tests/test_golden.py::test_velocity",
     "q times k depends on how many rows and columns lie between; lengths stay"),
    ("Flow matching", "dit_dh.py", "draw_time flow_loss",
     "tests/test_dit_dh.py::test_draw_time tests/test_dit_dh.py::test_loss_is_zero_for_the_true_velocity "
     "tests/test_golden.py::test_loss",
     "logit(t) has mean 0 and deviation 1; a model that knows the velocity has loss 0"),
    ("Sampling and guidance", "dit_dh.py", "sample",
     "tests/test_dit_dh.py::test_euler_is_exact_on_a_straight_flow "
     "tests/test_dit_dh.py::test_guidance_costs_and_formula tests/test_golden.py::test_samples",
     "one Euler step is exact on a straight flow; CFG calls the model once a step, on 2 B latents"),
    ("Noise on the latents", "rae.py", "RAE.noised", "tests/test_rae.py::test_noise_in_training_only",
     "with tau 0.8 sigma is 0.4 on average, 0.64 if half-normal; none in eval()"),
    ("The averaged weights", "rae.py", "update_ema",
     "tests/test_trust.py::test_ema_warms_up_and_is_no_alias",
     "after step 0 the average is 0.1 of the old and 0.9 of the new"),
    ("The GAN's weight", "train_decoder.py", "adaptive_weight",
     "tests/test_stage1.py::test_adaptive_weight_by_hand",
     "gradients (3, 3) and (2, 0) give 2.12; a GAN gradient of 0 gives 10000"),
    ("The Frechet distance", "fid.py", "frechet_distance",
     "tests/test_fid.py::test_frechet_distance_of_gaussians",
     "|mu1 - mu2|^2 + |sqrt(s1) - sqrt(s2)|^2 where both covariances are diagonal, s1 and s2"),
]


def find(source, name):
    """The syntax tree of the function "f" or "Class.method" in a file's text."""
    node = ast.parse(source)
    for part in name.split("."):
        node = next(x for x in node.body if getattr(x, "name", None) == part)
    return node


def without_body(source, name, number):
    """A file's text after that function's lines below its docstring became one that raises."""
    node, lines = find(source, name), source.split("\n")
    first = node.body[0]
    start = first.end_lineno if ast.get_docstring(node) else first.lineno - 1
    indent = " " * first.col_offset
    lines[start:node.end_lineno] = [f"{indent}raise NotImplementedError  # exercise {number}"]
    return "\n".join(lines)


def write(out):
    """Write the copy to a folder; ValueError if that is not new or empty, or lies in the repository."""
    out = Path(out).resolve()
    if ROOT in (out, *out.parents):                    # else pytest would find the copy's tests as well
        raise ValueError(f"{out}: inside the repository; pass a folder outside")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out}: not an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    unwanted = shutil.ignore_patterns("__pycache__", "test_handout.py")    # compiled answers; tests of this
    for path in (path for pattern in COPIED for path in ROOT.glob(pattern)):
        if path.is_dir():
            shutil.copytree(path, out / path.name, ignore=unwanted)
        else:
            shutil.copy(path, out)
    for number, (_, file, functions, *_) in enumerate(EXERCISES, 1):
        for name in functions.split():
            source = (out / file).read_text()
            (out / file).write_text(without_body(source, name, number))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("out", metavar="OUT", help="new or empty folder")
    args = p.parse_args()
    try:
        write(args.out)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    for number, (title, file, functions, tests, expect) in enumerate(EXERCISES, 1):
        print(f"{number}. {title} ({file}: {functions})\n   {expect}\n   pytest {tests}")


if __name__ == "__main__":
    main()
