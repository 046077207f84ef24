"""DeepSC-COVID as it is timed: scans and tiles in batches, matrices kept on the device.

The scans of a batch are of one depth, and their tiles cover it.
"""

import torch
from reference.deepsc.network import DeepSC
from torch import Tensor, nn
from torch.nn import functional as F

from deepsc_jax.config import Config, Ints3
from peers.deepsc import losses
from peers.deepsc.network import Joint, chunks, network
from peers.deepsc.places import folded, unfolded
from peers.parts import Inputs, Parts

__all__ = ["Forward", "Objective", "Predictor", "inputs", "network"]


def inputs(config: Config, stage: str, batch: Inputs) -> Inputs:
    """A batch as `benchmark` draws it, with channels, and tiles put together to scans again.

    Of drawn tiles, all begin at slice 0: what lies past the scans' depth is cut off.
    """
    made = {"label": batch["label"]} if "label" in batch else {}
    depth = int(batch["depth"][0])
    if "slices" in batch:
        made["slices"] = batch["slices"][:, None]
    if stage == "segmentation":
        made |= {name: batch[name][:, :, None, :depth] for name in ("tiles", "lesions")}
    if stage == "joint":
        made["volume"], made["lesion"] = (
            _whole(batch[name], config)[:, None, :depth] for name in ("tiles", "lesions")
        )
    return made


def _whole(tiles: Tensor, config: Config) -> Tensor:
    """`(scan, tile, d, h, w)`, in the order of `tile_corners`, as `(scan, D, H, W)`."""
    (_, high, wide), (height, width) = config.data.tile, config.data.working_size
    x = tiles.unflatten(1, (-1, height // high, width // wide))
    return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def _depth(batch: Inputs) -> int:
    return int(batch["depth"][0])


class Objective(nn.Module):
    """The means of the terms over scans."""

    def __init__(
        self,
        made: DeepSC,
        config: Config,
        stage: str,
        batch: Inputs,
        class_weights: Tensor,
        parts: Parts,
    ):
        super().__init__()
        self.joint = Joint(made, config, stage, _depth(batch), parts)
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.class_weights: Tensor
        self.scans = len(batch["depth"])

    def forward(self, given: Inputs) -> Inputs:
        """The terms, and `loss`, their weighted sum."""
        joint, options, terms = self.joint, self.joint.options, {}
        seen = joint(given)
        total = torch.zeros_like(self.class_weights[0])
        if seen.logits is not None:
            terms["cross_entropy"] = F.cross_entropy(
                seen.logits, given["label"], self.class_weights, reduction="none"
            )
            total = total + options.classification_weight * terms["cross_entropy"]
        if joint.stage == "classification":
            return _means(terms | {"loss": total})
        if joint.stage == "joint":
            truths = [unfolded(given["lesion"][:, :, *r.box()], r) for r in joint.regions]
        else:
            truths = chunks(given["lesions"], joint.parts)
        count = options.gradient_tiles if joint.stage == "joint" else 0
        found, truths = seen.found[: count or None], truths[: count or None]
        terms |= losses.segmentation(options, losses.lesions_of(options, found, truths, self.scans))
        whole = terms.pop("total")
        if joint.stage == "segmentation" and options.scale_supervision > 0:
            terms["scales"] = losses.scales_of(options, found, truths, self.scans)
            whole = whole + options.scale_supervision * terms["scales"]
        total = total + options.segmentation_weight * whole
        if joint.stage == "joint" and options.task_aware_weight > 0:
            assert seen.logits is not None
            classes = seen.logits.argmax(dim=1)
            if options.evidence_class == "label":
                classes = given["label"]
            masks = joint.network.classifier.evidence(seen.maps, seen.lungs, classes)
            terms["task_aware"] = losses.task_aware(
                options, seen, masks, joint.places, given["label"]
            )
            total = total + options.task_aware_weight * terms["task_aware"]
        return _means(terms | {"loss": total})


def _means(terms: Inputs) -> Inputs:
    return {name: term.mean() for name, term in terms.items()}


class Forward(nn.Module):
    """What the reference's `forward` gives, without gradients."""

    def __init__(self, made: DeepSC, config: Config, stage: str, batch: Inputs, parts: Parts):
        super().__init__()
        self.joint = Joint(made, config, stage, _depth(batch), parts)
        self.scans = len(batch["depth"])

    @torch.no_grad()
    def forward(self, given: Inputs) -> Inputs:
        """`lesion` of all tiles in a row, and `logits (scan, class)`."""
        seen, out = self.joint(given), {}
        if seen.found:
            of_scans = [one.lesion.reshape(self.scans, -1) for one in seen.found]
            out["lesion"] = torch.cat(of_scans, dim=1).flatten()
        if seen.logits is not None:
            out["logits"] = seen.logits
        return out


class Predictor(nn.Module):
    """A whole preprocessed scan through the joint network."""

    def __init__(self, made: DeepSC, config: Config, shape: Ints3, parts: Parts):
        super().__init__()
        self.joint = Joint(made, config, "joint", shape[0], parts)
        indices = torch.arange(config.data.slices) * shape[0] // config.data.slices
        self.register_buffer("indices", indices, persistent=False)
        self.indices: Tensor

    @torch.no_grad()
    def forward(self, volume: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Volumes by name, and class probabilities."""
        joint, x = self.joint, volume[None, None]
        seen = joint({"volume": x, "slices": x[:, :, self.indices]})
        lesion = torch.zeros_like(volume)
        for one in seen.found:
            lesion[one.region.box()] = folded(one.lesion, one.region)[0, 0]
        masks = joint.network.classifier.evidence(seen.maps, seen.lungs, seen.logits.argmax(dim=1))
        evidence = {
            f"evidence_{i}": joint.places.to_voxels(mask, 2**i)[0, 0] * (volume > 0)
            for i, mask in enumerate(masks, start=1)
        }
        return {"lesion": lesion, **evidence}, seen.logits.softmax(dim=1)[0]
