"""FLOPs of a traced program: convolutions and matrix products, loops counted by their length.

Counted from the jaxpr, because XLA's own count is empty for CUDA and takes a loop's body once. What
no output needs is left out, as the compiler drops it. Elementwise arithmetic is not counted: its
cost is its bytes.
"""

import math
from collections import Counter
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var
from jax.sharding import AxisType

from deepsc_jax.runtime.types import Untyped

Flops = Counter[str]


def count(program: ClosedJaxpr) -> Flops:
    """FLOPs of one run on one device, two per multiplication, by kind (`targets.PRODUCTS`).

    A `shard_map` is counted per device of its manual axes; the other axes of its mesh, left to the
    partitioner, are taken to split the work evenly.

    Raises:
      ValueError: a loop whose length is not in the program holds products.
    """
    return _count(program.jaxpr, [True] * len(program.jaxpr.outvars))[0]


def _count(jaxpr: Jaxpr, wanted: Sequence[bool], split: int = 1) -> tuple[Flops, list[bool]]:
    """FLOPs of the outputs that are wanted, and which inputs they need.

    `split` is the number of devices over which the partitioner splits what is written for one.
    """
    live = {v for v, w in zip(jaxpr.outvars, wanted, strict=True) if w and isinstance(v, Var)}
    total: Flops = Counter()
    for equation in reversed(jaxpr.eqns):
        outputs = [v in live for v in equation.outvars]
        if not any(outputs) and not equation.effects:
            continue
        flops, needed = _equation(equation, outputs, split)
        total += flops
        pairs = zip(equation.invars, needed, strict=True)
        live.update(v for v, need in pairs if need and isinstance(v, Var))
    return total, [v in live for v in jaxpr.invars]


def _equation(equation: JaxprEqn, wanted: list[bool], split: int) -> tuple[Flops, list[bool]]:
    name, params = equation.primitive.name, equation.params
    everything = [True] * len(equation.invars)
    if name == "dot_general":
        return Counter({_kind(equation): dot_flops(equation) // split}), everything
    if name == "conv_general_dilated":
        return Counter({_kind(equation): conv_flops(equation) // split}), everything
    if name == "scan":
        return _scan(equation, wanted, split)
    inner = _programs(params)
    if name == "while":
        if any(_count(body, [True] * len(body.outvars))[0] for body in inner):
            raise ValueError("a while loop of unknown length holds products: use lax.scan")
        return Counter(), everything
    if name == "cond":
        flops = [_count(branch, wanted, split)[0] for branch in inner]
        return max(flops, key=lambda f: f.total()), everything
    if len(inner) == 1 and len(inner[0].outvars) == len(wanted):
        split = _left_axes(params) if name == "shard_map" else split
        flops, needed = _count(inner[0], wanted, split)
        return flops, needed if len(needed) == len(everything) else everything
    total: Flops = Counter()
    for body in inner:
        total += _count(body, [True] * len(body.outvars), split)[0]
    return total, everything


def _scan(equation: JaxprEqn, wanted: list[bool], split: int) -> tuple[Flops, list[bool]]:
    """A carry is wanted if the result is, or if the next iteration needs it."""
    body, length = _open(equation.params["jaxpr"]), equation.params["length"]
    # Inputs are constants, carries and sequences; outputs are carries and sequences. JAX's versions
    # name their numbers differently, but only a sequence has another shape inside.
    carries = _same_shapes(equation.outvars, body.outvars)
    constants = _same_shapes(equation.invars, body.invars) - carries
    while True:
        flops, needed = _count(body, wanted, split)
        carried = needed[constants : constants + carries]
        more = [w or c for w, c in zip(wanted[:carries], carried, strict=True)]
        if more == wanted[:carries]:
            return Counter({kind: n * length for kind, n in flops.items()}), needed
        wanted = more + wanted[carries:]


def _same_shapes(outside: Sequence[Untyped], inside: Sequence[Untyped]) -> int:
    pairs = zip(outside, inside, strict=True)
    return sum(_aval(here).shape == _aval(there).shape for here, there in pairs)


def _left_axes(params: dict[str, Untyped]) -> int:
    """Devices on the axes of a `shard_map`'s mesh that are manual neither in it nor around it."""
    mesh, manual = params["mesh"], params["newly_manual_axes"]
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(
        size for name, size, kind in axes if name not in manual and kind != AxisType.Manual
    )


def _programs(params: dict[str, Untyped]) -> list[Jaxpr]:
    values = [v for p in params.values() for v in (p if isinstance(p, tuple | list) else (p,))]
    return [_open(value) for value in values if isinstance(value, Jaxpr | ClosedJaxpr)]


def _open(program: Jaxpr | ClosedJaxpr) -> Jaxpr:
    return program.jaxpr if isinstance(program, ClosedJaxpr) else program


def _kind(equation: JaxprEqn) -> str:
    left, right = (_aval(v).dtype for v in equation.invars[:2])
    if max(jnp.dtype(left).itemsize, jnp.dtype(right).itemsize) <= 2:
        return "bfloat16"
    precision = equation.params["precision"]
    precisions = precision if isinstance(precision, tuple) else (precision,)
    return "float32_exact" if lax.Precision.HIGHEST in precisions else "float32"


def _shapes(equation: JaxprEqn) -> tuple[tuple[int, ...], ...]:
    return tuple(_aval(v).shape for v in (*equation.invars[:2], equation.outvars[0]))


def _aval(operand: Untyped) -> ShapedArray:
    return operand.aval


def dot_flops(equation: JaxprEqn) -> int:
    """Two for every output element and contracted index."""
    left, _, out = _shapes(equation)
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def conv_flops(equation: JaxprEqn) -> int:
    """Two for every product of a kernel element with an element that is there.

    Products with padding and with the holes of a dilation are not counted, so that a convolution
    and its two gradients count the same, as cuDNN computes them.
    """
    (left, kernel, out), params = _shapes(equation), equation.params
    numbers = params["dimension_numbers"]
    products = out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
    for axis, (low, _) in enumerate(params["padding"]):
        products *= _taps(
            left[numbers.lhs_spec[2 + axis]],
            kernel[numbers.rhs_spec[2 + axis]],
            out[numbers.out_spec[2 + axis]],
            params["window_strides"][axis],
            low,
            params["lhs_dilation"][axis],
            params["rhs_dilation"][axis],
        )
    return 2 * products


def _taps(size: int, kernel: int, out: int, stride: int, low: int, holes: int, spread: int) -> int:
    """Pairs of an output position and a kernel element that meet an input element, on one axis."""
    at = np.arange(out)[:, None] * stride - low + np.arange(kernel) * spread
    return int(((at >= 0) & (at <= (size - 1) * holes) & (at % holes == 0)).sum())
