"""Products of a recurrent step with few rows, and a scan whose kernel gradients are one product after it.

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


def scan(step: Callable, params: dict, carry: Any, inputs: Any, keys: jax.Array) -> tuple[Any, Any]:
    """`lax.scan` over time; kernels' gradients are one product over all steps in place of a sum of one a step.

    Such a sum reads and writes every kernel at every step: half the RSSM's time on a CPU.

    Args:
      step: `step(params, carry, input, key) -> (carry, output)`; its linear layers are `nn.Dense`, each called once.
      params: nested dict; leaves named "kernel" belong to those layers.
      carry: initial state.
      inputs: arrays [T, ...], differentiable.
      keys: [T], not differentiable.

    Returns:
      the last carry and outputs [T, ...].
    """

    @jax.custom_vjp
    def run(params, carry, inputs, keys):
        return lax.scan(lambda carry, x: step(params, carry, *x), carry, (inputs, keys))

    def forward(params, carry, inputs, keys):
        kernels, others = _split(params)
        first = jax.tree.map(lambda x: x[0], inputs)
        _, (_, products) = jax.eval_shape(partial(_tapped, step), params, carry, first, keys[0], {})
        shifts = {path: jnp.zeros((len(keys), *output.shape), output.dtype) for path, (_, output) in products.items()}

        def shifted(others, carry, inputs, shifts):
            def body(carry, x):
                return _tapped(step, _merge(kernels, others), carry, *x)

            last, (outputs, products) = lax.scan(body, carry, (inputs, keys, shifts))
            return (last, outputs), {path: layer_input for path, (layer_input, _) in products.items()}

        result, backward_of_steps, layer_inputs = jax.vjp(shifted, others, carry, inputs, shifts, has_aux=True)
        return result, (backward_of_steps, layer_inputs, kernels)

    def backward(residuals, gradient):
        backward_of_steps, layer_inputs, kernels = residuals
        others, carry, inputs, shifts = backward_of_steps(gradient)
        gradients = {path: jnp.zeros_like(kernel) for path, kernel in kernels.items()}
        for path, x in layer_inputs.items():  # a shift's gradient is its product's
            rows = [array.reshape(-1, array.shape[-1]) for array in (x, shifts[path])]
            product = lax.dot_general(*rows, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
            gradients[*path, "kernel"] = product
        return _merge(gradients, others), carry, inputs, None

    run.defvjp(forward, backward)
    return run(params, carry, inputs, keys)


def _split(params: dict) -> tuple[dict, dict]:
    flat = traverse_util.flatten_dict(params)
    kernels = {path: x for path, x in flat.items() if path[-1] == "kernel"}
    return kernels, {path: x for path, x in flat.items() if path not in kernels}


def _merge(*parts: dict) -> dict:
    return traverse_util.unflatten_dict({path: x for part in parts for path, x in part.items()})


def _tapped(step, params, carry, inputs, key, shifts):
    """One step that adds `shifts` to the outputs of its linear layers and also returns {path: (input, output)}."""
    tapped = {}

    def tap(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if not isinstance(context.module, nn.Dense):
            return output
        path = context.module.path
        if path in tapped:
            raise ValueError(f"{'/'.join(path)} is called twice in a step; its gradient would be that of one call")
        tapped[path] = (args[0], output)
        return output + shifts[path] if shifts else output

    with nn.intercept_methods(tap):
        carry, output = step(params, carry, inputs, key)
    return carry, (output, tapped)
