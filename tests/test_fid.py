"""fid.py: the network's names, the resize, the distance's closed forms, and what it reads."""

import hashlib

import numpy as np
import pytest
import torch
from fid import Images, InceptionV3, frechet_distance, resize_adm, statistics
from test_rae import save_images


def sha(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_inception_has_the_published_names_and_shapes():
    state = {k: v for k, v in InceptionV3().state_dict().items() if not k.endswith("num_batches_tracked")}
    assert len(state) == 472
    assert sha(sorted(state)) == "ed87dd0f166ade6855a6d284ee17fb1bc768f59db1b37c53afed23d5c199e182"
    assert sha([f"{k} {tuple(state[k].shape)}" for k in sorted(state)]) == \
        "d84f693f2abd7fea61cb31c87d3b2f268bf707c1bae1db219afdad3363959cb0"


def test_inception_against_torchvision():
    """The same weights in torchvision's network, with the three pools that differ patched in."""
    from torchvision.models import inception

    def average(x, **kw):
        return torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    torch.manual_seed(0)
    ours = InceptionV3().eval()
    theirs = inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False,
                                  transform_input=False).eval()
    theirs.load_state_dict(ours.state_dict())
    theirs.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 299, 299)
    kept, pools = inception.F.avg_pool2d, []

    class Functional:
        def __getattr__(self, name):
            return getattr(torch.nn.functional, name)

        def avg_pool2d(self, x, **kw):            # 5b-5d, 6b-6e, 7b average; the tenth, 7c, takes the maximum
            pools.append(1)
            return torch.nn.functional.max_pool2d(x, 3, 1, 1) if len(pools) == 9 else average(x)
    inception.F, kept = Functional(), inception.F
    try:
        with torch.no_grad():
            want = theirs(x)
    finally:
        inception.F = kept
    assert len(pools) == 9
    with torch.no_grad():
        assert (ours(x) - want).abs().max() < 1e-5 * want.abs().max()


def test_resize_is_tensorflow_1s():
    x = torch.tensor([[[[0.0, 10], [20, 30]]]])
    assert resize_adm(x, 4)[0, 0].tolist() == [[0, 5, 10, 10], [10, 15, 20, 20], [20, 25, 30, 30],
                                               [20, 25, 30, 30]]


def test_frechet_distance_of_gaussians():
    rng = np.random.default_rng(0)
    d = 6
    mu1, mu2, s1, s2 = rng.normal(size=d), rng.normal(size=d), rng.random(d) + 0.1, rng.random(d) + 0.1
    closed = np.square(mu1 - mu2).sum() + np.square(np.sqrt(s1) - np.sqrt(s2)).sum()
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    assert frechet_distance(mu1, np.diag(s1), mu2, np.diag(s2)) == pytest.approx(closed, rel=1e-9)
    assert frechet_distance(turn @ mu1, turn @ np.diag(s1) @ turn.T, turn @ mu2,
                            turn @ np.diag(s2) @ turn.T) == \
        pytest.approx(closed, rel=1e-9)
    a = rng.normal(size=(20, d))
    assert abs(frechet_distance(a.mean(0), np.cov(a.T), a.mean(0), np.cov(a.T))) < 1e-6


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_statistics_stream(tmp_path, batch):
    save_images(tmp_path / "a" / "b", 9, size=(8, 8))
    save_images(tmp_path / "c", 3, size=(8, 8), mode="L", suffix=".PNG", seed=4)
    images = Images(tmp_path)
    assert len(images) == 12
    mu, sigma = statistics(images, lambda x: x.float().flatten(1)[:, :20], 12, batch, "cpu")
    f = np.stack([images.read(i).flatten()[:20].numpy() for i in range(12)]).astype(np.float64)
    assert np.allclose(mu, f.mean(0), rtol=1e-12) and np.allclose(sigma, np.cov(f.T), rtol=1e-9)


def test_bad_arrays(tmp_path):
    for name, arrays, message in (("f", dict(arr_0=np.zeros((4, 8, 8, 3))), "uint8"),
                                  ("g", dict(arr_0=np.zeros((4, 3, 8, 8), np.uint8)), "uint8"),
                                  ("h", dict(x=np.zeros(3)), "uint8"),
                                  ("i", dict(arr_0=np.zeros((1, 8, 8, 3), np.uint8)), "1 images")):
        np.savez(tmp_path / name, **arrays)
        with pytest.raises(ValueError, match=message):
            Images(tmp_path / f"{name}.npz")
    np.savez(tmp_path / "evil.npz", arr_0=np.array([print], dtype=object))
    with pytest.raises(ValueError, match="not an .npz"):
        Images(tmp_path / "evil.npz")
