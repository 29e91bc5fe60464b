"""Convolutions of stride 2 without padding, and their transposes, in the form that is fastest on the backend.

Both are one linear map read in two directions. `patches` cuts the large image into the kernel's windows, which the
kernel as a matrix takes to the small image's channels; the transposed convolution goes back and adds the windows where
they overlap. Function, parameters and their names are those of Flax's `Conv` and `ConvTranspose`.

On a GPU they are convolutions of stride 1 over blocks of pixels (blocked_convolution.py). On a CPU XLA's convolutions
are good in some directions, and up to 50 times slower than a matrix product in others. Measured on one core at LUMOS'
sizes, ms an image (a matrix product at 85 GFLOP/s):

    layer           windows -> channels     channels -> windows     gradient of the kernel
    encoder 2       0.5-0.7   (0.34)        0.6-0.9   (0.34)        0.8-2.0   (0.34)
    encoder 4       0.25      (0.11)        5.4       (0.11)        0.2       (0.11)
    decoder 1       3.3       (0.17)        0.6       (0.17)        2.9       (0.17)
    decoder 2       0.4       (0.27)        0.3       (0.27)        13.5      (0.27)
    decoder 3       1.2       (0.66)        1.3-1.6   (0.66)        36.5      (0.66)
    decoder 4       0.3       (0.11)        0.4-0.6   (0.11)        5.7       (0.11)

Not measured elsewhere yet: other backends take XLA's convolutions of stride 2. From one pixel a transposed convolution
is a linear layer everywhere.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from wam_jax.networks import blocked_convolution as blocked
from wam_jax.networks import plain
from wam_jax.networks.layers import xavier

MATRIX_BACKENDS = ("cpu",)
BLOCK_BACKENDS = ("gpu",)
# Windows of a group of images, which should stay in a cache until they are multiplied; but the sum of the kernel's
# gradient passes through memory once a group. Both gradients of decoder 3, ms an image: 1.3 with 0.5 million numbers a
# group, 2.1 with 1.5 million; of encoder 4, with its large kernel, 0.66 and 0.43.
GROUP_NUMBERS = 500_000


class _Layer(nn.Module):
    """A linear map of images, its subclass' `convolve`, with a kernel and a bias, both stored as float32.

    On BLOCK_BACKENDS the image comes in blocks of `x_block` pixels and goes in blocks of `block`, elsewhere both are 1.
    Blocks of one pixel are always possible; else a large image has blocks of twice as many pixels a side as a small.
    """

    features: int
    kernel_size: int
    dtype: Any
    x_block: int = 1
    block: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x_block, block = (self.x_block, self.block) if _in_blocks() else (1, 1)
        shape = (self.kernel_size, self.kernel_size, x.shape[-1] // x_block**2, self.features)
        kernel = self.param("kernel", xavier, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return self.convolve(x.astype(self.dtype), kernel.astype(self.dtype), bias, x_block, block)


class Conv(_Layer):
    """A convolution of stride 2 without padding: [B, S, S, C] -> [B, s, s, features], s = (S - k) // 2 + 1.

    In blocks of more than a pixel, those that are not filled are left out.
    """

    def convolve(self, x: Array, kernel: Array, bias: Array, x_block: int, block: int) -> Array:
        return convolve(x, kernel, bias, x_block, block)


class ConvTranspose(_Layer):
    """The transpose of such a convolution: [B, s, s, C] -> [B, S, S, features], S = 2 (s - 1) + k."""

    def convolve(self, x: Array, kernel: Array, bias: Array, x_block: int, block: int) -> Array:
        return convolve_transposed(x, kernel, bias, x_block, block)


def _in_blocks() -> bool:
    return plain.takes(BLOCK_BACKENDS)


def convolve(x: Array, kernel: Array, bias: Array, x_block: int = 1, block: int = 1) -> Array:
    """[B, S, S, C], [k, k, C, features] and [features] -> [B, s, s, features]; of blocks see `_Layer`."""
    if plain.takes(MATRIX_BACKENDS):
        return add_bias(_windows_to_channels(x, kernel), bias)
    if not _in_blocks() or kernel.shape[0] % 2:
        return add_bias(blocked.convolve_once(x, kernel, 2), bias)
    assert x_block in (1, 2 * block), f"an image in blocks of {x_block} gives one in half as many, not in {block}"
    large = x if x_block > 1 else blocked.to_blocks(x, 2 * block)
    return add_bias(blocked.convolve(large, kernel, block), bias)


def convolve_transposed(x: Array, kernel: Array, bias: Array, x_block: int = 1, block: int = 1) -> Array:
    """[B, s, s, C], [k, k, C, features] and [features] -> [B, S, S, features].

    The kernel's orientation is that of Flax and JAX.
    """
    kernel = kernel[::-1, ::-1].swapaxes(2, 3)  # as of the convolution that it is the transpose of
    if x.shape[1] == 1:  # one window, nothing overlaps: a linear layer
        matrix = kernel.reshape(-1, kernel.shape[-1]).T
        return add_bias((x.reshape(x.shape[0], -1) @ matrix).reshape(-1, *kernel.shape[:3]), bias)
    if plain.takes(MATRIX_BACKENDS):
        return add_bias(_channels_to_windows(x, kernel), bias)
    if not _in_blocks():
        return add_bias(blocked.transpose_once(x, kernel, 2), bias)
    assert block in (1, 2 * x_block), f"an image in blocks of {x_block} gives one in twice as many, not in {block}"
    large = add_bias(blocked.convolve_transposed(x, kernel, x_block), bias)
    if block > 1:
        return large
    size = 2 * (x.shape[1] * x_block - 1) + kernel.shape[0]
    return blocked.to_pixels(large, 2 * x_block)[:, :size, :size]


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """[..., b * b * C], in blocks of b x b pixels, and float32 [C]: each pixel of a block gets the same bias.

    Gradients, in reverse mode alone, are summed in float32.
    """
    return x + jnp.tile(bias.astype(x.dtype), x.shape[-1] // len(bias))


def _bias_gradient(bias: Array, gradient: Array) -> tuple[Array, Array]:
    """Sums blocks first: all at once, XLA reads a picture's gradient three channels at a time (0.43 ms for 61 MB)."""
    sums = gradient.sum(tuple(range(gradient.ndim - 1)), dtype=jnp.float32)
    if len(sums) > len(bias):
        sums = lax.optimization_barrier(sums).reshape(-1, len(bias)).sum(0)
    return gradient, sums.astype(bias.dtype)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), bias), _bias_gradient)


# --- Windows ---


def patches(image: Array, kernel_size: int) -> Array:
    """Cuts windows at stride 2: [B, S, S, C] -> [B, s, s, k * k * C], in the order of the kernel [k, k, C, c]."""
    batch, size, _, channels = image.shape
    count = (size - kernel_size) // 2 + 1
    taps = [
        lax.slice(image, (0, i, j, 0), (batch, i + 2 * count - 1, j + 2 * count - 1, channels), (1, 2, 2, 1))
        for i in range(kernel_size)
        for j in range(kernel_size)
    ]
    return jnp.concatenate(taps, axis=-1)


def overlap_add(small: Array, matrix: Array, size: int, kernel_size: int) -> Array:
    """The transpose of a convolution with an even kernel: [B, s, s, c] -> [B, size, size, C].

    The kernel is taken apart into squares of 2 x 2 taps, which never overlap: what is added are the few shifted images
    of squares, and the squares become pixels at the end.

    Args:
      small: [B, s, s, c].
      matrix: [c, k * k * C], from `squares_matrix`.
      size: pixels of the large image's side.
      kernel_size: k.
    """
    batch, count, _, features = small.shape
    reach = kernel_size // 2
    windows = (small.reshape(-1, features) @ matrix).reshape(batch, count, count, reach, reach, 2, 2, -1)
    channels = windows.shape[-1]
    squares = jnp.zeros((), small.dtype)
    for i in range(reach):
        for j in range(reach):
            shift = ((0, 0), (i, reach - 1 - i), (j, reach - 1 - j), (0, 0), (0, 0), (0, 0))
            squares = squares + jnp.pad(windows[:, :, :, i, j], shift)
    image = squares.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * (count + reach - 1), -1, channels)
    missing = size - image.shape[1]  # pixels that no window reaches
    return jnp.pad(image, ((0, 0), (0, missing), (0, missing), (0, 0)))


def squares_matrix(kernel: Array) -> Array:
    """[k, k, C, c] -> [c, k * k * C], the taps in squares; the barrier keeps XLA from doing it in every group."""
    reach, channels, features = kernel.shape[0] // 2, *kernel.shape[2:]
    squares = kernel.reshape(reach, 2, reach, 2, channels, features).transpose(5, 0, 2, 1, 3, 4)
    return lax.optimization_barrier(squares.reshape(features, -1))


def _in_groups(function: Callable, images: tuple[Array, ...], kernel: Array, windows: int) -> tuple[Any, Any]:
    """Calls `function(*images) -> (per image, sum over images)` for groups of images, so that windows stay in a cache.

    Args:
      function: either result may be None.
      images: arrays [B, ...].
      kernel: [k, k, C, c].
      windows: of one image.
    """
    batch = images[0].shape[0]
    limit = max(1, max(GROUP_NUMBERS, 2 * kernel.size) // (windows * math.prod(kernel.shape[:3])))
    size = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= limit)
    if size == batch:
        return function(*images)
    groups = tuple(x.reshape(-1, size, *x.shape[1:]) for x in images)

    def step(total, group_of_images):
        mapped, part = function(*group_of_images)
        return jax.tree.map(jnp.add, total, part), mapped

    _, part = jax.eval_shape(function, *(x[0] for x in groups))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), part)
    total, mapped = lax.scan(step, zero, groups)
    return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), mapped), total


# --- The two directions; small is the image of fewer pixels [B, s, s, c], large the other [B, S, S, C] ---


def _spread(small: Array, kernel: Array, size: int) -> Array:
    matrix = squares_matrix(kernel)

    def spread(small):
        return overlap_add(small, matrix, size, kernel.shape[0]), None

    return _in_groups(spread, (small,), kernel, small.shape[1] ** 2)[0]


@jax.custom_vjp
def _windows_to_channels(large: Array, kernel: Array) -> Array:
    return blocked.convolve_once(large, kernel, 2)


def _windows_to_channels_forward(large, kernel):
    return blocked.convolve_once(large, kernel, 2), (large, kernel)


def _windows_to_channels_backward(residuals, gradient):
    large, kernel = residuals

    def kernel_gradient(large, gradient):
        windows = patches(large, kernel.shape[0])
        return None, gradient.reshape(-1, gradient.shape[-1]).T @ windows.reshape(-1, windows.shape[-1])

    _, total = _in_groups(kernel_gradient, (large, gradient), kernel, gradient.shape[1] ** 2)
    return _spread(gradient, kernel, large.shape[1]), total.T.reshape(kernel.shape)


_windows_to_channels.defvjp(_windows_to_channels_forward, _windows_to_channels_backward)


@jax.custom_vjp
def _channels_to_windows(small: Array, kernel: Array) -> Array:
    if kernel.shape[0] % 2:  # not made of squares; XLA is fast at the one odd layer of LUMOS
        return lax.conv_transpose(small, kernel[::-1, ::-1].swapaxes(2, 3), (2, 2), "VALID")
    return _spread(small, kernel, 2 * (small.shape[1] - 1) + kernel.shape[0])


def _channels_to_windows_forward(small, kernel):
    return _channels_to_windows(small, kernel), (small, kernel)


def _channels_to_windows_backward(residuals, gradient):
    small, kernel = residuals
    matrix = kernel.reshape(-1, kernel.shape[-1])

    def gradients(small, gradient):
        windows = patches(gradient, kernel.shape[0]).reshape(-1, matrix.shape[0])
        return (windows @ matrix).reshape(small.shape), small.reshape(-1, small.shape[-1]).T @ windows

    small_gradient, total = _in_groups(gradients, (small, gradient), kernel, small.shape[1] ** 2)
    return small_gradient, total.T.reshape(kernel.shape)


_channels_to_windows.defvjp(_channels_to_windows_forward, _channels_to_windows_backward)
