"""The course's experiments, at sizes that take seconds."""

import json
import math

import experiments
import pytest
import torch


def test_run_starts_in_the_repository():
    assert experiments.run("-c", "import os; print(os.getcwd())") == f"{experiments.ROOT}\n"
    with pytest.raises(SystemExit, match="^no space$"):
        experiments.run("-c", "raise SystemExit('no space')")


@pytest.mark.slow
def test_theorem_1_draws_uniform_times(monkeypatch):
    """The data is one latent under the null label, and alpha is 1."""
    times = []

    def spy(model, z, y, alpha, t=None, eps=None):
        assert (z == z[:1]).all()
        assert (y == 10).all()
        assert alpha == 1
        times.append(t)
        return flow_loss(model, z, y, alpha, t, eps)

    flow_loss = experiments.flow_loss
    monkeypatch.setattr(experiments, "flow_loss", spy)
    assert list(experiments.theorem_1([16, 32], steps=100)) == [16, 32]
    t = torch.cat(times)
    assert len(t) == 2 * 100 * 32  # widths, steps, batch
    assert t.min() >= 0
    assert t.max() <= 1
    assert abs(t.mean() - 0.5) < 0.02
    assert abs(t.std() - 12**-0.5) < 0.02, "uniform"


@pytest.mark.slow
def test_theorem_1():
    """Losses end just above the bound; with a wide head, a backbone of width 16 gets below it."""
    (loss,) = experiments.theorem_1([64], steps=350).values()
    assert -0.005 < loss - (1 - 64 / 128) < 0.1
    (wide,) = experiments.theorem_1([16], head=(128, 1, 4), steps=350).values()
    assert wide < 0.3


def flags_of(words):
    """{flag: its value, or None} of a command line."""
    flags = {}
    for word, following in zip(words, [*words[1:], "--"]):
        if word.startswith("--"):
            flags[word] = None if following.startswith("--") else following
    return flags


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """A list of (script, words, flags): what an experiment would run, in an empty ROOT."""
    calls = []

    def run(script, *words):
        words = [str(word) for word in words]
        flags = flags_of(words)
        calls.append((script, words, flags))
        if script == "train_decoder.py":
            out = tmp_path / flags["--out"]
            out.mkdir(parents=True)
            lines = [
                {"psnr": 1.0, "psnr_noisy": 2.0},
                {"l1": 0.1},
                {"psnr": 25.0, "psnr_noisy": 20},
            ]
            (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return "cpu x 1, fp32\nFrechet distance 3.0000  (30 samples, reference toy)\n"

    monkeypatch.setattr(experiments, "run", run)
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.mark.slow
def test_shift_sweep_runs_what_it_should(commands):
    assert experiments.shift_sweep([2, 4], steps=6, num=30) == {2: 3.0, 4: 3.0}
    scripts = [script for script, _, _ in commands]
    assert scripts == ["train_diffusion.py", "sample.py", "fid.py"] * 2
    outs = []
    for i, alpha in enumerate((2, 4)):
        (_, _, training), (_, _, sampling), (_, words, _) = commands[3 * i : 3 * i + 3]
        out = training["--out"]
        outs.append(out)
        assert training.keys() == {"--alpha", "--steps", "--hold", "--out"}
        assert float(training["--alpha"]) == alpha
        assert (training["--steps"], training["--hold"]) == ("6", "3")
        assert sampling.keys() == {"--ckpt", "--num", "--cfg-scale", "--out"}
        assert sampling["--ckpt"] == f"{out}/checkpoint.pt"
        assert sampling["--num"] == "30"
        assert float(sampling["--cfg-scale"]) == 1
        assert sampling["--out"] == f"{out}/samples"
        assert words == [f"{out}/samples.npz", "toy"]
    assert outs[0] != outs[1]


@pytest.mark.slow
def test_noise_sweep_runs_what_it_should(commands):
    results = experiments.noise_sweep([0, 0.8], sigma=0.3, steps=6, num=30)
    assert results == {0: (25.0, 20.0), 0.8: (25.0, 20.0)}
    assert [script for script, _, _ in commands] == ["train_decoder.py"] * 2
    for tau, (_, _, flags) in zip((0, 0.8), commands):
        names = {"--noise-tau", "--disc-weight", "--eval-sigma", "--eval-num", "--steps", "--out"}
        assert flags.keys() == names
        assert float(flags["--noise-tau"]) == tau
        assert float(flags["--disc-weight"]) == 0
        assert float(flags["--eval-sigma"]) == 0.3
        assert (flags["--eval-num"], flags["--steps"]) == ("30", "6")
    assert commands[0][2]["--out"] != commands[1][2]["--out"]


@pytest.fixture
def in_process(run, monkeypatch, tmp_path):
    """Let experiments run their scripts in this process, on 60 training images."""

    def run_words(script, *words):
        return run(script, [str(word) for word in words], tiny=False)

    monkeypatch.setattr(experiments, "run", run_words)
    monkeypatch.setattr(experiments, "ROOT", tmp_path)


@pytest.mark.slow
def test_shift_sweep(in_process):
    """A few steps learn nothing yet, but the distance depends on alpha already."""
    distances = experiments.shift_sweep([1, 4], steps=4, num=20)
    assert list(distances) == [1, 4]
    assert all(0 < distance < math.inf for distance in distances.values())
    assert distances[1] != distances[4]


@pytest.mark.slow
def test_noise_sweep(in_process):
    """Noisy tokens give worse pictures, and the result depends on tau."""
    results = experiments.noise_sweep([0, 0.8], sigma=2, steps=10, num=30)
    assert list(results) == [0, 0.8]
    for clean, noisy in results.values():
        assert clean > noisy
    assert results[0] != results[0.8]
