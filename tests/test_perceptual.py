"""LPIPS and FVD on random weights in the layout of the published files."""

import jax
import numpy as np
import pytest
import torch_files_writer as writer
from flax import traverse_util

from wam_jax import perceptual
from wam_jax.networks import alexnet, i3d

RNG = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return (scale * RNG.normal(size=shape)).astype(np.float32)


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory):
    """AlexNet as torchvision saves it, its classifier included, and the linear layers."""
    folder, channels, found, linear = tmp_path_factory.mktemp("weights"), 3, {}, {}
    for index, (features, kernel, _, _) in enumerate(alexnet.LAYERS):
        scale = (channels * kernel**2) ** -0.5
        found[f"features.{(0, 3, 6, 8, 10)[index]}.weight"] = normal(features, channels, kernel, kernel, scale=scale)
        found[f"features.{(0, 3, 6, 8, 10)[index]}.bias"] = normal(features, scale=0.1)
        linear[f"lin{index}.model.1.weight"] = np.abs(normal(1, features, 1, 1))
        channels = features
    found["classifier.1.weight"] = normal(4, 4)
    return writer.save(folder / "alexnet.pth", found), writer.save(folder / "alex.pth", linear, writer.write_stream)


def pictures(count, size=64):
    return RNG.integers(0, 256, (count, size, size, 3), np.uint8)


def test_lpips_is_a_distance(lpips_files):
    params = perceptual.load_lpips(*lpips_files)
    a, b = pictures(3), pictures(3)
    distance = np.asarray(perceptual.lpips(params, a, b))
    assert distance.shape == (3,) and (distance > 0).all()
    np.testing.assert_array_equal(perceptual.lpips(params, a, a), 0)
    np.testing.assert_allclose(perceptual.lpips(params, b, a), distance, rtol=1e-5)
    np.testing.assert_allclose(perceptual.lpips(params, a[:1], b[:1]), distance[:1], rtol=1e-4)
    nearer = (0.5 * a + 0.5 * b).astype(np.uint8)
    assert (np.asarray(perceptual.lpips(params, a, nearer)) < distance).all()


def test_lpips_first_layer_by_hand(lpips_files):
    """With the other layers' weights at zero: the first convolution as a sum over one window, in PyTorch's layout."""
    params = perceptual.load_lpips(*lpips_files)
    params = params | {f"linear{index}": np.zeros_like(params[f"linear{index}"]) for index in range(1, 5)}
    a, b = pictures(1, 31), pictures(1, 31)
    weight, bias = (perceptual.torch_files.read(lpips_files[0])[f"features.0.{x}"] for x in ("weight", "bias"))
    units = []
    for image in (a[0], b[0]):
        x = (image / 127.5 - 1 - np.array(alexnet.SHIFT)) / np.array(alexnet.SCALE)
        x = np.pad(x, ((2, 2), (2, 2), (0, 0))).transpose(2, 0, 1)
        corners = range(0, 31 + 4 - 11 + 1, 4)
        out = np.array(
            [[(weight * x[:, i : i + 11, j : j + 11]).sum((1, 2, 3)) + bias for j in corners] for i in corners]
        )
        out = np.maximum(out, 0)
        units.append(out / np.linalg.norm(out, axis=-1, keepdims=True))
    expected = (np.square(units[0] - units[1]) @ params["linear0"]).mean()
    np.testing.assert_allclose(perceptual.lpips(params, a, b), [expected], rtol=1e-4)


def i3d_arrays():
    """Random weights under pytorch-i3d's names, in its layout."""
    video = jax.ShapeDtypeStruct((1, i3d.MIN_FRAMES, i3d.IMAGE_SIZE, i3d.IMAGE_SIZE, 3), np.float32)
    shapes = traverse_util.flatten_dict(jax.eval_shape(i3d.I3D().init, jax.random.key(0), video))
    names = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var", "bias": "bias"}
    found = {}
    for (_, *modules, leaf), x in shapes.items():
        modules = [*modules, "conv3d"] if modules == ["logits"] else modules
        shape = (x.shape[4], x.shape[3], *x.shape[:3]) if leaf == "kernel" else x.shape
        scale = np.prod(shape[1:]) ** -0.5 if leaf == "kernel" else 0.1
        value = normal(*shape, scale=scale)
        found[".".join((*modules, names[leaf]))] = np.abs(value) + 1 if leaf in ("scale", "var") else value
    return found


@pytest.fixture(scope="module")
def i3d_file(tmp_path_factory):
    return writer.save(tmp_path_factory.mktemp("weights") / "rgb_imagenet.pt", i3d_arrays(), writer.write_stream)


def test_i3d_is_the_published_network(i3d_file):
    found = perceptual.torch_files.read(i3d_file)
    learned = {name: x for name, x in found.items() if "running" not in name}
    assert sum(x.size for x in learned.values()) == 12_697_264  # of I3D for Kinetics-400, RGB
    assert found["Conv3d_1a_7x7.conv3d.weight"].shape == (64, 3, 7, 7, 7)
    assert found["Mixed_4f.b1b.conv3d.weight"].shape == (320, 160, 3, 3, 3)
    assert found["logits.conv3d.weight"].shape == (400, 1024, 1, 1, 1)


def test_features_of_videos_and_their_distance(i3d_file):
    variables = perceptual.load_i3d(i3d_file)
    bias = perceptual.torch_files.read(i3d_file)["logits.conv3d.bias"]
    np.testing.assert_array_equal(variables["params"]["logits"]["bias"], bias)
    features = np.asarray(perceptual.video_features(variables, pictures(9, 16)[None]))
    assert features.shape == (1, 400) and np.isfinite(features).all() and features.std() > 0


def test_pixels_lie_where_the_reference_of_fvd_puts_them():
    """Pixel i at i h / 224 of a ramp: its value is its place, but for what lies beyond the last pixel."""
    rows = np.arange(64, dtype=np.uint8)[:, None, None] * np.ones((64, 32, 3), np.uint8)
    video = np.asarray(i3d.preprocess(rows[None]))[0]
    assert video.shape == (224, 224, 3)
    expected = np.minimum(np.arange(224) * 64 / 224, 63)
    np.testing.assert_allclose((video + 1) * 127.5, expected[:, None, None] * np.ones((224, 224, 3)), atol=1e-4)
    columns = np.asarray(i3d.preprocess(rows[:, :1].transpose(1, 0, 2).repeat(16, 0)[None]))[0]
    np.testing.assert_allclose(columns, video.transpose(1, 0, 2), atol=1e-6)


def test_frechet_distance_of_known_gaussians():
    a = RNG.normal(size=(50, 80))  # fewer samples than dims, as FVD of 100 videos
    shift = RNG.normal(size=80)
    assert perceptual.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert perceptual.frechet_distance(a, a[::-1] + shift) == pytest.approx(np.square(shift).sum())
    wide = a.mean(axis=0) + 3 * (a - a.mean(axis=0))  # (3 - 1)^2 tr(C)
    assert perceptual.frechet_distance(a, wide) == pytest.approx(4 * a.var(axis=0, ddof=1).sum())
    b = RNG.normal(size=(4000, 2)) * [1, 2] + [0, 3]
    c = RNG.normal(size=(4000, 2)) * [2, 1]
    assert perceptual.frechet_distance(b, c) == pytest.approx(9 + 1 + 1, rel=0.05)


@pytest.mark.parametrize("content", [None, b"<html>not found</html>"])
def test_a_missing_or_wrong_file_is_named_with_what_to_fetch(tmp_path, lpips_files, content):
    path = tmp_path / "weights.pth"
    if content:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"--lpips_alexnet=.*weights.pth: .*It takes alexnet-owt.*torchvision"):
        perceptual.load_lpips(str(path), lpips_files[1])
    with pytest.raises(ValueError, match=r"--lpips_linear=.*weights.pth: .*It takes alex.pth.*PerceptualSimilarity"):
        perceptual.load_lpips(lpips_files[0], str(path))
    with pytest.raises(ValueError, match=r"--i3d=.*weights.pth: .*It takes rgb_imagenet.pt.*pytorch-i3d"):
        perceptual.load_i3d(str(path))


def test_files_in_each_others_place_are_named(tmp_path, lpips_files):
    with pytest.raises(ValueError, match=r"alex.pth has no features.0.weight, so it is another file. It takes alexnet"):
        perceptual.load_lpips(*lpips_files[::-1])
    other = writer.save(tmp_path / "squeeze.pth", {"lin0.model.1.weight": normal(1, 128, 1, 1)})
    with pytest.raises(ValueError, match=r"lin0.model.1.weight has shape \(1, 1, 128, 1\), not \(1, 1, 64, 1\)"):
        perceptual.load_lpips(lpips_files[0], other)
