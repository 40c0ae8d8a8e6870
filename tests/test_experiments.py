"""The course's experiments, at sizes of seconds."""

import json
import math

import experiments
import pytest
import torch


@pytest.mark.slow
def test_theorem_1_draws_uniform_times(monkeypatch):
    """Of one latent under the null label, without a shift."""
    times = []

    def noting(model, z, y, alpha, t=None, noise=None):
        assert (z == z[:1]).all()
        assert (y == 10).all()
        assert alpha == 1
        times.append(t)
        return flow_loss(model, z, y, alpha, t, noise)

    flow_loss = experiments.flow_loss
    monkeypatch.setattr(experiments, "flow_loss", noting)
    experiments.theorem_1([16], steps=200)
    t = torch.cat(times)
    assert len(t) == 200 * 32
    assert t.min() >= 0
    assert t.max() <= 1
    assert abs(t.mean() - 0.5) < 0.02
    assert abs(t.std() - 12**-0.5) < 0.02, "as of uniform numbers"


@pytest.mark.slow
def test_theorem_1():
    """The bound holds, and is nearly reached; with a head a backbone of 16 fits."""
    points = experiments.theorem_1([32, 64], steps=600)
    assert list(points) == [32, 64]
    for width, loss in points.items():
        assert -0.005 < loss - (1 - width / 128) < 0.1
    (wide,) = experiments.theorem_1([16], head=(128, 1, 4), steps=600).values()
    assert wide < 0.3


def flags_of(words):
    """{flag: its value, or None} of a command line."""
    flags = {}
    for word, following in zip(words, [*words[1:], "--"]):
        if word.startswith("--"):
            flags[word] = None if following.startswith("--") else following
    return flags


@pytest.fixture
def commands(monkeypatch):
    """(script, words, flags) of what an experiment would have run."""
    ran = []
    answer = json.dumps({"Frechet distance": 3.0, "psnr_noisy": 20.0})

    def run(script, *words):
        words = [str(word) for word in words]
        ran.append((script, words, flags_of(words)))
        return f"some text\n{answer}\n" if script == "train_decoder.py" else answer

    monkeypatch.setattr(experiments, "run", run)
    return ran


@pytest.mark.slow
def test_shift_sweep_runs_what_it_should(commands):
    assert experiments.shift_sweep([2, 4], steps=6, num=30) == {2: 3.0, 4: 3.0}
    scripts = [script for script, _, _ in commands]
    assert scripts == ["train_diffusion.py", "sample.py", "fid.py"] * 2
    outs = []
    for i, alpha in enumerate((2, 4)):
        (_, _, training), (_, _, drawing), (_, words, scoring) = commands[3 * i : 3 * i + 3]
        out = training["--out"]
        outs.append(out)
        assert training.keys() == {"--alpha", "--steps", "--hold", "--out"}
        assert float(training["--alpha"]) == alpha
        assert (training["--steps"], training["--hold"]) == ("6", "3")
        assert drawing["--ckpt"] == f"{out}/checkpoint.pt"
        assert drawing["--num"] == "30"
        assert float(drawing["--cfg-scale"]) == 1
        assert drawing["--out"] == f"{out}.npz"
        assert words[:2] == [f"{out}.npz", "toy"]
        assert "--json" in scoring
    assert outs[0] != outs[1]


@pytest.mark.slow
def test_noise_sweep_runs_what_it_should(commands):
    line = {0: 20.0, 0.4: 20.0}
    assert experiments.noise_sweep([0, 0.8], [0, 0.4], steps=6, num=30) == {0: line, 0.8: line}
    assert {script for script, _, _ in commands} == {"train_decoder.py"}
    outs = []
    for i, tau in enumerate((0, 0.8)):
        (_, _, training), *evaluations = commands[3 * i : 3 * i + 3]
        out = training["--out"]
        outs.append(out)
        assert training.keys() == {"--noise-tau", "--gan", "--steps", "--out"}
        assert float(training["--noise-tau"]) == tau
        assert float(training["--gan"]) == 0
        assert training["--steps"] == "6"
        for (_, _, evaluation), sigma in zip(evaluations, (0, 0.4)):
            assert "--eval-only" in evaluation
            assert evaluation["--ckpt"] == f"{out}/checkpoint.pt"
            assert evaluation["--out"] == out
            assert float(evaluation["--eval-sigma"]) == sigma
            assert evaluation["--eval-num"] == "30"
    assert outs[0] != outs[1]


@pytest.mark.slow
def test_shift_sweep():
    """So few steps that nothing is learned, but for different alphas differently."""
    distances = experiments.shift_sweep([1, 4], steps=4, num=20)
    assert list(distances) == [1, 4]
    assert all(0 < distance < math.inf for distance in distances.values())
    assert distances[1] != distances[4]


@pytest.mark.slow
def test_noise_sweep():
    """More noise in the latents makes a picture worse."""
    results = experiments.noise_sweep([0, 0.8], [0, 2], steps=20, num=40)
    assert list(results) == [0, 0.8]
    for line in results.values():
        assert list(line) == [0, 2]
        assert line[0] > line[2]
    assert results[0] != results[0.8]
