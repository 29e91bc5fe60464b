"""AlexNet's convolutions (Krizhevsky 2014, as torchvision lays them out), and LPIPS on their features."""

import flax.linen as nn
import jax.numpy as jnp

from wam_jax.types import Array

LAYERS = (
    (64, 11, 4, 2),
    (192, 5, 1, 2),
    (384, 3, 1, 1),
    (256, 3, 1, 1),
    (256, 3, 1, 1),
)  # features, kernel, stride, pad
POOLED_BEFORE = (1, 2)  # two poolings, which take 31 pixels at least
SHIFT = (-0.030, -0.088, -0.188)  # LPIPS' scaling of images in [-1, 1] to what AlexNet was trained on
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-10


class AlexNet(nn.Module):
    """Features after each of five rectified convolutions: [B, S, S, 3] -> five of [B, s, s, C]."""

    @nn.compact
    def __call__(self, x: Array) -> list[Array]:
        found = []
        for index, (features, kernel, stride, padding) in enumerate(LAYERS):
            if index in POOLED_BEFORE:
                x = nn.max_pool(x, (3, 3), (2, 2), "VALID")
            x = nn.relu(nn.Conv(features, (kernel,) * 2, stride, padding, name=f"conv{index}")(x))
            found.append(x)
        return found


class LPIPS(nn.Module):
    """The learned perceptual distance of two images (Zhang et al. 2018, v0.1)."""

    @nn.compact
    def __call__(self, a: Array, b: Array) -> Array:
        """Maps two batches of images in [-1, 1], float32 [B, S, S, 3], to distances [B]."""
        network = AlexNet(name="alexnet")
        pairs = zip(*(network((x - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)) for x in (a, b)), strict=True)
        distances = []
        for index, (x, y) in enumerate(pairs):
            weight = self.param(f"linear{index}", nn.initializers.uniform(1.0), (x.shape[-1],))
            distances.append(jnp.square(_unit(x) - _unit(y)).mean(axis=(1, 2)) @ weight)
        return sum(distances)


def _unit(x: Array) -> Array:
    """Each pixel's features as a vector of length 1."""
    return x / (jnp.sqrt(jnp.square(x).sum(axis=-1, keepdims=True)) + EPSILON)
