"""CNNCF (Liang et al. 2021, Fig. 3a): stage I, the control gate, stage II.

Its input is an X-ray, three times the same grey or in pseudo-colours, or a CT scan's slices, which
trainable 1x1 kernels mix to three channels. While the gate is shut, stage I's classifier answers;
stage II is computed, but its loss is multiplied by 0 and its running statistics stay as they are.
"""

from typing import cast

import flax.linen as nn
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from deepsc_jax.config import Config, DataConfig
from deepsc_jax.models.cnncf import distillation, gate
from deepsc_jax.models.cnncf.config import GROUPS, Options, Training
from deepsc_jax.models.cnncf.distillation import teachers
from deepsc_jax.models.cnncf.residual import BASIC, BOTTLENECK, ResNet2D, Shape, head
from deepsc_jax.models.cnncf.torch_names import TORCH_NAMES
from deepsc_jax.models.layers.batch_norm import BatchNorm
from deepsc_jax.models.layers.blocks import EXACT, recomputed
from deepsc_jax.models.layers.blocks2d import Conv2d, Image, ResBlockA, ResBlockB, xavier_init
from deepsc_jax.models.layers.layout import Layout
from deepsc_jax.runtime import device_mesh
from deepsc_jax.runtime.types import PyTree

__all__ = [
    "CNNCF",
    "TORCH_NAMES",
    "build",
    "evidence_layer",
    "losses",
    "notes",
    "teachers",
    "warnings",
    "weighted",
]

Slices = Float[Array, "batch slices height width 1"]


class SliceMix(nn.Module):
    """Three channels of a scan's slices, by trainable 1x1 kernels and biases.

    `grouped` is torch's `Conv2d(slices, 3, 1, groups=3)`: a channel sees a third of the slices.
    """

    grouped: bool

    @nn.compact
    def __call__(self, x: Float[Array, "batch slices height width"]) -> Image:
        batch, slices, height, width = x.shape
        groups = GROUPS if self.grouped else 1
        shape = (1, 1, slices // groups, GROUPS)
        kernel = self.param("kernel", xavier_init, shape)[0, 0].astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (GROUPS,)).astype(x.dtype)
        if not self.grouped:
            return jnp.einsum("bthw,tg->bhwg", x, kernel) + bias
        x = x.reshape(batch, groups, slices // groups, height, width)
        return jnp.einsum("bgthw,tg->bhwg", x, kernel) + bias


class CNNCF(nn.Module):
    """The network; `build` makes it."""

    options: Options
    classes: int
    layout: Layout = Layout()

    @nn.compact
    def __call__(
        self, x: Slices, weights: Float[Array, "batch"] | None = None, *, train: bool
    ) -> dict:
        """Logits of every image.

        Args:
          x: an X-ray, which has one slice, or a scan's slices; values of [0, 1].
          weights: 1 for an image and 0 for what only fills the batch up; by default all are 1.
          train: whether norms use the batch's statistics and move the running ones.

        Returns:
          `logits (batch, class)`, stage II's where the gate is open and else stage I's, float32 or
          wider; `maps`; and, of the paper's variant, `stage1_logits`, `stage2_logits`, `open` and
          `since`.
        """
        image = self._image(x[..., 0].astype(self.layout.dtype))
        if self.options.variant == "published":
            kernels = BASIC if self.options.published_kernels == "basic" else BOTTLENECK
            shape = Shape(kernels, self.options.published_blocks, self.options.published_widths)
            network = ResNet2D(shape, self.classes, self.layout)
            nn.share_scope(self, network)
            return network(image, weights, train=train)
        state = {
            name: self.variable(gate.COLLECTION, name, lambda x=x: x)
            for name, x in gate.shut().items()
        }
        is_open = state["open"].value
        x = Conv2d(self.options.stem, 3, 1, self.layout, name="stem")(image)
        x = nn.relu(BatchNorm(self.layout, name="stem_norm")(x, train=train, weights=weights))
        block = recomputed(ResBlockA, self.layout.remat_blocks, static=(5,))
        last = recomputed(ResBlockB, self.layout.remat_blocks, static=(5,))
        maps = {}

        def stage(number: int, x: Image, widths: tuple[int, ...], moves: Array | None) -> Image:
            i1 = i2 = x
            for i, (kind, width) in enumerate(zip((block, block, last), widths, strict=True)):
                name = f"stage{number}_{i}"
                i1, i2 = kind(width, 2, self.layout, name=name)(i1, i2, weights, moves, train)
            return self.perturb(f"stage{number}", i2)

        maps["stage1"] = x = stage(1, x, self.options.stage1_widths, None)
        stage1_logits = self._predictor(x)
        maps["stage2"] = x = stage(2, x, self.options.stage2_widths, is_open)
        stage2_logits = head(x, self.classes)
        return {
            "logits": jnp.where(is_open, stage2_logits, stage1_logits),
            "stage1_logits": stage1_logits,
            "stage2_logits": stage2_logits,
            "open": is_open,
            "since": state["since"].value,
            "maps": maps,
        }

    def _image(self, x: Float[Array, "batch slices height width"]) -> Image:
        """The three channels."""
        if x.shape[1] == 1:
            grey = x[:, 0, :, :, None]
            return jet(grey) if self.options.pseudo_colour == "jet" else jnp.tile(grey, GROUPS)
        return SliceMix(self.options.mix == "grouped", name="mix")(x)

    def _predictor(self, x: Image) -> Float[Array, "batch class"]:
        """The gate's classifier of stage I's features."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        if self.options.gate_pool == "gap":
            features = x.astype(wide).mean(axis=(1, 2))
        else:  # in PyTorch's order of a flattened array
            features = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        linear = nn.Dense(
            self.classes,
            dtype=wide,
            precision=EXACT,
            kernel_init=xavier_init,
            name="predictor",
        )
        return linear(features)


def jet(grey: Float[Array, "... 1"]) -> Float[Array, "... 3"]:
    """Pseudo-colours of values of [0, 1]; OpenCV's COLORMAP_JET to within half a level of 255."""
    centres = jnp.asarray([3, 2, 1], grey.dtype)
    return jnp.clip(1.5 - jnp.abs(4 * grey - centres), 0, 1)


def build(options: Options, data: DataConfig, layout: Layout) -> nn.Module:
    """The network of `options`."""
    return CNNCF(options, len(data.classes), layout)


def losses(
    config: Config,
    out: dict[str, PyTree],
    carried: dict[str, PyTree],
    truth: Int[Array, "batch"],
    class_weights: Float[Array, "class"],
    teacher_logits: Float[Array, "batch teacher class"] | None = None,
) -> tuple[dict[str, Float[Array, "batch"]], dict[str, PyTree]]:
    """Each image's terms with their weighted sum `loss`, and what is carried after the step.

    `cross_entropy` is of the answer by stage II, times whether the gate is open, and
    `gate_cross_entropy` of the gate's classifier, both times the true class's weight; `gate_open`
    is 1 or 0. The gate is judged by what its classifier gave in this step, on all devices.

    With `teacher_logits`, `distillation` is the loss of their soft labels, of the answer by
    stage II, times whether the gate is open.
    """
    options = cast(Options, config.model)
    positive = config.data.classes.index(options.positive)

    def entropy(logits: Array) -> Array:
        found = optax.softmax_cross_entropy_with_integer_labels(logits, truth)
        return class_weights[truth] * found

    def of_answer(logits: Array, opened: Array | float) -> tuple[dict[str, Array], Array]:
        """The terms of an answer, and what they add to the loss."""
        hard = opened * entropy(logits)
        if teacher_logits is None:
            return {"cross_entropy": hard}, hard
        temperature = options.distillation_temperature
        fused = distillation.soft_labels(teacher_logits, temperature)
        soft = opened * distillation.distillation_loss(logits, fused, temperature)
        total = distillation.student_loss(hard, soft, options.distillation_weight)
        return {"cross_entropy": hard, "distillation": soft}, total

    if options.variant == "published":
        terms, total = of_answer(out["logits"], 1.0)
        return {**terms, "loss": total}, carried
    opened = out["open"].astype(class_weights.dtype)
    of_gate = entropy(out["stage1_logits"])
    terms, of_stage2 = of_answer(out["stage2_logits"], opened)
    share = jnp.where(out["open"], options.gate_weight, 1.0)
    counts = gate.tally(out["stage1_logits"].argmax(axis=-1) == positive, truth == positive)
    state = gate.after_step(
        carried[gate.COLLECTION], device_mesh.shared_sum_over_data(counts)[1], rule(options)
    )
    terms |= {
        "gate_cross_entropy": of_gate,
        "gate_open": jnp.full_like(of_gate, opened),
        "loss": of_stage2 + share * of_gate,
    }
    return terms, {**carried, gate.COLLECTION: state}


def weighted(options: Options, terms: dict[str, Array]) -> dict[str, Array]:
    """What each of the terms of `losses` adds to `loss`."""
    soft = options.distillation_weight if "distillation" in terms else 0.0
    shares: dict[str, Array | float] = {"cross_entropy": 1 - soft, "distillation": soft}
    if "gate_open" in terms:
        shares["gate_cross_entropy"] = jnp.where(terms["gate_open"] > 0, options.gate_weight, 1.0)
    return {name: shares[name] * term for name, term in terms.items() if name in shares}


def evidence_layer(options: Options) -> str:
    """The map whose Grad-CAM a result holds: the last ones of stage II are of 64 pixels a side."""
    return "stage1" if options.variant == "paper" else f"layer{len(options.published_widths)}"


def rule(options: Options) -> gate.Rule:
    """When the gate opens."""
    return gate.Rule(
        options.gate_window,
        options.gate_sensitivity,
        options.gate_specificity,
        options.gate_count,
        options.gate_latch,
    )


def notes(carried: dict[str, PyTree]) -> tuple[str, ...]:
    """What a result says of the network that answered."""
    state = cast("gate.GateState | None", carried.get(gate.COLLECTION))
    return () if state is None else (gate.describe(state["since"]),)


def warnings(
    options: Options, training: Training, step: int, carried: dict[str, PyTree]
) -> tuple[str, ...]:
    """At each decay of the rate, and at the end: that the gate is still closed."""
    if options.variant == "published":
        return ()
    if step % training.decay_every and step != training.steps:
        return ()
    state = cast("gate.GateState", carried[gate.COLLECTION])
    if bool(state["open"]):
        return ()
    return (
        f"the gate is closed: {int(state['count'])} good windows in a row, {options.gate_count} "
        f"open it; the last had a sensitivity of {float(state['sensitivity']):.2f} and a "
        f"specificity of {float(state['specificity']):.2f} (-1: none was judged), "
        f"{options.gate_sensitivity:g} and {options.gate_specificity:g} are asked for: train "
        "longer at the first rate, or lower --cnncf.gate_sensitivity, --cnncf.gate_count or "
        "--cnncf.gate_window",
    )
