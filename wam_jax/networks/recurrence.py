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
from wam_jax.types import Array

# Where a product of ROWS rows and a large kernel is faster with the kernel lying transposed (XLA does that once, before
# the loop), and, with FEW_ROWS, as kernel times columns, filled up to a multiple of COLUMNS. Measured on one CPU core:
# two products 1024 x 3072 in a scan, ms a step: 50 rows 22.3 -> 11.3 to 13.5, 10 rows 9.0 -> 6.9 to 8.0, but 4 rows
# 5.1 -> 6.1 to 6.8. As columns: 10 rows (all products of the RSSM in an update of 10 x 50 frames) 0.81 -> 0.43 s.
TRANSPOSED_BACKENDS = ("cpu",)
ROWS = range(8, 129)
FEW_ROWS = range(8, 33)
COLUMNS = 16
LARGE_KERNEL = 2**19  # numbers; smaller ones lie in the nearer caches
KEEPING_BACKENDS = ("cpu",)  # where a scan keeps its products for the gradient; they are 5 % of an update's time there
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


def scan(
    step: Callable, params: dict, carry: Any, inputs: Any, noise: Array, *, dtype: Any, other_layers: bool = False
) -> Any:
    """Repeats a step over time, as `lax.scan` does, with gradients that keep work out of the loops.

    Forward, states are kept and on KEEPING_BACKENDS the products; elsewhere those of all steps are computed anew, at
    once. Backward, a loop takes the gradient of each state to the state before, and then the gradients of parameters
    and inputs are those of all steps at once. Sums over time inside a loop read and write every kernel at every step,
    half the RSSM's time on a CPU; on a GPU, where a step costs what it launches, they are 16 of 41 launches backward,
    and what a step would keep for its gradient is 37 of 58 launches forward.

    Args:
      step: `step(params, carry, input, noise) -> (carry, output)`, a pure function that treats the rows of its batch
        apart, which may be those of all steps, and whose products are `nn.Dense` modules, each called once. What the
        next step does not read should be in the output: a loop sums gradients of the carry.
      params: nested dict.
      carry: initial state, [B, ...].
      inputs: arrays [T, B, ...], differentiable.
      noise: [T, B, ...], not differentiable.
      dtype: that the products are computed in.
      other_layers: the step calls modules that `params` does not hold; it is then `lax.scan`, gradients and all.

    Returns:
      the carry after each step and the outputs, [T, B, ...].

    Raises:
      ValueError: a module is called twice in a step.
    """
    if other_layers or plain.is_plain():
        return _plain_scan(step, params, carry, inputs, noise)
    return _scan(step, dtype, params, carry, inputs, noise)


def _plain_scan(step: Callable, params: dict, carry: Any, inputs: Any, noise: Array) -> Any:
    """The same by `lax.scan`, with its gradients."""

    def body(carry, x):
        carry, output = step(params, carry, *x)
        return carry, (carry, output)

    return lax.scan(body, carry, (inputs, noise))[1]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(step: Callable, dtype: Any, params: dict, carry: Any, inputs: Any, noise: Array) -> Any:
    return _forward(step, dtype, params, carry, inputs, noise)[0]


def _forward(step, dtype, params, carry, inputs, noise):
    kernels = _loop_kernels(params, dtype)

    def body(carry, x):
        (carry, output), products = _run(step, kernels, params, carry, *x)
        return carry, (carry, output, products if plain.takes(KEEPING_BACKENDS) else {})

    states, outputs, products = lax.scan(body, carry, (inputs, noise))[1]
    return (states, outputs), (params, kernels, carry, inputs, noise, states, products)


def _backward(step, dtype, residuals, gradients):
    del dtype
    of_states, of_outputs = gradients
    params, kernels, carry, inputs, noise, states, products = residuals
    before = jax.tree.map(lambda first, x: jnp.concatenate([first[None], x[:-1]]), carry, states)
    rows = jax.tree.map(_merge_time, (before, inputs, noise))
    if products:
        of_rows = jax.tree.map(_merge_time, products)
    else:
        of_rows = _run(step, kernels, params, *rows)[1]
        products = _split_time(of_rows, len(noise))

    def back(later, x):
        (of_state, of_output), before, inputs, noise, products = x
        total = jax.tree.map(jnp.add, of_state, later)
        with _linear_layers(lambda layer, x: _known_product(x, kernels[layer.path], None, products[layer.path])):
            _, pull = jax.vjp(lambda before: step(params, before, inputs, noise), before)
        return pull((total, of_output))[0], total

    def all_steps(params, inputs):
        with _linear_layers(lambda layer, x: _known_product(x, *_parameters(layer), of_rows[layer.path])):
            return step(params, rows[0], inputs, rows[2])

    zero = jax.tree.map(lambda x: jnp.zeros_like(x[0]), of_states)
    of_carry, totals = lax.scan(back, zero, (gradients, before, inputs, noise, products), reverse=True)
    of_params, of_inputs = jax.vjp(all_steps, params, rows[1])[1](jax.tree.map(_merge_time, (totals, of_outputs)))
    return of_params, of_carry, _split_time(of_inputs, len(noise)), None


_scan.defvjp(_forward, _backward)


def _merge_time(x: jax.Array) -> jax.Array:
    """[T, B, ...] -> [T * B, ...]."""
    return x.reshape(-1, *x.shape[2:])


def _split_time(tree: Any, length: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(length, -1, *x.shape[1:]), tree)


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
def _linear_layers(compute: Callable[[nn.Dense, jax.Array], jax.Array], found: dict | None = None) -> Iterator[None]:
    """Linear layers that are called in this context are computed by `compute(layer, x)`; `found` gets what they give.

    Raises:
      ValueError: with `found`, a layer is called twice.
    """

    def replace(call, args, kwargs, context):
        layer = context.module
        if not isinstance(layer, nn.Dense):
            return call(*args, **kwargs)
        output = compute(layer, *args)
        if found is not None:
            if layer.path in found:
                raise ValueError(f"{'/'.join(layer.path)} is called twice in a step; a layer has one product a step")
            found[layer.path] = output
        return output

    with nn.intercept_methods(replace):
        yield


def _run(step: Callable, kernels: dict[tuple, jax.Array], *arguments: Any) -> tuple[Any, dict[tuple, jax.Array]]:
    """A step by kernels as loops read them, and what each linear layer gives in it, by the path of its module."""
    found: dict = {}
    with _linear_layers(partial(_product, kernels), found):
        return step(*arguments), found


def _parameters(layer: nn.Dense) -> tuple[jax.Array, jax.Array | None]:
    return layer.get_variable("params", "kernel"), layer.get_variable("params", "bias") if layer.use_bias else None


def _product(kernels: dict[tuple, jax.Array], layer: nn.Dense, x: jax.Array) -> jax.Array:
    """What a layer gives, by its kernel as loops read it."""
    y = _rows_times(x, kernels[layer.path])[:, : layer.features]
    bias = _parameters(layer)[1]
    return y if bias is None else y + bias.astype(y.dtype)


def _rows_times(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[B, X] and [X or more, Y] -> [B, Y]; what a kernel has more is for nothing."""
    x = jnp.pad(x.astype(kernel.dtype), ((0, 0), (0, kernel.shape[0] - x.shape[1])))
    return recurrent_dot(x, kernel, (((1,), (0,)), ((), ())))


@jax.custom_vjp
def _known_product(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, product: jax.Array) -> jax.Array:
    """What a layer gives where that is known: only gradients are computed, of those what is used.

    Args:
      x: [B, X].
      kernel: [X or more, Y or more], in any dtype.
      bias: [Y].
      product: [B, Y], in the dtype that the layer computes in.
    """
    return product


def _known_product_backward(residuals: tuple, gradient: jax.Array) -> tuple:
    x, kernel, bias = residuals
    of_bias = None if bias is None else gradient.sum(0, dtype=bias.dtype)
    gradient = jnp.pad(gradient, ((0, 0), (0, kernel.shape[1] - gradient.shape[1])))
    of_x = jax.vjp(partial(_rows_times, kernel=kernel.astype(gradient.dtype)), x)[1](gradient)[0]
    rows = jnp.pad(x.astype(gradient.dtype), ((0, 0), (0, kernel.shape[0] - x.shape[1])))
    of_kernel = lax.dot_general(rows, gradient, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return of_x, of_kernel.astype(kernel.dtype), of_bias, None


_known_product.defvjp(lambda x, kernel, bias, product: (product, (x, kernel, bias)), _known_product_backward)
