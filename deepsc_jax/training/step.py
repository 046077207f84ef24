"""The train step and the evaluation step: one of each for all systems, stages and devices."""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from deepsc_jax.runtime import compiler, device_mesh
from deepsc_jax.runtime.types import PyTree
from deepsc_jax.systems.system import Batch, Facts, Stage, System, Variables
from deepsc_jax.training.state import State

Scalars = dict[str, Array]


class TrainStep(Protocol):
    """A compiled optimizer step; the state that it is given is donated."""

    def __call__(self, state: State, batch: Batch, /) -> tuple[State, Scalars]:
        """The next state, and the step's `loss`, its terms, `learning_rate` and `gradient_norm`."""
        ...

    def trace(self, state: PyTree, batch: PyTree, /) -> jax.stages.Traced:
        """The step's program for arrays, or for shapes with their shardings."""
        ...

    def lower(self, state: PyTree, batch: PyTree, /) -> jax.stages.Lowered:
        """The same, down to what XLA compiles."""
        ...


def make_train_step(
    system: System, stage: Stage, mesh: Mesh, facts: Facts, state_sharding: State | None = None
) -> TrainStep:
    """One optimizer step on a global batch.

    Every device sums the gradient of its own examples in float32, in `platform.accumulation` parts;
    one all-reduce adds them up. What is carried goes from part to part.

    Args:
      system: the losses and the optimizer.
      stage: one of its stages.
      mesh: over which the batch, laid out as `device_mesh.put_batch` does, is split.
      facts: of the training split (`System.facts`).
      state_sharding: of the state, before and after the step (`states.sharding`); by default every
        device has a copy.
    """
    optimizer, schedule = system.optimizer(stage), system.learning_rate(stage)
    parts = system.config.platform.accumulation

    def share_of_loss(
        params: PyTree, carried: Variables, batch: Batch
    ) -> tuple[Array, tuple[Scalars, Variables]]:
        terms, carried = system.losses(stage, {"params": params, **carried}, batch, facts)
        means = jax.tree.map(lambda x: x.sum() / stage.batch, terms)
        return means["loss"], (means, carried)

    def gradient_of(params: PyTree, carried: Variables, batch: Batch) -> tuple[PyTree, Variables]:
        gradient, (means, carried) = jax.grad(share_of_loss, has_aux=True)(params, carried, batch)
        return (gradient, means), carried

    def per_device(params: PyTree, carried: Variables, batch: Batch) -> tuple[PyTree, Variables]:
        if parts == 1:
            total, carried = gradient_of(params, carried, batch)
            return device_mesh.sum_over_data(total), carried
        batch = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
        first = jax.tree.map(lambda x: x[0], batch)
        if not system.layout.loop_tiles:  # a CPU: a convolution inside a loop runs on one core
            total, carried = gradient_of(params, carried, first)
            for i in range(1, parts):
                part = jax.tree.map(lambda x, i=i: x[i], batch)
                added, carried = gradient_of(params, carried, part)
                total = jax.tree.map(jnp.add, total, added)
            return device_mesh.sum_over_data(total), carried

        def add(sums: PyTree, part: Batch) -> tuple[PyTree, None]:
            total, carried = sums
            added, carried = gradient_of(params, carried, part)
            return (jax.tree.map(jnp.add, total, added), carried), None

        shapes = jax.eval_shape(gradient_of, params, carried, first)[0]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (total, carried), _ = jax.lax.scan(add, (device_mesh.varying(zeros), carried), batch)
        return device_mesh.sum_over_data(total), carried

    gradients = device_mesh.over_data(per_device, mesh)

    def step(state: State, batch: Batch) -> tuple[State, Scalars]:
        (gradient, means), carried = gradients(state.params, state.carried, batch)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        means["learning_rate"] = jnp.asarray(schedule(state.step))
        means["gradient_norm"] = optax.tree.norm(gradient)
        return State(state.step + 1, params, carried, opt_state), means

    whole = device_mesh.replicated(mesh)
    placed = state_sharding or whole
    return jax.jit(
        step,
        in_shardings=(placed, None),  # a batch keeps that of `put_batch`
        out_shardings=(placed, whole),
        donate_argnums=0,
        compiler_options=_options(system, mesh),
    )


def make_eval_step(
    system: System, stage: Stage, mesh: Mesh
) -> Callable[[Variables, Batch], dict[str, Array]]:
    """A function from variables and a global batch to `System.measures` of its examples."""

    def program(own: Variables, _: Variables, batch: Batch) -> dict[str, Array]:
        return system.measures(stage, own, batch)

    whole = device_mesh.replicated(mesh)
    measures = device_mesh.over_data(program, mesh, gathered=True)
    return jax.jit(
        lambda variables, batch: measures(variables, {}, batch),
        in_shardings=(whole, None),
        out_shardings=whole,
        compiler_options=_options(system, mesh),
    )


def _options(system: System, mesh: Mesh) -> dict[str, bool | str]:
    platform = mesh.devices.flat[0].platform
    return compiler.options(platform, system.config.data.tile, system.layout.form)
