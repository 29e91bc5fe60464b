"""Image decoders: a feature of the RSSM -> both cameras' images, means of unit-variance Gaussians in [-1, 1].

Both camera heads read one shared linear layer, as LUMOS' do by sharing the module object; it is computed once here
where LUMOS computes it twice.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from wam_jax.networks.convolution import ConvTranspose
from wam_jax.networks.encoder import GRID, PATCH_PIXELS, from_patches
from wam_jax.networks.layers import dense, elu
from wam_jax.types import Array


class ConvHead(nn.Module):
    """Four transposed convolutions, 1 -> 5 -> 13 -> 30 -> 64 pixels: [B, X] -> [B, 64, 64, 3]."""

    depth: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x[:, None, None, :]
        for multiple, kernel, x_block, block in ((4, 5, 1, 1), (2, 5, 1, 1), (1, 6, 1, 2)):
            x = elu(ConvTranspose(multiple * self.depth, kernel, self.dtype, x_block, block)(x))
        return ConvTranspose(3, 6, self.dtype, 2, 1)(x).astype(jnp.float32)


class PatchHead(nn.Module):
    """A hidden vector for each patch, then one linear layer shared by all patches: [B, X] -> [B, 64, 64, 3]."""

    patch_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = elu(dense(GRID * GRID * self.patch_dim, self.dtype)(elu(x)))
        # Two axes only: with three, XLA's weight gradient on a CPU takes three times as long (65 to 22 ms of a step).
        x = x.reshape(-1, self.patch_dim)
        return from_patches(dense(PATCH_PIXELS, self.dtype)(x).astype(jnp.float32))


class Decoder(nn.Module):
    """One shared linear layer and a head for each camera."""

    kind: str  # "conv" or "patch"
    width: int  # channels before the last transposed convolution, or features of a patch
    shared_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, feature: Array) -> tuple[Array, Array]:
        """Maps features [B, D + S*V] to float32 images (static, gripper), each [B, 64, 64, 3] in about [-1, 1]."""
        head = ConvHead if self.kind == "conv" else PatchHead
        shared = dense(self.shared_dim, self.dtype, name="shared")(feature.astype(self.dtype))
        static = head(self.width, self.dtype, name="static")(shared)
        return static, head(self.width, self.dtype, name="gripper")(shared)
