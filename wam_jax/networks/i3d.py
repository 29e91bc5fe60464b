"""I3D (Carreira and Zisserman 2017) as pytorch-i3d lays it out, the kind of network whose logits FVD compares.

Inflated Inception v1 at inference: every convolution without bias, then batch normalisation by stored statistics, then
ReLU; TensorFlow's SAME padding throughout. Names of the modules are those of the published weights.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from wam_jax.types import Array

NUM_CLASSES = 400  # of Kinetics
IMAGE_SIZE = 224
MIN_FRAMES = 9  # two are left for the last mean of two after three halvings
EPSILON = 1e-3
BLOCKS = {  # channels of the branches: 1x1; 1x1, 3x3; 1x1, 3x3; pooled 1x1
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
POOLED_BEFORE = {"Mixed_3b": ((1, 3, 3), (1, 2, 2)), "Mixed_4b": ((3, 3, 3), (2,) * 3), "Mixed_5b": ((2,) * 3,) * 2}


class Unit3D(nn.Module):
    """Convolution, batch normalisation by stored statistics, ReLU: [B, T, S, S, C] -> [B, t, s, s, features]."""

    features: int
    kernel_size: int = 1
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size, stride = (self.kernel_size,) * 3, (self.stride,) * 3
        x = nn.Conv(self.features, size, stride, padding="SAME", use_bias=False, name="conv3d")(x)
        return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=EPSILON, name="bn")(x))


class Inception(nn.Module):
    """Four branches side by side: [B, T, S, S, C] -> [B, T, S, S, sum of the branches]."""

    channels: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        first, second_in, second, third_in, third, fourth = self.channels
        pooled = nn.max_pool(x, (3, 3, 3), (1, 1, 1), "SAME")
        branches = (
            Unit3D(first, name="b0")(x),
            Unit3D(second, 3, name="b1b")(Unit3D(second_in, name="b1a")(x)),
            Unit3D(third, 3, name="b2b")(Unit3D(third_in, name="b2a")(x)),
            Unit3D(fourth, name="b3b")(pooled),
        )
        return jnp.concatenate(branches, axis=-1)


class I3D(nn.Module):
    """Logits of a video, averaged over time."""

    @nn.compact
    def __call__(self, video: Array) -> Array:
        """Maps videos in [-1, 1], float32 [B, T, 224, 224, 3] of 9 frames or more, to logits [B, 400]."""
        x = Unit3D(64, 7, 2, name="Conv3d_1a_7x7")(video)
        x = nn.max_pool(x, (1, 3, 3), (1, 2, 2), "SAME")
        x = Unit3D(64, name="Conv3d_2b_1x1")(x)
        x = Unit3D(192, 3, name="Conv3d_2c_3x3")(x)
        for name, channels in BLOCKS.items():
            if name in POOLED_BEFORE:
                x = nn.max_pool(x, *POOLED_BEFORE[name], "SAME")
            x = Inception(channels, name=name)(x)
        x = nn.avg_pool(x, (2, 7, 7), (1, 1, 1), "VALID")
        return nn.Conv(NUM_CLASSES, (1, 1, 1), name="logits")(x).mean(axis=(1, 2, 3))


def preprocess(video: Array) -> Array:
    """Scales uint8 [..., h, w, 3] to [-1, 1] at 224 pixels, as FVD's reference does (Unterthiner et al. 2018).

    That is TensorFlow 1's resize_bilinear: pixel i of S lies at i h / S of the old ones, without half a pixel's shift.
    """
    x = jnp.asarray(video, jnp.float32) * (2 / 255) - 1
    return _resize(_resize(x, -3), -2)


def _resize(x: Array, axis: int) -> Array:
    length = x.shape[axis]
    position = np.arange(IMAGE_SIZE) * (length / IMAGE_SIZE)
    below = position.astype(int)
    share = np.expand_dims(position - below, tuple(range(axis + 1, 0))).astype(np.float32)
    low, high = (jnp.take(x, index, axis) for index in (below, np.minimum(below + 1, length - 1)))
    return low + share * (high - low)
