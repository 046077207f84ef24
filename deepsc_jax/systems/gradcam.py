"""Grad-CAM of any map of any classifier, 2D or 3D (Selvaraju et al. 2017), by one `jax.grad`."""

from typing import cast

import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepsc_jax.runtime.errors import InputError
from deepsc_jax.systems.system import Batch, Stage, System, Variables

PERTURBATIONS = "perturbations"  # Flax's collection, of what `Module.perturb` adds to a map


def grad_cam(
    system: System,
    stage: Stage,
    variables: Variables,
    batch: Batch,
    layer: str,
    classes: Int[Array, "example"] | None = None,
) -> Float[Array, "example *space"]:
    """ReLU(Σ_k w_k A_k), with w_k the mean over space of the logit's gradient by the map A_k.

    By running statistics. On the map's own grid and in its own size: `shown` makes a picture of it.

    Args:
      system: whose `outputs` have `logits (example, class)`.
      stage: of the system.
      variables: of a trained network.
      batch: what the stage reads.
      layer: the name of the map, a key of `outputs["maps"]`.
      classes: whose logit it is of, for each example; by default the most probable one's.

    Raises:
      InputError: the network has no such map.
    """
    shapes = jax.eval_shape(system.init, jax.random.key(0), batch).get(PERTURBATIONS, {})
    flat = cast(dict[str, jax.ShapeDtypeStruct], flax.traverse_util.flatten_dict(shapes, sep="/"))
    paths = {name.rpartition("/")[2]: name for name in flat}
    if layer not in paths:
        raise InputError(
            f"--layer={layer}: --model={system.config.name} has the maps {', '.join(paths)}: give "
            "one of them"
        )
    zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in flat.items()}

    def logit(added: Array) -> tuple[Array, Array]:
        perturbed = flax.traverse_util.unflatten_dict(zeros | {paths[layer]: added}, sep="/")
        out = system.outputs(stage, {**variables, PERTURBATIONS: perturbed}, batch)
        wanted = out["logits"].argmax(axis=-1) if classes is None else classes
        # Examples are apart: the gradient of the sum holds each one's own.
        chosen = jnp.take_along_axis(out["logits"], wanted[:, None], axis=-1)
        return chosen.sum(), out["maps"][layer]

    gradient, found = jax.grad(logit, has_aux=True)(zeros[paths[layer]])
    space = tuple(range(1, found.ndim - 1))
    weights = gradient.mean(axis=space, keepdims=True)
    return jax.nn.relu((weights * found).sum(axis=-1))


def shown(heat: Float[Array, "example *space"], sides: tuple[int, ...]) -> Float[Array, "..."]:
    """Heat maps of [0, 1] of other sides: linear between centres, over each one's own maximum.

    One that is 0 everywhere stays 0.
    """
    resized = jax.image.resize(heat, (len(heat), *sides), "linear", antialias=False)
    largest = resized.max(axis=tuple(range(1, resized.ndim)), keepdims=True)
    return resized / jnp.where(largest > 0, largest, 1)
