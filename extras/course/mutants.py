"""Answers that a student might give: wrong ones, which a grader must fail, and right ones.

    python extras/course/mutants.py         # grade them all; prints a line per surprise
    python extras/course/mutants.py --only sample      # those of one function
    python extras/course/mutants.py --times 200        # run the tests of right answers 200 times

An answer is an edit of our own function. Each one is graded in a process forked from this one, by
the visible tests of its exercise: a hundred take a minute.
"""

import argparse
import gc
import importlib
import os
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "extras/course")]
os.chdir(ROOT)

from handout import EXERCISES, lines_of  # noqa: E402

# (function, text in it, replacement)
WRONG = [
    ("latent_statistics", "n = 2 * len(data)", "n = len(data)"),
    (
        "latent_statistics",
        "for view in (images, images.flip(-1)):",
        "for view in (images, images):",
    ),
    ("latent_statistics", " - mean.square()).clamp(min=0)", ").clamp(min=0)"),
    ("latent_statistics", ".clamp(min=0)", ".sqrt()"),
    (
        "latent_statistics",
        "total += tokens.sum(0)",
        "total += tokens.mean(1, keepdim=True).expand_as(tokens).sum(0)",
    ),
    ("latent_statistics", "- mean.square())", "- mean.square()) * len(data) / (len(data) - 1)"),
    ("latent_statistics", "mean.T.unflatten(1, grid)", "mean.T.unflatten(1, grid).mT"),
    (
        "latent_statistics",
        "total_square += tokens.square().sum(0)",
        "total_square += tokens.sum(0).square() / len(tokens)",
    ),
    (
        "shift_alpha",
        "max(1.0, math.sqrt(num_tokens * latent_dim / 4096))",
        "math.sqrt(num_tokens * latent_dim / 4096)",
    ),
    ("shift_alpha", "math.sqrt(num_tokens * latent_dim / 4096)", "num_tokens * latent_dim / 4096"),
    ("shift_alpha", "num_tokens * latent_dim / 4096", "num_tokens / 256"),
    ("shift_time", "(1 + (alpha - 1) * t)", "(1 + alpha * t)"),
    ("shift_time", "alpha * t / (1 + (alpha - 1) * t)", "t / (alpha - (alpha - 1) * t)"),
    ("shift_time", "alpha * t / (1 + (alpha - 1) * t)", "(alpha * t).clamp(max=1)"),
    ("time_grid", "steps + 1, dtype", "steps, dtype"),
    ("time_grid", "torch.linspace(1, t_last,", "torch.linspace(t_last, 1,"),
    ("time_grid", "torch.linspace(1, t_last,", "torch.linspace(1, 0,"),
    ("time_grid", "return shift_time(t, alpha).float()", "return t.float()"),
    ("time_grid", "shift_time(t, alpha)", "shift_time(t, 1 / alpha)"),
    (
        "time_grid",
        "t = torch.linspace(1, t_last, steps + 1, dtype=torch.float64)",
        "t = torch.cat([1 - torch.linspace(0, 1, steps + 1)[:-1], torch.tensor([t_last])])",
    ),
    ("draw_time", "return 0.999 * torch.rand(", "return torch.rand("),
    ("draw_time", 'dist == "uniform"', 'dist != "uniform"'),
    (
        "draw_time",
        "return torch.randn(n, generator=generator, device=device).sigmoid()",
        "return (2 * torch.randn(n, generator=generator, device=device)).sigmoid()",
    ),
    (
        "draw_time",
        "torch.randn(n, generator=generator, device=device).sigmoid()",
        "torch.rand(n, generator=generator, device=device).sigmoid()",
    ),
    (
        "draw_time",
        "torch.randn(n, generator=generator, device=device).sigmoid()",
        "torch.rand(n, generator=generator, device=device)",
    ),
    (
        "draw_time",
        "torch.randn(n, generator=generator, device=device)",
        "torch.randn(1, generator=generator, device=device).expand(n)",
    ),
    (
        "draw_time",
        "torch.randn(n, generator=generator, device=device)",
        "torch.randn(n, device=device)",
    ),
    (
        "draw_time",
        "torch.randn(n, generator=generator, device=device).sigmoid()",
        "torch.special.ndtr(torch.randn(n, generator=generator, device=device))",
    ),
    ("flow_loss", "t = shift_time(t, alpha)", "t = t"),
    ("flow_loss", "t = draw_time(len(z), device=z.device)", "t = torch.rand(len(z))"),
    ("flow_loss", "t = draw_time(len(z), device=z.device)", "t = draw_time(1).expand(len(z))"),
    (
        "flow_loss",
        "t = draw_time(len(z), device=z.device)",
        "t = shift_time(draw_time(len(z)), 1 / alpha)",
    ),
    ("flow_loss", "eps = torch.randn_like(z)", "eps = torch.rand_like(z)"),
    ("flow_loss", "eps = torch.randn_like(z)", "eps = torch.randn_like(z[:1]).expand_as(z)"),
    (
        "flow_loss",
        "x_t = (1 - t) * z + t * eps",
        "x_t = t * z + (1 - t) * eps",
    ),
    ("flow_loss", "v = eps - z", "v = z - eps"),
    ("flow_loss", ".mean(dim=(1, 2))", ".sum(dim=(1, 2))"),
    ("flow_loss", ".square().mean(dim=(1, 2))", ".abs().mean(dim=(1, 2))"),
    ("RoPE2d.forward", "[-b, a]", "[b, -a]"),
    ("RoPE2d.forward", "[-b, a]", "[b, a]"),
    ("RoPE2d.forward", "x.unflatten(-1, (-1, 2)).unbind(-1)", "x.chunk(2, -1)"),
    (
        "RoPE2d.forward",
        "x * self.freqs_cos + rotated * self.freqs_sin",
        "x * self.freqs_sin + rotated * self.freqs_cos",
    ),
    ("RoPE2d.forward", "x * self.freqs_cos + rotated * self.freqs_sin", "x * self.freqs_cos"),
    ("DiTDH.forward", "F.silu(c)", "c"),
    ("DiTDH.forward", "F.silu(s + t_emb)", "F.silu(s + c)"),
    ("DiTDH.forward", "F.silu(s + t_emb)", "s + t_emb"),
    ("DiTDH.forward", "F.silu(s + t_emb)", "F.silu(s)"),
    ("DiTDH.forward", "self.s_projector(F.silu(s + t_emb))", "F.silu(self.s_projector(s + t_emb))"),
    ("DiTDH.forward", "self.x_embedder(x_t).float()", "self.x_embedder(x_t).float() + s"),
    ("DiTDH.forward", "self.x_embedder(x_t).float()", "self.x_embedder(x_t)"),
    ("DiTDH.forward", "s = self.s_embedder(x_t) + self.pos_embed", "s = self.s_embedder(x_t)"),
    ("DiTDH.forward", "x = self.x_embedder(x_t) + self.pos_embed", "x = self.x_embedder(x_t)"),
    (
        "DiTDH.forward",
        "x = self.run_blocks(self.blocks, x, c,",
        "x = self.run_blocks(self.blocks, x, F.silu(c),",
    ),
    ("DiTDH.forward", "return self.final_layer(x, c)", "return self.final_layer(x, F.silu(c))"),
    ("update_ema", "d = min(decay, (1 + step) / (10 + step))", "d = decay"),
    (
        "update_ema",
        "d = min(decay, (1 + step) / (10 + step))",
        "d = max(decay, (1 + step) / (10 + step))",
    ),
    ("update_ema", "(1 + step) / (10 + step)", "step / (10 + step)"),
    (
        "update_ema",
        "list(ema.parameters()), list(model.parameters())",
        "list(ema.parameters())[:1], list(model.parameters())[:1]",
    ),
    ("update_ema", "model.parameters()), 1 - d)", "model.parameters()), d)"),
    (
        "update_ema",
        "list(ema.parameters()), list(model.parameters())",
        "*[[p for p in m.parameters() if p.dim() > 1] for m in (ema, model)]",
    ),
    (
        "update_ema",
        "list(ema.parameters()), list(model.parameters())",
        "*zip(*[(e.data, p.data) for e, p in zip(ema.parameters(), model.parameters()) "
        "if p.requires_grad])",
    ),
    (
        "update_ema",
        "torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)",
        "[setattr(p, 'data', q.data) for p, q in zip(ema.parameters(), model.parameters())]",
    ),
    ("sample", "v = v_null + cfg_scale * (v - v_null)", "v = v + cfg_scale * (v - v_null)"),
    ("sample", "v = v_null + cfg_scale * (v - v_null)", "v = v_null + cfg_scale * (v_null - v)"),
    ("sample", "torch.cat([y, y_null])", "torch.cat([y_null, y])"),
    ("sample", "torch.full_like(y, model.num_classes)", "torch.zeros_like(y)"),
    (
        "sample",
        "v = v_weak + guidance_scale * (model(x, t, y).float() - v_weak)",
        "v = v_weak + guidance_scale * model(x, t, y).float()",
    ),
    ("sample", "<= t_now <=", "<= t_next <="),
    ("sample", "<= t_now <=", "< t_now <="),
    ("sample", "<= t_now <=", "<= t_now <"),
    ("sample", "in_interval = ", "in_interval = True or "),
    ("sample", "(t_next - t_now) * v", "(t_now - t_next) * v"),
    ("sample", "t = torch.full((len(x),), t_now", "t = torch.full((len(x),), t_next"),
    ("sample", "if use_cfg and use_autoguidance:", "if False:"),
    ("sample", "elif use_autoguidance and in_interval:", "elif use_autoguidance:"),
    ("frechet_distance", "- 2 * trace_of_root", "- trace_of_root"),
    ("frechet_distance", "difference @ difference", "np.sqrt(difference @ difference)"),
    (
        "frechet_distance",
        "eigenvalues = scipy.linalg.eigvals(sigma1 @ sigma2)",
        "eigenvalues = np.maximum(np.linalg.eigvalsh(sigma1) * np.linalg.eigvalsh(sigma2), 0)",
    ),
    (
        "frechet_distance",
        "trace_of_root = np.sqrt(eigenvalues).real.sum()",
        "trace_of_root = ((scipy.linalg.sqrtm(sigma1) @ scipy.linalg.sqrtm(sigma2)).trace()).real",
    ),
    ("frechet_distance", "np.sqrt(eigenvalues).real.sum()", "np.sqrt(eigenvalues.real).sum()"),
    ("frechet_distance", "np.sqrt(eigenvalues).real.sum()", "np.sqrt(eigenvalues.sum()).real"),
    (
        "frechet_distance",
        "return float(difference @ difference + trace)",
        "return difference @ difference + trace + 0j",
    ),
    ("draw_sigma", "return tau * torch.rand(", "return torch.rand("),
    ("draw_sigma", 'dist == "uniform"', 'dist != "uniform"'),
    (
        "draw_sigma",
        "torch.randn(n, generator=generator, device=device).abs()",
        "torch.randn(n, generator=generator, device=device)",
    ),
    (
        "draw_sigma",
        "torch.randn(n, generator=generator, device=device).abs()",
        "torch.rand(n, generator=generator, device=device)",
    ),
    (
        "draw_sigma",
        "torch.rand(n, generator=generator, device=device)",
        "torch.rand(1, generator=generator, device=device).expand(n)",
    ),
    (
        "draw_sigma",
        "return tau * torch.rand(n, generator=generator, device=device)",
        "return torch.full((n,), tau, device=device)",
    ),
    (
        "draw_sigma",
        "return tau * torch.randn(n, generator=generator, device=device).abs()",
        "return tau**0.5 * torch.randn(n, generator=generator, device=device).abs()",
    ),
    ("add_noise", "tokens + sigma[:, None, None] * eps", "sigma[:, None, None] * eps"),
    ("add_noise", "sigma[:, None, None] * eps", "sigma.sqrt()[:, None, None] * eps"),
    ("add_noise", "sigma[:, None, None] * eps", "sigma.mean() * eps"),
    ("add_noise", "sigma[:, None, None] * eps", "sigma[:, None, None] * torch.randn_like(eps)"),
    ("add_noise", "tokens + sigma", "(1 - sigma[:, None, None]) * tokens + sigma"),
    (
        "adaptive_weight",
        "rec_grad.norm() / (gan_grad.norm() + 1e-6)",
        "gan_grad.norm() / (rec_grad.norm() + 1e-6)",
    ),
    ("adaptive_weight", ".clamp(0, 1e4)", ""),
    ("adaptive_weight", ".detach()", ""),
    ("adaptive_weight", "gan_grad.norm() + 1e-6", "gan_grad.norm()"),
    ("adaptive_weight", "1e4", "1e3"),
    (
        "adaptive_weight",
        "rec_grad.norm() / (gan_grad.norm() + 1e-6)",
        "rec_grad.abs().sum() / (gan_grad.abs().sum() + 1e-6)",
    ),
    (
        "adaptive_weight",
        "rec_grad.norm() / (gan_grad.norm() + 1e-6)",
        "rec_grad.norm(dim=1).mean() / (gan_grad.norm(dim=1).mean() + 1e-6)",
    ),
    (
        "adaptive_weight",
        "rec_grad.norm() / (gan_grad.norm() + 1e-6)",
        "torch.linalg.matrix_norm(rec_grad, 2) / (torch.linalg.matrix_norm(gan_grad, 2) + 1e-6)",
    ),
]
RIGHT = [
    ("latent_statistics", "total += tokens.sum(0)", "total += tokens.mean(0) * len(tokens)"),
    ("latent_statistics", "- mean.square())", "- mean * mean)"),
    (
        "shift_alpha",
        "math.sqrt(num_tokens * latent_dim / 4096)",
        "(num_tokens * latent_dim) ** 0.5 / 64",
    ),
    ("shift_time", "alpha * t / (1 + (alpha - 1) * t)", "t / (t + (1 - t) / alpha)"),
    ("time_grid", "torch.linspace(1, t_last,", "1 - torch.linspace(0, 1 - t_last,"),
    (
        "draw_time",
        "torch.randn(n, generator=generator, device=device).sigmoid()",
        "1 / (1 + (-torch.randn(n, generator=generator, device=device)).exp())",
    ),
    (
        "draw_time",
        "torch.randn(n, generator=generator, device=device)",
        "torch.special.ndtri(torch.rand(n, generator=generator, dtype=torch.float64)).float()",
    ),
    ("flow_loss", "v = eps - z", "v = (x_t - z) / t.clamp(min=1e-9)"),
    ("flow_loss", ".mean(dim=(1, 2))", ".flatten(1).double().mean(1)"),
    (
        "RoPE2d.forward",
        "torch.stack([-b, a], dim=-1).flatten(-2)",
        "torch.stack((-b, a), -1).reshape(x.shape)",
    ),
    (
        "DiTDH.forward",
        "t_emb = self.t_embedder(t)[:, None]",
        "t_emb = self.t_embedder(t).unsqueeze(1)",
    ),
    (
        "update_ema",
        "torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)",
        "[p.mul_(d).add_(q, alpha=1 - d) for p, q in zip(ema.parameters(), model.parameters())]",
    ),
    (
        "sample",
        "v = v_null + cfg_scale * (v - v_null)",
        "v = cfg_scale * v + (1 - cfg_scale) * v_null",
    ),
    (
        "frechet_distance",
        "scipy.linalg.eigvals(sigma1 @ sigma2)",
        "scipy.linalg.eigvals(sigma2 @ sigma1)",
    ),
    (
        "frechet_distance",
        "np.sqrt(eigenvalues).real.sum()",
        "np.sqrt(np.maximum(eigenvalues.real, 0)).sum()",
    ),
    (
        "draw_sigma",
        "torch.randn(n, generator=generator, device=device).abs()",
        "torch.randn(n, generator=generator, device=device).square().sqrt()",
    ),
    (
        "add_noise",
        "tokens + sigma[:, None, None] * eps",
        "torch.stack([x + s * e for x, s, e in zip(tokens, sigma, eps)])",
    ),
    ("adaptive_weight", "rec_grad.norm()", "rec_grad.double().square().sum().sqrt()"),
]


def exercise_of(function):
    """The exercise that a function belongs to, and its file."""
    for exercise in EXERCISES:
        for file, name in exercise["functions"]:
            if name == function:
                return exercise, file
    raise ValueError(function)


def put(function, old, new):
    """Swap the edited function into its module."""
    _, file = exercise_of(function)
    source = (ROOT / file).read_text()
    text = textwrap.dedent(lines_of(source, function))
    end = text.rindex('"""')  # the edit is below the docstring, which may contain the same text
    assert text[end:].count(old) == 1, (function, old)
    module = importlib.import_module(Path(file).stem)
    names = {}
    exec(text[:end] + text[end:].replace(old, new), module.__dict__, names)
    *classes, name = function.split(".")
    setattr(getattr(module, classes[0]) if classes else module, name, names[name])


class Repeat:
    """A pytest plugin that runs every test several times."""

    def __init__(self, times):
        self.times = times

    def pytest_collection_modifyitems(self, items):
        items *= self.times


def grade(function, old, new, times=1):
    """pytest's exit code: 0 if the exercise's tests pass, 1 if one fails."""
    pid = os.fork()
    if pid == 0:
        try:
            put(function, old, new)
        except Exception as error:
            print(f"{function}: cannot put in {new!r}: {error!r}", flush=True)
            os._exit(9)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        exercise, _ = exercise_of(function)
        flags = ["-q", "-x", "--assert=plain", "-p", "no:cacheprovider"]
        os._exit(pytest.main([*flags, *exercise["tests"]], plugins=[Repeat(times)]))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--only", metavar="FUNCTION", help="grade the answers of one function")
    p.add_argument("--times", type=int, default=1, help="how often to test each right answer")
    args = p.parse_args()

    # Import once what the forked processes share.
    import timm  # noqa: F401

    import dit_dh  # noqa: F401
    import fid  # noqa: F401
    import rae  # noqa: F401
    import train_decoder  # noqa: F401

    gc.freeze()  # spare pytest, which collects garbage when it ends, all these imports

    for name, answers, want, times in (("wrong", WRONG, 1, 1), ("right", RIGHT, 0, args.times)):
        answers = [answer for answer in answers if args.only in (None, answer[0])]
        num_correct = 0
        for answer in answers:
            code = grade(*answer, times)
            num_correct += code == want
            if code != want:
                print(f"{name}, but pytest's exit code is {code}: {answer}", flush=True)
        print(f"{num_correct} of {len(answers)} {name} answers are graded as {name}", flush=True)


if __name__ == "__main__":
    main()
