"""The joint network over scans and tiles in batches, with the reference's parameters."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar, cast

import torch
from reference.deepsc import inception, lesion
from reference.deepsc.classifier import Classifier
from reference.deepsc.lungs import LungNorm
from reference.deepsc.network import DeepSC, options_of
from reference.training import standardise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepsc_jax.config import Config
from deepsc_jax.runtime.types import Untyped
from peers.deepsc.lungs import Lungs, Norm, coarser, lungs_of
from peers.deepsc.places import Places, Region, folded, regions, unfolded
from peers.parts import Parts

Out = TypeVar("Out")
FACTORS = (8, 4, 2, 1)  # of S_1 to S_4


class Inception(inception.Inception):
    """Takes the lungs on the grid of its result as well."""

    def forward(self, x: Tensor, lungs: Lungs, coarse: Lungs) -> Tensor:  # type: ignore[override]
        outputs = []
        for branch, block in zip(self.branches, self.blocks, strict=True):
            assert isinstance(branch, nn.ModuleList)
            *first, last = branch
            y = x
            for conv in first:
                y = conv(y)
                y = y * lungs.mask.to(y.dtype)
            outputs.append(last(F.avg_pool3d(y, (1, block, block)) if block > 1 else y))
        return F.relu(self.norm(torch.cat(outputs, dim=1), coarse))


class Plain(inception.Plain):
    def forward(self, x: Tensor, lungs: Lungs, coarse: Lungs) -> Tensor:  # type: ignore[override]
        del lungs
        return self.plain(x, coarse)


class Generator(lesion.Lesion):
    """The lesion subnet of tiles, `lungs` at 1, 1/2, 1/4 and 1/8."""

    def forward(  # type: ignore[override]
        self, x: Tensor, lungs: Sequence[Lungs]
    ) -> tuple[Tensor, list[Tensor]]:
        inside, inside2, inside4, inside8 = lungs
        full = self.down1(x, inside)
        half = self.down2(pool(full), inside2)
        quarter = self.down3(pool(half), inside4)
        bottom = pool(quarter)
        x1 = self.up1(lesion.join(quarter, self.deconv1(bottom), of(inside4, x)), inside4)
        x2 = self.up2(lesion.join(half, self.deconv2(x1), of(inside2, x)), inside2)
        x3 = self.up3(lesion.join(full, self.deconv3(x2), of(inside, x)), inside)
        logits = (
            (self.segmentation1(bottom), inside8),
            (self.segmentation2(x1), inside4),
            (self.segmentation3(x2), inside2),
            (self.segmentation4(x3), inside),
        )
        scales = [torch.sigmoid(wide(s)) * m.mask for s, m in logits]
        return lesion.combine(scales, self.scale_weights) * inside.mask, scales


class Diagnosis(Classifier):
    """The classifier of scans, and its evidence masks `(scan, 1, slice, height, width)`."""

    def forward(  # type: ignore[override]
        self, features: Tensor, lesions: Tensor, lungs: Lungs
    ) -> tuple[Tensor, list[Tensor], list[Lungs]]:
        inside2 = coarser(lungs, (1, 2, 2))
        inside4 = coarser(inside2, (1, 2, 2))
        seen = self.lesion_stem(lesions)
        x = torch.cat([self.stem(features, lungs), seen * of(lungs, seen)], dim=1)
        f1 = self.encoder1(x, lungs)
        f2 = self.encoder2(f1, inside2)
        f3 = self.encoder3(f2, inside4)
        maps, inside = [f1, f2, f3], [lungs, inside2, inside4]
        means = [wide(m).sum((2, 3, 4)) / i.count for m, i in zip(maps, inside, strict=True)]
        return wide(self.linear(torch.cat(means, dim=1))), maps, inside

    def evidence(  # type: ignore[override]
        self, maps: list[Tensor], lungs: list[Lungs], classes: Tensor
    ) -> list[Tensor]:
        masks = []
        for x, inside in zip(self.activation_maps(maps, classes), lungs, strict=True):
            activation = wide(x)[:, None]
            average = (activation.sum((2, 3, 4)) / inside.count)[..., None, None, None]
            above = F.relu(activation - average) * inside.mask
            highest = above.detach().amax((1, 2, 3, 4), keepdim=True)
            masks.append(above / highest.clamp(min=1e-6))
        return masks


FAST: dict[type[nn.Module], type[nn.Module]] = {
    LungNorm: Norm,
    inception.Inception: Inception,
    inception.Plain: Plain,
    lesion.Lesion: Generator,
    Classifier: Diagnosis,
}


def network(config: Config) -> DeepSC:
    """The reference's modules, whose `forward` is the one of this file where it has one."""
    made = DeepSC(config)
    for module in made.modules():
        module.__class__ = FAST.get(type(module), type(module))
    return made


class Found(NamedTuple):
    """What is found in the tiles of a region: S and S_1 to S_4 `(N, 1, ...)`, lungs of each."""

    region: Region
    lesion: Tensor
    scales: list[Tensor]
    lungs: Sequence[Lungs]  # at 1, 1/2, 1/4, 1/8


class Seen(NamedTuple):
    """What is found in scans: regions, and, where the stage has them, what the classifier gives."""

    found: list[Found]
    logits: Tensor | None = None
    maps: list[Tensor] | None = None
    lungs: list[Lungs] | None = None


class Joint(nn.Module):
    """A stage of the network over scans of one depth."""

    def __init__(self, made: DeepSC, config: Config, stage: str, depth: int, parts: Parts):
        super().__init__()
        self.network, self.config, self.stage, self.parts = made, config, stage, parts
        self.options = options_of(config)
        self.regions: list[Region] = []
        if stage == "joint":
            self.places = Places(config, depth)
            if self.options.gradient_tiles:  # they are counted one by one
                parts = Parts("tile", parts.recompute)
            self.regions = regions(config, depth, parts)

    def forward(self, inputs: dict[str, Tensor]) -> Seen:
        """`volume (scan, 1, D, H, W)` and `slices (scan, 1, T, H, W)`, or drawn tiles.

        Those are `tiles (scan, tile, 1, d, h, w)`.
        """
        if self.stage == "segmentation":
            return Seen([self._drawn(tiles) for tiles in chunks(inputs["tiles"], self.parts)])
        slices = inputs["slices"]
        lungs = lungs_of(_inside(slices))
        coarse = coarser(lungs, (1, 2, 2))
        features = self.network.inception_cls(standardise(slices, self.config), lungs, coarse)
        lesions = torch.zeros_like(features[:, :1])
        if self.stage == "classification":
            return Seen([], *self.network.classifier(features, lesions, coarse))
        (_, _), (cl, cc) = self.network.cross_stitch.weights
        shared, found = torch.zeros_like(features), []
        for index, region in enumerate(self.regions):
            here = inputs["volume"][:, :, *region.box()]
            carries = index < (self.options.gradient_tiles or len(self.regions))
            with torch.set_grad_enabled(carries and torch.is_grad_enabled()):
                one, seen, ill = self._recomputed(self._joined, here, features, region)
            found.append(one)
            shared = shared + seen
            lesions = lesions + (ill.detach() if self.options.lesion_gradient == "stopped" else ill)
        return Seen(found, *self.network.classifier(cl * shared + cc * features, lesions, coarse))

    def _recomputed(self, function: Callable[..., Out], *arguments: Untyped) -> Out:
        if self.parts.recompute and torch.is_grad_enabled():
            return cast(Out, checkpoint(function, *arguments, use_reentrant=False))
        return function(*arguments)

    def _drawn(self, tiles: Tensor) -> Found:
        deep, high, wide_ = tiles.shape[2:]
        region = Region((0, 0, 0), (1, 1, 1), (deep, high, wide_))
        return self._recomputed(lambda x: self._tiles(x, region)[0], tiles)

    def _joined(
        self, here: Tensor, features: Tensor, region: Region
    ) -> tuple[Found, Tensor, Tensor]:
        """What is found in a region, and what it adds to the slice grid: features and lesions."""
        given = unfolded(self.places.to_region(features, region), region)
        one, tile_features = self._tiles(unfolded(here, region), region, given)
        seen = self.places.to_slices(folded(tile_features, region), region)
        return one, seen, self.places.to_slices(folded(one.lesion, region), region)

    def _tiles(
        self, values: Tensor, region: Region, given: Tensor | None = None
    ) -> tuple[Found, Tensor]:
        inside = lungs_of(_inside(values))
        lungs = [inside]
        for _ in range(3):
            lungs.append(coarser(lungs[-1]))
        features = self.network.inception_seg(standardise(values, self.config), inside, inside)
        mixed = features
        if given is not None:
            (ll, lc), _ = self.network.cross_stitch.weights
            mixed = (ll * features + lc * given) * of(inside, features)
        lesion_probability, scales = self.network.lesion(mixed, lungs)
        return Found(region, lesion_probability, scales, lungs), features


def chunks(tiles: Tensor, parts: Parts) -> Sequence[Tensor]:
    """`(scan, tile, ...)` as the batches `(N, ...)` that go through the network at once."""
    return [tiles.flatten(0, 1)] if parts.at_once == "all" else tiles.unbind(1)


def _inside(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def of(lungs: Lungs, x: Tensor) -> Tensor:
    """The mask in the type of `x`: 0 and 1 are exact in any."""
    return lungs.mask.to(x.dtype)


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pool(x: Tensor) -> Tensor:
    """Maximum over 2x2x2; of ties the first takes the gradient, where the reference shares it."""
    return F.max_pool3d(x, 2, ceil_mode=True)
