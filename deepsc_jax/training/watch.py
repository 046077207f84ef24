"""What is watched of training besides its own numbers (`--watch_every`).

Programs of their own: those of a step and its parameters are the same with them and without.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from deepsc_jax.runtime import device_mesh
from deepsc_jax.runtime.types import PyTree
from deepsc_jax.systems.decoding import decode
from deepsc_jax.systems.system import Batch, Facts, Stage, System, Variables
from deepsc_jax.training.state import State
from deepsc_jax.training.step import Scalars, WithFacts, compiler_options

Watch = Callable[[State, Batch], dict[str, float]]


def make_watch(system: System, stage: Stage, mesh: Mesh, facts: Facts) -> Watch:
    """A function from a state and a batch to what is watched of the step that they make.

    `gradient_norm_TERM` of each term of the loss, as it adds to the loss; `gradient_cosine_A_B` of
    two, over the arrays of parameters that both have a gradient of; `System.watched_parameters`.
    What is not finite is left out, as a cosine where nothing is shared.
    """
    parts = system.config.platform.accumulation

    def share_of_terms(
        params: PyTree, carried: Variables, batch: Batch, facts: Facts
    ) -> dict[str, Array]:
        batch = decode(batch, stage.reads, system.config.data, system.config.train)
        terms, _ = system.losses(stage, {"params": params, **carried}, batch, facts)
        return {k: x.sum() / stage.batch for k, x in system.weighted(stage, terms).items()}

    def per_device(params: PyTree, shared: tuple[Variables, Facts], batch: Batch) -> PyTree:
        carried, facts = shared

        def gradients(part: Batch) -> dict[str, PyTree]:
            means, pull_back = jax.vjp(lambda p: share_of_terms(p, carried, part, facts), params)
            names = sorted(means)
            chosen = {
                name: device_mesh.varying(jnp.eye(len(names), dtype=means[name].dtype)[i])
                for i, name in enumerate(names)
            }
            # One after another: one backward pass is compiled, and held, for all.
            of_terms = jax.lax.map(lambda one: pull_back(one)[0], chosen)
            return {k: jax.tree.map(lambda x, i=i: x[i], of_terms) for i, k in enumerate(names)}

        if parts == 1:
            return device_mesh.sum_over_data(gradients(batch))
        batch = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
        shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], batch))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(sums: PyTree, part: Batch) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, sums, gradients(part)), None

        return device_mesh.sum_over_data(jax.lax.scan(add, device_mesh.varying(zeros), batch)[0])

    of_devices = device_mesh.over_data(per_device, mesh)

    def watch(variables: Variables, batch: Batch, facts: Facts) -> Scalars:
        carried = {name: x for name, x in variables.items() if name != "params"}
        found = relations(of_devices(variables["params"], (carried, facts), batch))
        return found | system.watched_parameters(stage, variables["params"])

    whole = device_mesh.replicated(mesh)
    program = jax.jit(
        watch,
        in_shardings=(whole, None, whole),
        out_shardings=whole,
        compiler_options=compiler_options(system, mesh),
    )
    with_facts = WithFacts(program, facts, whole)

    def of_step(state: State, batch: Batch) -> dict[str, float]:
        found = jax.device_get(with_facts({"params": state.params, **state.carried}, batch))
        return {name: float(x) for name, x in found.items() if math.isfinite(x)}

    return of_step


def relations(gradients: Mapping[str, PyTree]) -> Scalars:
    """The norms of gradients, by the names of their terms, and the cosines of each two.

    A cosine is over the arrays that neither gradient is zero on: nan where there is none.
    """
    names = sorted(gradients)
    products = []
    for arrays in zip(*(jax.tree.leaves(gradients[name]) for name in names), strict=True):
        rows = jnp.stack([x.ravel() for x in arrays])
        products.append(jnp.dot(rows, rows.T, precision=jax.lax.Precision.HIGHEST))
    product = jnp.stack(products)  # (array, term, term)
    square = jnp.diagonal(product, axis1=1, axis2=2)
    found = {f"gradient_norm_{name}": jnp.sqrt(square[:, i].sum()) for i, name in enumerate(names)}
    for i, one in enumerate(names):
        for j in range(i + 1, len(names)):
            shared = (square[:, i] > 0) & (square[:, j] > 0)
            of_both = [jnp.where(shared, square[:, k], 0).sum() for k in (i, j)]
            dot = jnp.where(shared, product[:, i, j], 0).sum()
            found[f"gradient_cosine_{one}_{names[j]}"] = dot / jnp.sqrt(of_both[0] * of_both[1])
    return found


def strip(pictures: Mapping[str, np.ndarray]) -> np.ndarray:
    """Pictures (height, width) of 0 to 1 beside each other, as 8-bit grey, small ones enlarged."""
    tallest = max(picture.shape[0] for picture in pictures.values())
    columns = []
    for picture in pictures.values():
        times = tallest // picture.shape[0]
        large = picture.repeat(times, axis=0).repeat(times, axis=1)
        columns.append(np.pad(large, [(0, tallest - large.shape[0]), (0, 1)]))
    levels = np.clip(np.nan_to_num(np.concatenate(columns, axis=1)), 0, 1) * 255
    return np.round(levels).astype(np.uint8)
