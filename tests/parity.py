"""How far the Flax code is from the reference: largest difference over largest magnitude."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from deepsc_jax.interop.torch import Table, from_torch, to_torch
from deepsc_jax.models.deepsc.torch_names import TORCH_NAMES

DTYPES = ("float32", "float64")
# float64 tells a wrong formula from rounding: rounding is 1e-16 there.
VALUES = {"float32": 1e-5, "float64": 1e-11}
GRADIENTS = {"float32": 1e-4, "float64": 1e-9}
INFERENCE = {"float32": 1e-4, "float64": 1e-9}
TRAINING = {"float32": 1e-3, "float64": 1e-8}
JOINT_VALUES = {"float32": 1e-4, "float64": 1e-9}
JOINT_GRADIENTS = {"float32": 1e-3, "float64": 1e-8}


class Errors(NamedTuple):
    """Relative errors: the worst output, the worst input's gradient, the parameters' gradient.

    The last is None where there are no parameters.
    """

    values: float
    inputs: float
    params: float | None

    def against(self, values: float, gradients: float) -> dict[str, tuple[float, float]]:
        """Each error with its bound."""
        bounds = {
            "values": (self.values, values),
            "input gradients": (self.inputs, gradients),
        }
        if self.params is not None:
            bounds["parameter gradients"] = (self.params, gradients)
        return bounds


def relative(found: Any, expected: Any) -> float:
    """Largest difference of two trees of arrays over their largest magnitude."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    assert all(np.shape(f) == np.shape(e) for f, e in pairs)
    largest = max((np.abs(e).max(initial=0) for _, e in pairs), default=0)
    worst = max((np.abs(np.asarray(f) - e).max(initial=0) for f, e in pairs), default=0)
    return float(worst / largest) if largest > 0 else float(worst)


def compare(
    ours: Callable[..., Sequence[Any]],
    theirs: Callable[..., Sequence[Tensor]],
    inputs: Sequence[np.ndarray],
    dtype: str,
    params: Any = None,
    module: torch.nn.Module | None = None,
    seed: int = 0,
    reference_dtype: str | None = None,
    more: Sequence[tuple[Sequence[np.ndarray], Any]] = (),
    table: Table = TORCH_NAMES,
) -> Errors:
    """Values and gradients of `ours(params, *inputs)` against `theirs(*inputs)`.

    Both return arrays of the same shapes; `theirs` runs `module`, which is given the parameters.
    The gradients are of the outputs' product with random numbers. Where torch itself is not good
    to the bound, `reference_dtype` has it compute in another type. `more` inputs and parameters of
    the same shapes go through the same compiled program; the worst errors count. `table` has the
    parameters' names in `module`.
    """
    kind = getattr(torch, reference_dtype or dtype)

    def product(params: Any, weights: Any, *inputs: Any) -> Any:
        outputs = list(ours(params, *inputs))
        return sum((x * w).sum() for x, w in zip(outputs, weights, strict=True)), outputs

    wanted = (0, *range(2, len(inputs) + 2))
    program = jax.jit(jax.grad(product, wanted, has_aux=True))
    rows = []
    for number, (arrays, drawn) in enumerate([(inputs, params), *more]):
        rng = np.random.default_rng(seed + number)
        rows.append(_compare_once(program, theirs, arrays, dtype, drawn, module, rng, kind, table))
    values, gradients, of_params = zip(*rows, strict=True)
    return Errors(max(values), max(gradients), max(of_params) if module is not None else None)


def _compare_once(
    program: Callable[..., Any],
    theirs: Callable[..., Sequence[Tensor]],
    inputs: Sequence[np.ndarray],
    dtype: str,
    params: Any,
    module: torch.nn.Module | None,
    rng: np.random.Generator,
    kind: torch.dtype,
    table: Table,
) -> Errors:
    params = params if params is not None else {}
    tensors = [torch.from_numpy(x).to(kind).requires_grad_() for x in inputs]
    if module is not None:
        module.to(kind).load_state_dict(to_torch(params, table))
        module.zero_grad()
    expected = list(theirs(*tensors))
    weights = [rng.normal(size=tuple(x.shape)) for x in expected]
    objective = sum(
        (x * torch.from_numpy(w).to(kind)).sum() for x, w in zip(expected, weights, strict=True)
    )
    assert isinstance(objective, Tensor)
    objective.backward()

    with jax.enable_x64(dtype == "float64"):
        arrays = [jnp.asarray(x, dtype) for x in inputs]
        cast, factors = jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, weights))
        (param_gradient, *gradients), found = program(cast, factors, *arrays)
        assert all(x.dtype == dtype for x in found)
    return Errors(
        max(relative(f, e.detach().numpy()) for f, e in zip(found, expected, strict=True)),
        max(
            (
                relative(g, t.grad.numpy())
                for g, t in zip(gradients, tensors, strict=True)
                if t.grad is not None
            ),
            default=0.0,
        ),
        relative(param_gradient, module_gradient(module, table)) if module is not None else None,
    )


def module_gradient(module: torch.nn.Module, table: Table = TORCH_NAMES) -> Any:
    """The gradient of a module's parameters, under our names; zeros where there is none."""
    return from_torch(
        {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in module.named_parameters()
        },
        table,
    )


def part(name: str, module: torch.nn.Module) -> torch.nn.Module:
    """A subnet under the name that it has in the whole network."""
    return torch.nn.ModuleDict({name: module})


def channel_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


def channel_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


def padded(x: Tensor, depth: int, axis: int = 1) -> Tensor:
    """`x` with zeros behind its slices, `depth` in all."""
    shape = list(x.shape)
    shape[axis] = depth - shape[axis]
    return torch.cat([x, x.new_zeros(shape)], dim=axis)


def to_tensors(batch: dict[str, np.ndarray], dtype: str) -> dict[str, Tensor]:
    """A batch for the reference."""
    kind = getattr(torch, dtype)
    return {
        k: torch.from_numpy(v).to(kind if v.dtype.kind == "f" else torch.int64)
        for k, v in batch.items()
    }
