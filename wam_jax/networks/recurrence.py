"""Products of a recurrent step with few rows, and a scan whose gradients keep work out of its loops.

A step of the RSSM multiplies a few rows (the batch) by kernels that fill a cache, so time goes into moving kernels.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import lax

from wam_jax.networks import plain

# Where a product of ROWS rows and a large kernel is faster with the kernel lying transposed (XLA does that once, before
# the loop), and, with FEW_ROWS, as kernel times columns, filled up to a multiple of COLUMNS. Measured on one CPU core:
# two products 1024 x 3072 in a scan, ms a step: 50 rows 22.3 -> 11.3 to 13.5, 10 rows 9.0 -> 6.9 to 8.0, but 4 rows
# 5.1 -> 6.1 to 6.8. As columns: 10 rows (all products of the RSSM in an update of 10 x 50 frames) 0.81 -> 0.43 s.
TRANSPOSED_BACKENDS = ("cpu",)
ROWS = range(8, 129)
FEW_ROWS = range(8, 33)
COLUMNS = 16
LARGE_KERNEL = 2**19  # numbers; smaller ones lie in the nearer caches
ALIGNED_BACKENDS, ALIGNED_TO = ("gpu",), 128  # where sizes of kernels in loops are filled up, LUMOS' 1000 to 1024


def recurrent_dot(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
    """`lax.dot_general` for the linear layers of a step, rows times kernel: [B, X] and [X, Y] -> [B, Y]."""
    in_loop = x.ndim == 2 and x.shape[0] in ROWS and kernel.size >= LARGE_KERNEL
    if in_loop and plain.takes(TRANSPOSED_BACKENDS):
        return transposed_dot(x, kernel)
    return lax.dot_general(x, kernel, dimension_numbers, **options)


@jax.custom_vjp
def transposed_dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """X @ kernel, reading the kernel's transpose; gradients read it as it lies."""
    return _dot_transpose(x, lax.optimization_barrier(kernel.T))  # or XLA would undo it


def _dot_transpose(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """[B, X] and [Y, X] -> [B, Y]."""
    rows = x.shape[0]
    if rows not in FEW_ROWS:
        return lax.dot_general(x, matrix, (((1,), (1,)), ((), ())))
    columns = jnp.pad(x, ((0, -rows % COLUMNS), (0, 0)))
    return lax.dot_general(matrix, columns, (((1,), (1,)), ((), ())))[:, :rows].T


transposed_dot.defvjp(
    lambda x, kernel: (transposed_dot(x, kernel), (x, kernel)),
    lambda residuals, gradient: (_dot_transpose(gradient, residuals[1]), residuals[0].T @ gradient),
)


def scan(step: Callable, params: dict, carry: Any, inputs: Any, noise: Any, *, dtype: Any) -> Any:
    """Repeats a step over time, as `lax.scan` does, with gradients that keep work out of the loops.

    Forward, only the states are kept. Backward, all steps' products are computed anew at once; then a loop takes the
    gradient of each state to the state before; then the gradients of parameters and inputs are those of all steps at
    once. This computes about half of the products twice, but large ones. Sums over time inside a loop read and write
    every kernel at every step, half the RSSM's time on a CPU; on a GPU, where a step costs what it launches, they are
    16 of 41 launches backward, and what a step would keep for its gradient is 37 of 58 launches forward.

    Args:
      step: `step(params, carry, input, noise) -> carry`, a pure function that treats the rows of its batch apart and
        whose products are `nn.Dense` modules, each called once.
      params: nested dict; leaves named "kernel" are cast to `dtype` once, not at every step.
      carry: initial state, [B, ...].
      inputs: arrays [T, B, ...], differentiable.
      noise: [T, B, ...], not differentiable.
      dtype: that the products are computed in.

    Returns:
      the states after each step, [T, B, ...].

    Raises:
      ValueError: while a gradient is traced, a module is called twice.
    """

    def forward(params, carry, inputs, noise):
        kernels = _loop_kernels(params, dtype)

        def body(carry, x):
            with _linear_layers(partial(_product, kernels)):
                carry = step(params, carry, *x)
            return carry, carry

        states = lax.scan(body, carry, (inputs, noise))[1]
        return states, (params, carry, inputs, noise, states)

    def backward(residuals, gradient):
        params, carry, inputs, noise, states = residuals
        before = jax.tree.map(lambda first, x: jnp.concatenate([first[None], x[:-1]]), carry, states)
        rows_before, rows, rows_noise = jax.tree.map(_merge_time, (before, inputs, noise))
        _, pull_all, products = jax.vjp(
            lambda params, rows: _with_products(step, params, rows_before, rows, rows_noise), params, rows, has_aux=True
        )
        products, kernels = _split_time(products, len(noise)), _loop_kernels(params, dtype)

        def back(later, x):
            gradient, before, inputs, noise, products = x
            total = jax.tree.map(jnp.add, gradient, later)
            with _linear_layers(lambda layer, x: _known_product(x, kernels[layer.path], products[layer.path])):
                _, pull = jax.vjp(lambda before: step(params, before, inputs, noise), before)
            return pull(total)[0], total

        zero = jax.tree.map(lambda x: jnp.zeros_like(x[0]), gradient)
        of_carry, totals = lax.scan(back, zero, (gradient, before, inputs, noise, products), reverse=True)
        of_params, of_inputs = pull_all(jax.tree.map(_merge_time, totals))
        return of_params, of_carry, _split_time(of_inputs, len(noise)), None

    if plain.is_plain():
        return forward(params, carry, inputs, noise)[0]
    run = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
    run.defvjp(forward, backward)
    return run(params, carry, inputs, noise)


def cast_kernels(params: dict, dtype: Any) -> dict:
    """The same parameters, kernels in another dtype."""
    return jax.tree_util.tree_map_with_path(lambda path, x: x.astype(dtype) if path[-1].key == "kernel" else x, params)


def _merge_time(x: jax.Array) -> jax.Array:
    """[T, B, ...] -> [T * B, ...]."""
    return x.reshape(-1, *x.shape[2:])


def _split_time(tree: Any, length: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(length, -1, *x.shape[1:]), tree)


def _with_products(step: Callable, *arguments: Any) -> tuple[Any, dict[tuple, jax.Array]]:
    """A step, and what each linear layer gives in it, by the path of its module."""
    found = {}

    def keep(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if isinstance(context.module, nn.Dense):
            path = context.module.path
            if path in found:
                raise ValueError(f"{'/'.join(path)} is called twice in a step; its product would be that of one call")
            found[path] = output
        return output

    with nn.intercept_methods(keep):
        return step(*arguments), found


def _loop_kernels(params: dict, dtype: Any) -> dict[tuple, jax.Array]:
    """The kernels by the path of their module, as loops read them: in their dtype, and without odd sizes on a GPU."""
    found = {}
    for path, x in traverse_util.flatten_dict(params).items():
        if path[-1] == "kernel":
            found[path[:-1]] = jnp.pad(x.astype(dtype), [(0, _missing(size)) for size in x.shape])
    return found


def _missing(size: int) -> int:
    """What XLA would fill a size of a product up with on a GPU, at every step anew: a kernel's in 2 to 5 us."""
    return -size % ALIGNED_TO if size > ALIGNED_TO and plain.takes(ALIGNED_BACKENDS) else 0


@contextlib.contextmanager
def _linear_layers(compute: Callable[[nn.Dense, jax.Array], jax.Array]) -> Iterator[None]:
    """Linear layers that are called in this context are computed by `compute(layer, x)`."""

    def replace(call, args, kwargs, context):
        return compute(context.module, *args) if isinstance(context.module, nn.Dense) else call(*args, **kwargs)

    with nn.intercept_methods(replace):
        yield


def _product(kernels: dict[tuple, jax.Array], layer: nn.Dense, x: jax.Array) -> jax.Array:
    """What a layer gives, by its kernel as loops read it."""
    y = _rows_times(x, kernels[layer.path])[:, : layer.features]
    return y + layer.get_variable("params", "bias").astype(y.dtype) if layer.use_bias else y


def _rows_times(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[B, X] and [X or more, Y] -> [B, Y]; what a kernel has more is for nothing."""
    x = jnp.pad(x.astype(kernel.dtype), ((0, 0), (0, kernel.shape[0] - x.shape[1])))
    return recurrent_dot(x, kernel, (((1,), (0,)), ((), ())))


@jax.custom_vjp
def _known_product(x: jax.Array, kernel: jax.Array, product: jax.Array) -> jax.Array:
    """A layer's product where it is known: only the gradient is computed."""
    return product


def _known_product_backward(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple:
    x, kernel = residuals
    gradient = jnp.pad(gradient, ((0, 0), (0, kernel.shape[1] - gradient.shape[1])))
    return jax.vjp(partial(_rows_times, kernel=kernel), x)[1](gradient)[0], None, None  # the product is not used


_known_product.defvjp(lambda x, kernel, product: (product, (x, kernel)), _known_product_backward)
