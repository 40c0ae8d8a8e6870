"""The course's experiments, at sizes of seconds."""

import math

import experiments
import pytest


@pytest.mark.slow
def test_theorem_1():
    """The bound holds, and is nearly reached; with a head a backbone of 16 fits."""
    points = experiments.theorem_1([32, 64], steps=600)
    assert list(points) == [32, 64]
    for width, loss in points.items():
        assert -0.005 < loss - (1 - width / 128) < 0.1
    (wide,) = experiments.theorem_1([16], head=(128, 1, 4), steps=600).values()
    assert wide < 0.3


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
