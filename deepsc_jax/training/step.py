"""The train step and the evaluation step: one of each for all stages and any number of devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from deepsc_jax.config import Config, Stage
from deepsc_jax.models.deepsc import losses
from deepsc_jax.models.deepsc.network import DeepSC, evidence
from deepsc_jax.runtime import device_mesh
from deepsc_jax.training.optimizer import learning_rate, make_optimizer
from deepsc_jax.training.state import State

Batch = dict[str, Array]
Losses = dict[str, Float[Array, "batch"]]


def scan_losses(
    config: Config, stage: Stage, out: dict, batch: Batch, class_weights: Float[Array, "class"]
) -> Losses:
    """Every loss term of `stage`, per scan, and their weighted sum `loss` (paper, equation 11)."""
    weights, terms = config.loss, {}
    total = jnp.zeros(batch["depth"].shape)
    if stage != "classification":
        count = config.train.gradient_tiles if stage == "joint" else 0
        count = count or batch["tiles"].shape[1]
        probability, truth = out["lesion"][:, :count, ..., 0], batch["lesions"][:, :count]
        valid = losses.valid_voxels(batch["origins"][:, :count], batch["depth"], config.data.tile)
        terms["dice"] = losses.tversky_loss(
            probability,
            truth,
            valid,
            weights.dice_epsilon,
            weights.tversky_alpha,
            weights.tversky_beta,
        )
        terms["focal"] = losses.focal_loss(
            probability, truth, valid, weights.focal_alpha, weights.focal_gamma
        )
        segmentation = weights.dice_weight * terms["dice"] + weights.focal_weight * terms["focal"]
        total += weights.segmentation_weight * segmentation
    if stage != "segmentation":
        terms["cross_entropy"] = losses.cross_entropy(out["logits"], batch["label"], class_weights)
        total += weights.classification_weight * terms["cross_entropy"]
    if stage == "joint" and weights.task_aware_weight > 0:
        predicted = jnp.argmax(out["logits"], axis=-1)
        classes = predicted if weights.evidence_class == "predicted" else batch["label"]
        terms["task_aware"] = losses.task_aware_loss(
            out["scales"],
            evidence(out, classes),
            out["logits"],
            batch["label"],
            batch["origins"],
            batch["depth"],
            weights,
            config.data,
            config.model,
        )
        total += weights.task_aware_weight * terms["task_aware"]
    return terms | {"loss": total}


def make_train_step(
    config: Config,
    stage: Stage,
    model: DeepSC,
    mesh: Mesh,
    class_weights: Float[Array, "class"],
    state_sharding: Any = None,
) -> Callable[[State, Batch], tuple[State, dict[str, Array]]]:
    """One optimizer step on a global batch; the state is donated.

    Every device sums the gradient of its own scans in float32, in `platform.accumulation` parts;
    one all-reduce adds them up.

    Args:
      config: its `train`, `loss` and `platform` sections are used.
      stage: decides the losses.
      model: the network.
      mesh: over which the batch, laid out as `parallel.put_batch` does, is split.
      class_weights: of the cross-entropy.
      state_sharding: of the state, before and after the step (`states.sharding`); by default
        every device has a copy.

    Returns:
      A function to the next state and the scalars `loss`, its terms, `learning_rate` and
      `gradient_norm`.
    """
    optimizer, schedule = make_optimizer(config, stage), learning_rate(config, stage)
    scans = config.train.batch(stage)
    gradient_tiles = config.train.gradient_tiles

    def share_of_loss(params: Any, batch: Batch) -> tuple[Array, dict[str, Array]]:
        out: Any = model.apply({"params": params}, batch, stage, gradient_tiles)
        terms = scan_losses(config, stage, out, batch, class_weights)
        means = jax.tree.map(lambda x: x.sum() / scans, terms)
        return means["loss"], means

    gradient_of = jax.grad(share_of_loss, has_aux=True)

    def per_device(params: Any, batch: Batch) -> tuple[Any, dict[str, Array]]:
        parts = config.platform.accumulation
        if parts == 1:
            return device_mesh.sum_over_data(gradient_of(params, batch))
        batch = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
        first = jax.tree.map(lambda x: x[0], batch)
        if not model.layout.loop_tiles:  # a CPU: a convolution inside a loop runs on one core
            total = gradient_of(params, first)
            for i in range(1, parts):
                part = gradient_of(params, jax.tree.map(lambda x, i=i: x[i], batch))
                total = jax.tree.map(jnp.add, total, part)
            return device_mesh.sum_over_data(total)

        def add(total: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient_of(params, part)), None

        shapes = jax.eval_shape(gradient_of, params, first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return device_mesh.sum_over_data(jax.lax.scan(add, device_mesh.varying(zeros), batch)[0])

    gradients = device_mesh.over_data(per_device, mesh)

    def step(state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
        gradient, means = gradients(state.params, batch)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        means["learning_rate"] = jnp.asarray(schedule(state.step))
        means["gradient_norm"] = optax.tree.norm(gradient)
        return State(state.step + 1, params, opt_state), means

    whole = device_mesh.replicated(mesh)
    state_sharding = state_sharding or whole
    return jax.jit(
        step,
        in_shardings=(state_sharding, None),  # a batch keeps that of `put_batch`
        out_shardings=(state_sharding, whole),
        donate_argnums=0,
        compiler_options=device_mesh.compiler_options(
            mesh.devices.flat[0].platform, model.data, model.layout.form
        ),
    )


THRESHOLDS = tuple(i / 20 for i in range(2, 19))


def make_eval_step(
    stage: Stage, model: DeepSC, mesh: Mesh
) -> Callable[[Any, Batch], dict[str, Array]]:
    """Per-scan results on the working grid, for validation.

    Returns `dice (batch, threshold)` at `THRESHOLDS` over all tiles (nan where the scan has no
    lesion) and `probabilities (batch, class)`, each where the stage has it.
    """

    def program(params: Any, batch: Batch) -> dict[str, Array]:
        out: Any = model.apply({"params": params}, batch, stage)
        result = {}
        if "lesion" in out:
            truth = batch["lesions"] > 0
            volume, axes = truth.sum((1, 2, 3, 4)), (1, 2, 3, 4)
            rows = []
            for threshold in THRESHOLDS:
                found = out["lesion"][..., 0] >= threshold
                overlap = (found & truth).sum(axes)
                rows.append(2 * overlap / jnp.maximum(found.sum(axes) + volume, 1))
            dice = jnp.stack(rows, axis=1)
            result["dice"] = jnp.where(volume[:, None] > 0, dice, jnp.nan)
        if "logits" in out:
            result["probabilities"] = jax.nn.softmax(out["logits"])
        return result

    whole = device_mesh.replicated(mesh)
    return jax.jit(
        device_mesh.over_data(program, mesh, gathered=True),
        in_shardings=(whole, None),
        out_shardings=whole,
        compiler_options=device_mesh.compiler_options(
            mesh.devices.flat[0].platform, model.data, model.layout.form
        ),
    )
