"""Answers that a student may give: wrong ones, which a grader must fail, and right ones.

    python extras/course/mutants.py     # grades them all; a line for each surprise
    python extras/course/mutants.py 200 # and runs the tests of right ones 200 times

An answer is a change to our own function. Each is graded in a process forked from this one, by
the tests of its exercise, and what torch compiled is shared: a hundred take two minutes.
"""

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

# (function, text in it, what stands there instead)
WRONG = [
    ("latent_statistics", "num_views = 2 * len(data)", "num_views = len(data)"),
    (
        "latent_statistics",
        "for view in (images, images.flip(-1)):",
        "for view in (images, images):",
    ),
    ("latent_statistics", "square - mean.square()", "square"),
    (
        "latent_statistics",
        "(square - mean.square()).clamp(min=0)",
        "(square - mean.square()).sqrt()",
    ),
    ("latent_statistics", "tokens.sum(0)", "tokens.mean(1, keepdim=True).expand_as(tokens).sum(0)"),
    (
        "latent_statistics",
        "var = (square - mean.square())",
        "var = num_views / (num_views - 1) * (square - mean.square())",
    ),
    ("latent_statistics", "mean.T.unflatten(1, grid)", "mean.T.unflatten(1, grid).mT"),
    ("flow_loss", "t = shift_time(t, alpha)", "t = t"),
    (
        "update_ema",
        "list(ema.parameters()), list(model.parameters())",
        "*zip(*[(e.data, p.data) for e, p in zip(ema.parameters(), model.parameters()) "
        "if p.requires_grad])",
    ),
    (
        "adaptive_weight",
        "g_rec.norm() / (g_gan.norm() + 1e-6)",
        "g_rec.norm(dim=1).mean() / (g_gan.norm(dim=1).mean() + 1e-6)",
    ),
    (
        "adaptive_weight",
        "g_rec.norm() / (g_gan.norm() + 1e-6)",
        "torch.linalg.matrix_norm(g_rec, 2) / (torch.linalg.matrix_norm(g_gan, 2) + 1e-6)",
    ),
    (
        "frechet_distance",
        "return float(difference @ difference + np.trace(sigma1 + sigma2) - 2 * trace_of_root)",
        "return difference @ difference + np.trace(sigma1 + sigma2) - 2 * trace_of_root + 0j",
    ),
    ("draw_time", "return 0.999 * u", "return u.clamp(max=0.999)"),
    ("draw_time", "normal.sigmoid()", "(2 * normal).sigmoid()"),
    ("draw_time", "normal.sigmoid()", "u"),
    ("draw_time", "normal.sigmoid().clamp(max=0.999)", "normal.sigmoid()"),
    ("draw_time", "normal.sigmoid().clamp(max=0.999)", "0.999 * normal.sigmoid()"),
    (
        "draw_time",
        "normal = torch.special.ndtri(u)",
        "normal = torch.randn_like(u[:1]).expand_as(u)",
    ),
    ("flow_loss", "draw_time(torch.rand(len(z), device=z.device))", "torch.rand(len(z))"),
    ("flow_loss", "torch.rand(len(z), device=z.device)", "torch.rand(1).expand(len(z))"),
    ("flow_loss", "noise = torch.randn_like(z)", "noise = torch.rand_like(z)"),
    ("flow_loss", "noise = torch.randn_like(z)", "noise = torch.randn_like(z[:1]).expand_as(z)"),
    ("flow_loss", "t = shift_time(t, alpha)", "t = t"),
    (
        "flow_loss",
        "t = draw_time(torch.rand(len(z), device=z.device))",
        "t = shift_time(draw_time(torch.rand(len(z))), 1 / alpha)",
    ),
    (
        "flow_loss",
        "(1 - t[:, None, None]) * z + t[:, None, None] * noise",
        "t[:, None, None] * z + (1 - t[:, None, None]) * noise",
    ),
    ("flow_loss", "v = noise - z", "v = z - noise"),
    ("flow_loss", ".mean(dim=(1, 2))", ".sum(dim=(1, 2))"),
    ("flow_loss", ".square().mean(dim=(1, 2))", ".abs().mean(dim=(1, 2))"),
    ("DiTDH.forward", "F.silu(c)", "c"),
    (
        "DiTDH.forward",
        "return self.velocity(self.final_layer(x, s), x_t, t)",
        "return self.final_layer(x, s)",
    ),
    (
        "DiTDH.forward",
        "return self.velocity(self.final_layer(x, c), x_t, t)",
        "return self.final_layer(x, c)",
    ),
    ("DiTDH.forward", "F.silu(h + t_emb)", "F.silu(h + c)"),
    ("DiTDH.forward", "F.silu(h + t_emb)", "h + t_emb"),
    ("DiTDH.forward", "F.silu(h + t_emb)", "F.silu(h)"),
    ("DiTDH.forward", "x = self.x_embedder(x_t)  # (B, N, D_head)", "x = self.x_embedder(x_t) + s"),
    ("DiTDH.forward", "x = x.float()", "x = x"),
    ("DiTDH.forward", "h = self.s_embedder(x_t) + self.pos_embed", "h = self.s_embedder(x_t)"),
    ("DiTDH.forward", "x = self.x_embedder(x_t) + self.pos_embed", "x = self.x_embedder(x_t)"),
    (
        "DiTDH.forward",
        "x = self.run_blocks(self.blocks, x, c,",
        "x = self.run_blocks(self.blocks, x, F.silu(c),",
    ),
    ("Rope.forward", "[-b, a]", "[b, -a]"),
    ("Rope.forward", "[-b, a]", "[b, a]"),
    ("Rope.forward", "x.unflatten(-1, (-1, 2)).unbind(-1)", "x.chunk(2, -1)"),
    (
        "Rope.forward",
        "x * self.freqs_cos + turned * self.freqs_sin",
        "x * self.freqs_sin + turned * self.freqs_cos",
    ),
    ("Rope.forward", "x * self.freqs_cos + turned * self.freqs_sin", "x * self.freqs_cos"),
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
    ("time_grid", "t_first - torch", "1 - torch"),
    (
        "time_grid",
        "t = t_first - torch.linspace(0, t_first - t_last",
        "t = 1 - torch.linspace(0, 1 - t_last",
    ),
    ("time_grid", "torch.linspace(0, t_first - t_last", "torch.linspace(0, t_first"),
    ("time_grid", "return shift_time(t, alpha).float()", "return t.float()"),
    (
        "time_grid",
        "t = t_first - torch.linspace(0, t_first - t_last, steps + 1, dtype=torch.float64)",
        "t = (1 - torch.linspace(0, 1 - t_last, steps + 1)) * t_first",
    ),
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
        "torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)",
        "[setattr(p, 'data', q.data) for p, q in zip(ema.parameters(), model.parameters())]",
    ),
    ("sample", "v = v_null + cfg_scale * (v - v_null)", "v = v + cfg_scale * (v - v_null)"),
    ("sample", "v = v_null + cfg_scale * (v - v_null)", "v = v_null + cfg_scale * (v_null - v)"),
    ("sample", "torch.cat([y, y_null])", "torch.cat([y_null, y])"),
    ("sample", "torch.full_like(y, model.num_classes)", "torch.zeros_like(y)"),
    (
        "sample",
        "v = v_weak + guide_scale * (model(x, t, y).float() - v_weak)",
        "v = v_weak + guide_scale * model(x, t, y).float()",
    ),
    ("sample", "within = low <= t_now <= high", "within = low <= t_next <= high"),
    ("sample", "within = low <= t_now <= high", "within = True"),
    ("sample", "(t_next - t_now) * v", "(t_now - t_next) * v"),
    ("sample", "t = torch.full((len(x),), t_now", "t = torch.full((len(x),), t_next"),
    ("sample", "if use_cfg and use_guide:", "if False:"),
    ("sample", "elif use_guide and within:", "elif use_guide:"),
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
    ("RAE.noised", "not self.training or self.tau == 0", "self.tau == 0"),
    (
        "RAE.noised",
        "not self.training or self.tau == 0",
        "not self.training or self.tau == 0 or generators",
    ),
    ("RAE.noised", "draw(1, generator", "draw(len(tokens[0]), 1, generator"),
    ("RAE.noised", "self.tau * draw(1, generator=g, device=tokens.device).abs()", "self.tau"),
    ("RAE.noised", 'torch.rand if self.noise_dist == "uniform" else torch.randn', "torch.rand"),
    (
        "RAE.noised",
        "noise.append(sigma * eps)",
        "noise.append(sigma * eps if not noise else noise[0])",
    ),
    ("RAE.noised", "noise.append(sigma * eps)", "noise.append(sigma * eps * self.latent_std)"),
    ("RAE.noised", "noise.append(sigma * eps)", "noise.append(sigma.sqrt() * eps)"),
    ("RAE.noised", "tokens + torch.stack(noise)", "torch.stack(noise)"),
    (
        "adaptive_weight",
        "g_rec.norm() / (g_gan.norm() + 1e-6)",
        "g_gan.norm() / (g_rec.norm() + 1e-6)",
    ),
    ("adaptive_weight", ".clamp(0, 1e4)", ""),
    ("adaptive_weight", ".detach()", ""),
    ("adaptive_weight", "g_gan.norm() + 1e-6", "g_gan.norm()"),
    (
        "adaptive_weight",
        "g_rec.norm() / (g_gan.norm() + 1e-6)",
        "g_rec.abs().sum() / (g_gan.abs().sum() + 1e-6)",
    ),
    ("adaptive_weight", "1e4", "1e3"),
]
RIGHT = [
    ("latent_statistics", "total += tokens.sum(0)", "total += tokens.mean(0) * len(tokens)"),
    ("latent_statistics", "(square - mean.square())", "(square - mean * mean)"),
    ("draw_time", "torch.special.ndtri(u)", "2**0.5 * torch.erfinv(2 * u.double() - 1)"),
    ("draw_time", "normal.sigmoid()", "(1 / (1 + (-normal).exp())).to(u.dtype)"),
    ("flow_loss", "v = noise - z", "v = (x_t - z) / t[:, None, None].clamp(min=1e-9)"),
    ("flow_loss", ".mean(dim=(1, 2))", ".flatten(1).double().mean(1)"),
    (
        "DiTDH.forward",
        "t_emb = self.t_embedder(t)[:, None]",
        "t_emb = self.t_embedder(t).unsqueeze(1)",
    ),
    (
        "Rope.forward",
        "torch.stack([-b, a], dim=-1).flatten(-2)",
        "torch.stack((-b, a), -1).reshape(x.shape)",
    ),
    (
        "shift_alpha",
        "math.sqrt(num_tokens * latent_dim / 4096)",
        "(num_tokens * latent_dim) ** 0.5 / 64",
    ),
    ("shift_time", "alpha * t / (1 + (alpha - 1) * t)", "t / (t + (1 - t) / alpha)"),
    (
        "time_grid",
        "t_first - torch.linspace(0, t_first - t_last,",
        "torch.linspace(t_first, t_last,",
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
    ("RAE.noised", "sigma * eps", "eps * sigma"),
    (
        "RAE.noised",
        "tokens + torch.stack(noise)",
        "torch.stack([a + b for a, b in zip(tokens, noise)])",
    ),
    ("adaptive_weight", "g_rec.norm()", "g_rec.double().square().sum().sqrt()"),
]


def exercise_of(function):
    """The exercise that a function is of, and the function's file."""
    for exercise in EXERCISES:
        for file, name in exercise["functions"]:
            if name == function:
                return exercise, file
    raise ValueError(function)


def put(function, old, new):
    """Give the imported module our function with the change."""
    _, file = exercise_of(function)
    source = (ROOT / file).read_text()
    text = textwrap.dedent(lines_of(source, function))
    end = text.rindex('"""')  # of the docstring, which may say the same as the code
    assert text[end:].count(old) == 1, (function, old)
    module = importlib.import_module(Path(file).stem)
    names = {}
    exec(text[:end] + text[end:].replace(old, new), module.__dict__, names)
    *classes, name = function.split(".")
    setattr(getattr(module, classes[0]) if classes else module, name, names[name])


class Repeat:
    """A plugin of pytest that runs every test so many times."""

    def __init__(self, times):
        self.times = times

    def pytest_collection_modifyitems(self, items):
        items *= self.times


def grade(function, old, new, times=1):
    """pytest's exit code: 0 if the exercise's tests pass, 1 if one fails."""
    pid = os.fork()
    if pid == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            put(function, old, new)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(9)
        exercise, _ = exercise_of(function)
        flags = ["-q", "-x", "-p", "no:cacheprovider"]
        os._exit(pytest.main([*flags, *exercise["tests"]], plugins=[Repeat(times)]))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main():
    import dit_dh  # noqa: F401
    import fid  # noqa: F401
    import rae  # noqa: F401
    import train_decoder  # noqa: F401

    times = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    for answers, name, code, repeat in ((WRONG, "wrong", 1, 1), (RIGHT, "right", 0, times)):
        found = 0
        for answer in answers:
            got = grade(*answer, repeat)
            found += got == code
            if got != code:
                print(f"{name}, but {got}: {answer}", flush=True)
        print(f"{found} of {len(answers)} {name} answers graded so", flush=True)


if __name__ == "__main__":
    main()
