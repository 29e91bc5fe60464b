"""Floating-point operations of a program, counted from its jaxpr: matrix products and convolutions.

XLA's own count (`compiled.cost_analysis()`) takes the body of a loop once, however often it runs, and sees nothing of
products that a library computes; so the traced program is counted instead, loops times their length, after what does
not reach an output is removed. A multiply-add counts two. Everything else (additions, activations, normalisation) is
left out, as in "model FLOPs" elsewhere.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval


def count(function: Callable, *arguments: Any) -> int:
    """Counts one call of `function`; arguments may be shapes (`jax.ShapeDtypeStruct`).

    Raises:
      ValueError: the program has a loop of unknown length.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _count(jaxpr)


def _count(jaxpr: Any) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        return _count_convolution(equation)
    if name == "while":
        raise ValueError("the program has a while loop, whose length is not known before it runs; use lax.scan")
    times = parameters["length"] if name == "scan" else 1
    if name == "cond":  # the dearest branch
        return max(_count(branch.jaxpr) for branch in parameters["branches"])
    return times * sum(_count(inner) for inner in _inner_jaxprs(parameters))


def _count_convolution(equation: Any) -> int:
    """Each output entry takes a kernel's worth of products; those with zeros that dilation put in are not counted."""
    numbers, parameters = equation.params["dimension_numbers"], equation.params
    image, kernel = (variable.aval.shape for variable in equation.invars)
    output = equation.outvars[0].aval.shape
    spatial_out = [output[axis] for axis in numbers.out_spec[2:]]
    spatial_in = [image[axis] for axis in numbers.lhs_spec[2:]]
    spatial_kernel = [kernel[axis] for axis in numbers.rhs_spec[2:]]
    pairs = 1  # of (output position, kernel position) that meet an entry of the image, one axis after the other
    for axis, (length_out, length_in, length_kernel) in enumerate(
        zip(spatial_out, spatial_in, spatial_kernel, strict=True)
    ):
        stride, (low, _) = parameters["window_strides"][axis], parameters["padding"][axis]
        image_dilation, kernel_dilation = parameters["lhs_dilation"][axis], parameters["rhs_dilation"][axis]
        pairs *= sum(
            0 <= where < image_dilation * (length_in - 1) + 1 and where % image_dilation == 0
            for out in range(length_out)
            for where in (out * stride + k * kernel_dilation - low for k in range(length_kernel))
        )
    channels = output[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
    # With `batch_group_count` (weight gradients of grouped convolutions) a channel sees its own part of the batch only.
    return 2 * output[numbers.out_spec[0]] * channels * pairs


def _inner_jaxprs(parameters: dict) -> Iterator[Any]:
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
