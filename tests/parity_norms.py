"""A training step of what has batch norms, against PyTorch's: what it gives and leaves behind."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from drawn import draw_params
from parity import module_gradient, relative
from torch import Tensor

from deepsc_jax.interop.torch import Table, from_torch, to_torch
from deepsc_jax.models.layers.batch_norm import BATCH_STATS

NAMES = (
    "values",
    "values by running statistics",
    "input gradients",
    "parameter gradients",
    "running statistics",
)
Ours = Callable[..., tuple[Sequence[Any], Any]]


def draw(init: Callable[[Any], Any], seed: int = 0) -> Any:
    """Parameters and running statistics drawn by numpy; `init` is Flax's, of a key."""

    class Module:
        def init(self, key: Any) -> Any:
            variables = init(key)
            return {name: variables[name] for name in ("params", BATCH_STATS)}

    return draw_params(Module(), seed=seed)


def step_errors(
    ours: Ours,
    theirs: Callable[..., Sequence[Tensor]],
    module: torch.nn.Module,
    variables: Any,
    inputs: Sequence[np.ndarray],
    dtype: str,
    table: Table,
) -> dict[str, float]:
    """The relative errors of `NAMES`; gradients are of the outputs' product with random numbers.

    Args:
      ours: of variables, inputs and whether it trains: outputs, and the statistics afterwards.
      theirs: outputs of inputs, by `module`, which is given the variables.
      module: of PyTorch.
      variables: `params` and `batch_stats`.
      inputs: arrays.
      dtype: in which both compute.
      table: the names.
    """
    kind, rng = getattr(torch, dtype), np.random.default_rng(7)
    params, stats = variables["params"], variables[BATCH_STATS]
    weights = to_torch(params, table) | to_torch(stats, table, BATCH_STATS)
    module.to(kind).load_state_dict(weights, strict=False)
    for collection, tree in (("params", params), (BATCH_STATS, stats)):
        left = {name: x for name, x in module.state_dict().items() if name in weights}
        again = from_torch(left, table, collection=collection)
        jax.tree.map(np.testing.assert_array_equal, again, tree)
    tensors = [torch.from_numpy(x).to(kind).requires_grad_() for x in inputs]
    module.train().zero_grad()
    outputs = theirs(*tensors)
    probes = [rng.normal(size=tuple(x.shape)) for x in outputs]
    total = sum(
        (x * torch.from_numpy(p).to(kind)).sum() for x, p in zip(outputs, probes, strict=True)
    )
    assert isinstance(total, Tensor)
    total.backward()
    gradients = [t.grad.numpy() for t in tensors if t.grad is not None]
    module.eval()
    with torch.no_grad():
        still = [x.numpy() for x in theirs(*tensors)]
    left = {name: x for name, x in module.state_dict().items() if name in weights}
    expected = (
        [x.detach().numpy() for x in outputs],
        still,
        gradients,
        module_gradient(module, table),
        from_torch(left, table, collection=BATCH_STATS),
    )

    @jax.jit
    def run(params: Any, stats: Any, inputs: Any, probes: Any) -> Any:
        def objective(params: Any, inputs: Any) -> Any:
            found, moved = ours({"params": params, BATCH_STATS: stats}, *inputs, train=True)
            product = sum((x * p).sum() for x, p in zip(found, probes, strict=True))
            return product, (list(found), moved)

        gradients, (found, moved) = jax.grad(objective, (0, 1), has_aux=True)(params, inputs)
        after, _ = ours({"params": params, BATCH_STATS: moved}, *inputs, train=False)
        return found, list(after), gradients[1], gradients[0], moved

    with jax.enable_x64(dtype == "float64"):
        cast = jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, stats, list(inputs), probes))
        found = jax.device_get(run(*cast))
    return {n: relative(f, e) for n, f, e in zip(NAMES, found, expected, strict=True)}


def against(errors: dict[str, float], values: float, gradients: float) -> dict[str, Any]:
    """Each error with its bound."""
    return {n: (e, gradients if "gradients" in n else values) for n, e in errors.items()}
