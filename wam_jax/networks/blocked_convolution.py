"""XLA's convolutions and their transposes, and, for GPUs, those of stride 2 at stride 1 over blocks of pixels.

An image in blocks of b has the b x b pixels of each block as channels: [B, S, S, C] -> [B, S/b, S/b, b * b * C]. A
convolution of stride 2 takes blocks of 2 m pixels of the large image to blocks of m pixels of the small one at stride
1, with a kernel of few taps and many channels, which is what cuDNN's kernels are made for: LUMOS' convolutions take
half the time on an H200 in bfloat16. Worst at stride 2 are those with the 3 channels of a picture. With m of 2 a layer
gives its image in the blocks that the next one takes, for up to four times the multiplications, most of them by zeros;
only the layers next to the pictures, which have few, do that.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax


def to_blocks(image: Array, block: int) -> Array:
    """[B, S, S, C] -> [B, S/b, S/b, b * b * C]; pixels that fill no block are left out."""
    batch, size, _, channels = image.shape
    count = size // block
    image = image[:, : count * block, : count * block].reshape(batch, count, block, count, block, channels)
    return image.transpose(0, 1, 3, 2, 4, 5).reshape(batch, count, count, -1)


def to_pixels(blocks: Array, block: int) -> Array:
    """The inverse: [B, n, n, b * b * C] -> [B, n b, n b, C]."""
    batch, count = blocks.shape[:2]
    image = blocks.reshape(batch, count, count, block, block, -1).transpose(0, 1, 3, 2, 4, 5)
    return image.reshape(batch, count * block, count * block, -1)


def convolve(large: Array, kernel: Array, block: int) -> Array:
    """A convolution of stride 2 without padding.

    Args:
      large: [B, N, N, 4 m m C], in blocks of 2 m.
      kernel: [k, k, C, c].
      block: m.

    Returns:
      [B, n, n, m m c], in blocks of m; pixels that fill no block are left out.
    """
    kernel = blocks_kernel(kernel, block)
    few = large.shape[1] - kernel.shape[0] < kernel.shape[0]  # no more windows than taps
    return _convolve_few_windows(large, kernel) if few else convolve_once(large, kernel, 1)


def convolve_transposed(small: Array, kernel: Array, block: int) -> Array:
    """The transpose: [B, n, n, m m c] in blocks of m and [k, k, C, c] -> [B, N, N, 4 m m C] in blocks of 2 m.

    An odd kernel leaves a row and a column of pixels too many, which are zero.
    """
    return transpose_once(small, blocks_kernel(kernel, block), 1)


def blocks_kernel(kernel: Array, block: int) -> Array:
    """The kernel [k, k, C, c] between blocks of 2 m and of m pixels: [taps, taps, 4 m m C, m m c].

    Pixel a of a small block reads pixels 2 a to 2 a + k - 1 from the beginning of the large block at its place.
    """
    size, _, channels, features = kernel.shape
    taps = -(-(2 * (block - 1) + size) // (2 * block))

    def place(kernel: Array, axis: int) -> Array:
        widths = [[(0, 0)] * axis + [(2 * a, 2 * block * taps - size - 2 * a)] for a in range(block)]
        return jnp.stack([jnp.pad(kernel, w + [(0, 0)] * (kernel.ndim - axis - 1)) for w in widths], axis=-2)

    kernel = place(place(kernel, 0), 1).reshape(taps, 2 * block, taps, 2 * block, channels, block, block, features)
    return kernel.transpose(0, 2, 1, 3, 4, 5, 6, 7).reshape(taps, taps, -1, block * block * features)


def convolve_once(x: Array, kernel: Array, stride: int) -> Array:
    """XLA's convolution: [B, S, S, C] and [k, k, C, c] -> [B, s, s, c]."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", dimension_numbers=numbers)


@jax.custom_vjp
def _convolve_few_windows(x: Array, kernel: Array) -> Array:
    """At stride 1 of a small image, with the kernel's gradient as a matrix product.

    XLA computes that gradient as a forward convolution, with batch and channels exchanged.
    """
    return convolve_once(x, kernel, 1)


def _few_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    of_x = jax.linear_transpose(lambda x: convolve_once(x, kernel, 1), x)(gradient)[0]
    taps, count = kernel.shape[0], gradient.shape[1]
    rows = gradient.reshape(-1, gradient.shape[-1])
    windows = [x[:, i : i + count, j : j + count].reshape(-1, x.shape[-1]) for i in range(taps) for j in range(taps)]
    return of_x, (jnp.concatenate(windows, axis=-1).T @ rows).reshape(kernel.shape)


_convolve_few_windows.defvjp(lambda x, kernel: (_convolve_few_windows(x, kernel), (x, kernel)), _few_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def transpose_once(x: Array, kernel: Array, stride: int) -> Array:
    """The transpose of `convolve_once`, written so that XLA finds cuDNN's kernels in all three directions.

    From `lax.conv_transpose` it makes convolutions over images spread with zeros, 5 GB of them in an update of the
    paper's size, and kernel gradients with batch and channels exchanged.
    """
    size = stride * (x.shape[1] - 1) + kernel.shape[0]
    image = jax.ShapeDtypeStruct((x.shape[0], size, size, kernel.shape[2]), x.dtype)
    return jax.linear_transpose(lambda image: convolve_once(image, kernel, stride), image)(x)[0]


def _transpose_backward(stride: int, residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    of_kernel = jax.linear_transpose(lambda kernel: convolve_once(gradient, kernel, stride), kernel)(x)[0]
    return convolve_once(gradient, kernel, stride), of_kernel


transpose_once.defvjp(lambda x, kernel, stride: (transpose_once(x, kernel, stride), (x, kernel)), _transpose_backward)
