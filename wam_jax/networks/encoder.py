"""Observation encoders: two cameras and proprioception -> one embedding.

`ConvCamera` is LUMOS' (facts: 48-96-192-384 channels, kernel 4, stride 2, no padding, ELU). `PatchCamera` has the
same contract and no convolution: 8x8 patches through one shared linear layer, far cheaper on a CPU, which is why the
quickstart uses it.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from wam_jax.networks.convolution import Conv
from wam_jax.networks.layers import NormElu, dense, elu
from wam_jax.specs import IMAGE_SIZE
from wam_jax.types import Array

PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE
PATCH_PIXELS = PATCH_SIZE * PATCH_SIZE * 3


def normalize_image(image: Array) -> Array:
    """uint8 [..., 64, 64, 3] -> float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def to_patches(image: Array) -> Array:
    """[B, 64, 64, 3] -> [B, 64 patches, 192]."""
    x = image.reshape(-1, GRID, PATCH_SIZE, GRID, PATCH_SIZE, 3)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, GRID * GRID, PATCH_PIXELS)


def from_patches(patches: Array) -> Array:
    """[B, 64 patches, 192] -> [B, 64, 64, 3]."""
    x = patches.reshape(-1, GRID, GRID, PATCH_SIZE, PATCH_SIZE, 3)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)


class ConvCamera(nn.Module):
    """Four convolutions: [B, 64, 64, 3] -> [B, 8 * depth * 4]."""

    depth: int
    dtype: Any

    @nn.compact
    def __call__(self, image: Array) -> Array:
        x = image.astype(self.dtype)
        # Of the blocks that an accelerator may take see convolution.py: those that a layer gives, the next one takes.
        for multiple, x_block, block in ((1, 1, 2), (2, 2, 1), (4, 1, 1), (8, 1, 1)):
            x = elu(Conv(multiple * self.depth, 4, self.dtype, x_block, block)(x))
        return x.reshape(x.shape[0], -1)


class PatchCamera(nn.Module):
    """One linear layer shared by all patches: [B, 64, 64, 3] -> [B, 64 * patch_dim]."""

    patch_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, image: Array) -> Array:
        patches = to_patches(image).reshape(-1, PATCH_PIXELS)  # two axes, see decoder.PatchHead
        return elu(dense(self.patch_dim, self.dtype)(patches.astype(self.dtype))).reshape(image.shape[0], -1)


class Encoder(nn.Module):
    """Two cameras with separate weights, fused, and proprioception appended raw, unless it sees none."""

    kind: str  # "conv" or "patch"
    width: int  # channels of the first convolution, or features of a patch
    fused_dim: int
    proprioception_input: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, rgb_static: Array, rgb_gripper: Array, proprioception: Array) -> Array:
        """Encodes frames, each on its own.

        Args:
          rgb_static: uint8 [B, 64, 64, 3].
          rgb_gripper: uint8 [B, 64, 64, 3].
          proprioception: float32 [B, 18], from specs.proprioception; not looked at without `proprioception_input`.

        Returns:
          e_t, [B, fused_dim + 18]; without `proprioception_input` [B, fused_dim].
        """
        camera = ConvCamera if self.kind == "conv" else PatchCamera
        static = camera(self.width, self.dtype, name="static")(normalize_image(rgb_static))
        gripper = camera(self.width, self.dtype, name="gripper")(normalize_image(rgb_gripper))
        fused = dense(self.fused_dim, self.dtype, name="fuse")(jnp.concatenate([static, gripper], axis=-1))
        fused = NormElu(self.dtype, name="fuse_norm")(fused)
        if not self.proprioception_input:
            return fused
        return jnp.concatenate([fused, proprioception.astype(self.dtype)], axis=-1)
