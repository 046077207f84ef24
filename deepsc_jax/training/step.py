"""The train step and the evaluation step: one of each for all systems, stages and devices."""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from deepsc_jax.runtime import compiler, device_mesh
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.types import PyTree, Untyped
from deepsc_jax.systems import optimizers
from deepsc_jax.systems.decoding import decode, in_one_tile
from deepsc_jax.systems.system import Batch, Facts, Stage, System, Variables
from deepsc_jax.training.state import State

Scalars = dict[str, Array]
WATCHED = "watched "


class TrainStep(Protocol):
    """A compiled optimizer step; the state that it is given is donated."""

    def __call__(self, state: State, batch: Batch, /) -> tuple[State, Scalars]:
        """The next state, and the step's `loss`, its terms, `learning_rate` and `gradient_norm`."""
        ...

    def given(self, facts: Facts) -> "TrainStep":
        """The same program with the facts of another data set."""
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
      mesh: over which the batch, as it travels and as `device_mesh.put_batch` lays it out, is
        split.
      facts: of the training split (`System.facts`).
      state_sharding: of the state, before and after the step (`states.sharding`); by default every
        device has a copy.

    Raises:
      InputError: when it is traced: accumulation in parts of a network with batch norm.
    """
    optimizer = optax.with_extra_args_support(system.optimizer(stage))
    parts, decay = system.config.platform.accumulation, system.config.train.average_decay

    def share_of_loss(
        params: PyTree, carried: Variables, batch: Batch, facts: Facts
    ) -> tuple[Array, tuple[Scalars, Variables]]:
        batch = decode(batch, stage.reads, system.config.data, system.config.train)
        terms, carried = system.losses(stage, {"params": params, **carried}, batch, facts)
        means = jax.tree.map(lambda x: x.sum() / stage.batch, terms)
        return means["loss"], (means, carried)

    share = jax.grad(share_of_loss, has_aux=True)

    def per_device(
        params: PyTree, shared: tuple[Variables, Facts], batch: Batch
    ) -> tuple[PyTree, Variables]:
        carried, facts = shared

        def gradient_of(
            params: PyTree, carried: Variables, batch: Batch
        ) -> tuple[PyTree, Variables]:
            gradient, (means, carried) = share(params, carried, batch, facts)
            return (gradient, means), carried

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

    def step(state: State, batch: Batch, facts: Facts) -> tuple[State, Scalars]:
        _require_whole_statistics(system, state.carried)
        (gradient, means), carried = gradients(state.params, (state.carried, facts), batch)
        updates, opt_state = optimizer.update(
            gradient, state.opt_state, state.params, value=means["loss"]
        )
        params = optax.apply_updates(state.params, updates)
        means["learning_rate"] = jnp.asarray(system.rate_taken(stage, state.step, opt_state))
        means["gradient_norm"] = optax.tree.norm(gradient)
        taken = state.step + 1
        average = optimizers.averaged(state.average, params, taken, decay) if decay else {}
        return State(taken, params, carried, opt_state, average), means

    whole = device_mesh.replicated(mesh)
    placed = state_sharding or whole
    program = jax.jit(
        step,
        in_shardings=(placed, None, whole),  # a batch keeps that of `put_batch`
        out_shardings=(placed, whole),
        donate_argnums=0,
        compiler_options=compiler_options(system, mesh),
    )
    return WithFacts(program, facts, whole)


class WithFacts:
    """A program, such as a step's, with the facts of one data set: no constants of the program.

    So that another data set takes the same program, compiled once.
    """

    def __init__(self, program: jax.stages.Wrapped, facts: Facts, whole: NamedSharding):
        self.program = program
        self._shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), facts)
        self._facts, self._whole = facts, whole
        self._placed: Facts | None = None

    def given(self, facts: Facts) -> "WithFacts":
        """The same program with the facts of another data set."""
        return WithFacts(self.program, facts, self._whole)

    def __call__(self, state: PyTree, batch: Batch, /) -> Untyped:
        """What the program gives."""
        if self._placed is None:  # a plan's devices are not here
            self._placed = jax.device_put(self._facts, self._whole)
        return self.program(state, batch, self._placed)

    def trace(self, state: PyTree, batch: PyTree, /) -> jax.stages.Traced:
        """The program for arrays, or for shapes with their shardings."""
        return self.program.trace(state, batch, self._shapes)

    def lower(self, state: PyTree, batch: PyTree, /) -> jax.stages.Lowered:
        """The same, down to what XLA compiles."""
        return self.program.lower(state, batch, self._shapes)


def _require_whole_statistics(system: System, carried: Variables) -> None:
    parts = system.config.platform.accumulation
    if parts > 1 and "batch_stats" in carried:
        raise InputError(
            f"--accumulation={parts}: --model={system.config.name} normalises by the statistics of "
            "a batch, of which each part would have its own, another function: give 1"
        )


def make_eval_step(
    system: System, stage: Stage, mesh: Mesh, *, whole_scans: bool = False, watched: bool = False
) -> Callable[[Variables, Batch], dict[str, Array]]:
    """A function from variables and a global batch to `System.measures` of its examples.

    With `whole_scans` each scan is one tile, as `System.predictor` has it; `watched`, it gives
    `System.watched` as well, whose names then begin with `WATCHED`.
    """

    def program(own: Variables, _: Variables, batch: Batch) -> dict[str, Array]:
        sent, data = batch, system.config.data
        if whole_scans:
            sent, data = in_one_tile(sent, stage.reads, data)
        decoded = decode(sent, stage.reads, data, system.config.train)
        found = system.measures(stage, own, decoded)
        if watched:
            more = system.watched(stage, own, decoded)
            found |= {WATCHED + name: x for name, x in more.items()}
        return found

    whole = device_mesh.replicated(mesh)
    measures = device_mesh.over_data(program, mesh, gathered=True)
    return jax.jit(
        lambda variables, batch: measures(variables, {}, batch),
        in_shardings=(whole, None),
        out_shardings=whole,
        compiler_options=compiler_options(system, mesh),
    )


def compiler_options(system: System, mesh: Mesh) -> dict[str, bool | str]:
    """What XLA is told of a system's programs over a mesh."""
    platform = mesh.devices.flat[0].platform
    return compiler.options(platform, system.config.data.tile, system.layout.form)
