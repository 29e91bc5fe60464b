"""Products of a recurrent step with few rows, and a scan whose gradients keep work out of its loops.

A step of the RSSM multiplies a few rows (the batch) by kernels that fill a cache, so time goes into moving kernels.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

# Where a product of ROWS rows and a large kernel is faster with the kernel lying transposed (XLA does that once, before
# the loop), and, with FEW_ROWS, as kernel times columns, filled up to a multiple of COLUMNS. Measured on one CPU core:
# two products 1024 x 3072 in a scan, ms a step: 50 rows 22.3 -> 11.3 to 13.5, 10 rows 9.0 -> 6.9 to 8.0, but 4 rows
# 5.1 -> 6.1 to 6.8. As columns: 10 rows (all products of the RSSM in an update of 10 x 50 frames) 0.81 -> 0.43 s.
TRANSPOSED_BACKENDS = ("cpu",)
ROWS = range(8, 129)
FEW_ROWS = range(8, 33)
COLUMNS = 16
LARGE_KERNEL = 2**19  # numbers; smaller ones lie in the nearer caches


_plain = False


@contextlib.contextmanager
def plain_products() -> Iterator[None]:
    """Programs that are traced in this context take all products as they stand: for counting their operations."""
    global _plain
    _plain = True
    try:
        yield
    finally:
        _plain = False


def recurrent_dot(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
    """`lax.dot_general` for the linear layers of a step, rows times kernel: [B, X] and [X, Y] -> [B, Y]."""
    in_loop = x.ndim == 2 and x.shape[0] in ROWS and kernel.size >= LARGE_KERNEL
    if in_loop and not _plain and jax.default_backend() in TRANSPOSED_BACKENDS:
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
        cast = cast_kernels(params, dtype)

        def body(carry, x):
            carry = step(cast, carry, *x)
            return carry, carry

        states = lax.scan(body, carry, (inputs, noise))[1]
        return states, (params, carry, inputs, noise, states)

    def backward(residuals, gradient):
        params, carry, inputs, noise, states = residuals
        before = jax.tree.map(lambda first, x: jnp.concatenate([first[None], x[:-1]]), carry, states)
        rows = jax.tree.map(_merge_time, (before, inputs, noise))
        cast = cast_kernels(params, dtype)
        products = _split_time(_products(step, cast, *rows), len(noise))

        def back(later, x):
            gradient, before, inputs, noise, products = x
            total = jax.tree.map(jnp.add, gradient, later)
            with _known(products):
                _, pull = jax.vjp(lambda before: step(cast, before, inputs, noise), before)
            return pull(total)[0], total

        zero = jax.tree.map(lambda x: jnp.zeros_like(x[0]), gradient)
        of_carry, totals = lax.scan(back, zero, (gradient, before, inputs, noise, products), reverse=True)
        _, pull = jax.vjp(lambda params, inputs: step(params, rows[0], inputs, rows[2]), params, rows[1])
        of_params, of_inputs = pull(jax.tree.map(_merge_time, totals))
        return of_params, of_carry, _split_time(of_inputs, len(noise)), None

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


def _products(step: Callable, *arguments: Any) -> dict[tuple, jax.Array]:
    """What each linear layer gives in a step, by the path of its module."""
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
        step(*arguments)
    return found


@contextlib.contextmanager
def _known(products: dict[tuple, jax.Array]) -> Iterator[None]:
    """Linear layers that are called in this context give these products; only their gradient is computed."""

    def replace(call, args, kwargs, context):
        if not isinstance(context.module, nn.Dense):
            return call(*args, **kwargs)
        kernel = context.module.get_variable("params", "kernel")
        return _known_product(*args, kernel, products[context.module.path])

    with nn.intercept_methods(replace):
        yield


@jax.custom_vjp
def _known_product(x: jax.Array, kernel: jax.Array, product: jax.Array) -> jax.Array:
    return product


def _known_product_backward(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple:
    x, kernel = residuals
    numbers = (((1,), (0,)), ((), ()))
    _, pull = jax.vjp(lambda x: recurrent_dot(x.astype(kernel.dtype), kernel, numbers), x)  # the product is not used
    return pull(gradient)[0], None, None


_known_product.defvjp(lambda x, kernel, product: (product, (x, kernel)), _known_product_backward)
