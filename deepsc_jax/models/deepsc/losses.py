"""The losses of the paper (IV-E), per scan, in float32 or wider.

Arrays of tiles are `(batch, tile, depth, height, width)`; `lungs` of the same shape marks the
voxels that count, those of a scan's lungs.
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from deepsc_jax.config import DataConfig
from deepsc_jax.geometry import grids
from deepsc_jax.models.deepsc.classifier import evidence_masks
from deepsc_jax.models.deepsc.config import Options
from deepsc_jax.runtime.types import PyTree

TileMask = Float[Array, "batch tile d h w"]
PER_SCAN = (1, 2, 3, 4)


def scan_losses(
    options: Options,
    data: DataConfig,
    stage: str,
    out: dict[str, PyTree],
    batch: dict[str, Array],
    class_weights: Float[Array, "class"],
) -> dict[str, Float[Array, "batch"]]:
    """Every loss term of `stage`, per scan, and their weighted sum `loss` (paper, equation 11)."""
    terms = {}
    total = jnp.zeros(batch["depth"].shape)
    if stage != "classification":
        count = options.gradient_tiles if stage == "joint" else 0
        count = count or batch["tiles"].shape[1]
        lungs = lung_voxels(batch["tiles"][:, :count], batch["origins"][:, :count], batch["depth"])
        probability = out["lesion"][:, :count, ..., 0]
        truth = batch["lesions"][:, :count] * lungs
        terms |= segmentation_losses(options, probability, truth, lungs)
        segmentation = _weighted(options, terms)
        if stage == "segmentation" and options.scale_supervision > 0:
            terms["scales"] = scale_loss(options, out["scales"], truth, lungs)
            segmentation += options.scale_supervision * terms["scales"]
        total += options.segmentation_weight * segmentation
    if stage != "segmentation":
        terms["cross_entropy"] = cross_entropy(out["logits"], batch["label"], class_weights)
        total += options.classification_weight * terms["cross_entropy"]
    if stage == "joint" and options.task_aware_weight > 0:
        predicted = jnp.argmax(out["logits"], axis=-1)
        classes = predicted if options.evidence_class == "predicted" else batch["label"]
        terms["task_aware"] = task_aware_loss(
            out["scales"],
            evidence_masks(out["maps"], out["weights"], out["lungs"], classes),
            out["logits"],
            batch["label"],
            lung_voxels(batch["tiles"], batch["origins"], batch["depth"]),
            batch["origins"],
            batch["depth"],
            options,
            data,
        )
        total += options.task_aware_weight * terms["task_aware"]
    return terms | {"loss": total}


def weight(options: Options, term: str) -> float:
    """What a term of `scan_losses` is multiplied by in their sum."""
    return {
        "dice": options.segmentation_weight * options.dice_weight,
        "focal": options.segmentation_weight * options.focal_weight,
        "lesion_free": options.segmentation_weight * options.lesion_free_weight,
        "scales": options.segmentation_weight * options.scale_supervision,
        "cross_entropy": options.classification_weight,
        "task_aware": options.task_aware_weight,
    }[term]


def highest_inside(
    segmentation: Float[Array, "batch tile d h w 1"], truth: Bool[Array, "batch tile D H W"]
) -> Float[Array, "batch"]:
    """The highest value of S_i in the blocks with a lesion voxel; nan for a scan without one."""
    lesion = _any_of_blocks(truth, truth.shape[-1] // segmentation.shape[-2])
    highest = jnp.where(lesion, segmentation[..., 0], -jnp.inf).max(PER_SCAN)
    return jnp.where(lesion.any(PER_SCAN), highest, jnp.nan)


def lung_voxels(
    tiles: Float[Array, "batch tile d h w"],
    origins: Int[Array, "batch tile 3"],
    depth: Int[Array, "batch"],
) -> Bool[Array, "batch tile d h w"]:
    """True where a tile's voxel lies in the lungs, and within its scan's true depth."""
    slices = origins[..., 0, None] + jnp.arange(tiles.shape[2])
    return (tiles > 0) & (slices < depth[:, None, None])[..., None, None]


def segmentation_losses(
    options: Options, probability: TileMask, truth: TileMask, lungs: TileMask
) -> dict[str, Float[Array, "batch"]]:
    """`dice`, `focal` and `lesion_free`, unweighted."""
    sides = options.tversky_alpha, options.tversky_beta
    return {
        "dice": tversky_loss(probability, truth, lungs, options.dice_epsilon, *sides),
        "focal": focal_loss(probability, truth, lungs, options.focal_alpha, options.focal_gamma),
        "lesion_free": lesion_free_loss(probability, truth, lungs),
    }


def _weighted(options: Options, terms: dict[str, Array]) -> Float[Array, "batch"]:
    """L_seg (paper, equation 4) with what a scan without lesions adds."""
    return (
        options.dice_weight * terms["dice"]
        + options.focal_weight * terms["focal"]
        + options.lesion_free_weight * terms["lesion_free"]
    )


def scale_loss(
    options: Options, scales: tuple[Array, ...], truth: TileMask, lungs: TileMask
) -> Float[Array, "batch"]:
    """L_seg of each S_i by itself against the lesions at its scale, the mean of all (assumed).

    A voxel of a coarse scale is lesion where any of its block is.
    """
    total = jnp.zeros(len(truth), scales[0].dtype)
    for segmentation in scales:
        scale = truth.shape[-1] // segmentation.shape[-2]
        coarse, inside = (_any_of_blocks(x > 0, scale) for x in (truth, lungs))
        terms = segmentation_losses(
            options, segmentation[..., 0], coarse.astype(truth.dtype), inside
        )
        total += _weighted(options, terms)
    return total / len(scales)


def _any_of_blocks(x: Bool[Array, "batch tile d h w"], scale: int) -> Array:
    batch, count = x.shape[:2]
    blocks = [n for side in x.shape[2:] for n in (side // scale, scale)]
    return x.reshape(batch, count, *blocks).any(axis=(3, 5, 7))


def lesion_free_loss(
    probability: TileMask, truth: TileMask, lungs: TileMask
) -> Float[Array, "batch"]:
    """Cross-entropy, mean over the lungs' voxels, of a scan without a lesion voxel; 0 of others.

    Assumed. Dice says nothing of such a scan and the focal loss little: a missed voxel would weigh
    as much as many false ones.
    """
    loss = -jnp.log1p(-lax.clamp(0.0, probability, 1 - 1e-7)) * lungs
    mean = loss.sum(PER_SCAN) / jnp.maximum(lungs.sum(PER_SCAN), 1)
    return jnp.where((truth > 0).any(PER_SCAN), 0.0, mean)


def tversky_loss(
    probability: TileMask,
    truth: TileMask,
    lungs: TileMask,
    epsilon: float,
    alpha: float = 0.5,
    beta: float = 0.5,
) -> Float[Array, "batch"]:
    """1 - Tversky index over all of a scan's tiles together (Salehi et al. 2017).

    `alpha` weighs false positives and `beta` false negatives: 0.5 and 0.5 are the Dice loss (paper,
    equation 5). 0 for a scan without a lesion voxel in them (`lesion_free_loss` is for those);
    MONAI's is then 1 - smooth / (alpha FP + smooth). MONAI smooths half of this fraction's
    numerator and denominator, so its `smooth_nr` and `smooth_dr` are epsilon / 2.
    """
    probability = probability * lungs
    overlap = (probability * truth).sum(PER_SCAN)
    spurious = probability.sum(PER_SCAN) - overlap
    missed = truth.sum(PER_SCAN) - overlap
    total = 2 * (overlap + alpha * spurious + beta * missed)
    index = (2 * overlap + epsilon) / (total + epsilon)
    return jnp.where(truth.sum(PER_SCAN) > 0, 1 - index, 0.0)


def focal_loss(
    probability: TileMask, truth: TileMask, lungs: TileMask, alpha: float, gamma: float
) -> Float[Array, "batch"]:
    """Focal loss, mean over the lungs' voxels (paper, equation 6; Lin et al. 2017).

    `alpha` weighs lesion voxels and 1 - alpha the others. Probabilities are kept 1e-7 away from 0
    and 1, since S is a weighted sum of sigmoids and has no logit of its own.
    """
    p = lax.clamp(1e-7, probability, 1 - 1e-7)
    lesion = -alpha * (1 - p) ** gamma * jnp.log(p)
    other = -(1 - alpha) * p**gamma * jnp.log1p(-p)
    loss = jnp.where(truth > 0, lesion, other) * lungs
    return loss.sum(PER_SCAN) / jnp.maximum(lungs.sum(PER_SCAN), 1)


def cross_entropy(
    logits: Float[Array, "batch class"], label: Int[Array, "batch"], class_weights: Array
) -> Float[Array, "batch"]:
    """Cross-entropy times the weight of the true class (paper, equation 9).

    The batch mean divides by the number of scans; torch's `weight=` divides by the weights' sum.
    """
    return class_weights[label] * optax.softmax_cross_entropy_with_integer_labels(logits, label)


def task_aware_loss(
    scales: tuple[Array, ...],
    masks: tuple[Float[Array, "batch slices height width"], ...],
    logits: Float[Array, "batch class"],
    label: Int[Array, "batch"],
    lungs: TileMask,
    origins: Int[Array, "batch tile 3"],
    depth: Int[Array, "batch"],
    loss: Options,
    data: DataConfig,
) -> Float[Array, "batch"]:
    """Squared difference of S_1, S_2, S_3 and M_3, M_2, M_1 (paper, equation 10).

    Each evidence mask is brought to the tiles' grid at the segmentation's scale; the mean is over
    the lungs' voxels there, and the scales are summed. 0 for a scan whose
    predicted class or label is non-pneumonia. The `single` setting keeps (S_3, M_1).

    Args:
      scales: S_1..S_4 of every tile, `(batch, tile, d, h, w, 1)`, coarsest first.
      masks: M_1, M_2, M_3 on the slice grid at in-plane 1/2, 1/4, 1/8.
      logits: of the classes.
      label: true class ids.
      lungs: the voxels of every tile that count.
      origins: working-grid voxel of each tile's corner.
      depth: the scan's true number of slices.
      loss: which scales count, and how much.
      data: the slice grid, and which class is lesion-free.
    """
    weights = (1.0, 1.0, 1.0)
    if loss.task_aware_scale_weights == "w":
        weights = loss.scale_weights[:3]
    pairs = [(8, scales[0], masks[2]), (4, scales[1], masks[1]), (2, scales[2], masks[0])]
    total = jnp.zeros(label.shape, scales[0].dtype)
    for (scale, segmentation, mask), weight in zip(pairs, weights, strict=True):
        if loss.task_aware_scales == "single" and scale != 2:
            continue
        inside = _any_of_blocks(lungs > 0, scale)
        total += weight * _mean_squared_difference(
            segmentation, mask, inside, origins, depth, scale, data
        )
    pneumonia = (label != data.lesion_free_id) & (
        jnp.argmax(logits, axis=-1) != data.lesion_free_id
    )
    return jnp.where(pneumonia, total, 0.0)


def _mean_squared_difference(
    segmentation: Array,
    mask: Array,
    lungs: Array,
    origins: Array,
    depth: Array,
    scale: int,
    data: DataConfig,
) -> Float[Array, "batch"]:
    d, h, w = segmentation.shape[2:5]
    tile = (d * scale, h * scale, w * scale)

    def one(s: Array, m: Array, inside: Array, origin: Array, true_depth: Array) -> Array:
        source = grids.slice_grid(true_depth, data.slices, data.working_size, scale)
        target = grids.tile_grid(origin, tile, true_depth, scale)
        crop = grids.to_tile(m[..., None], source, target)
        return (((s - crop) ** 2)[..., 0] * inside).sum()

    per_tile = jax.vmap(one, in_axes=(0, None, 0, 0, None))
    squares = jax.vmap(per_tile)(segmentation, mask, lungs, origins, depth)
    voxels = lungs.sum(PER_SCAN)
    return squares.sum(axis=1) / jnp.maximum(voxels, 1)
