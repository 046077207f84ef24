"""CNNCF (Liang et al. 2021, Fig. 3a) and, as the authors' code has it, a plain residual network."""

import torch
from monai.networks.nets.resnet import ResNet, ResNetBlock, ResNetBottleneck
from torch import Tensor, nn

from deepsc_jax.config import Config
from deepsc_jax.models.cnncf.config import Options
from reference.cnncf import distillation
from reference.cnncf.blocks import Stage, Stem
from reference.cnncf.gate import Gate


def colours(slices: Tensor, pseudo_colour: str) -> Tensor:
    """Three channels of an X-ray, (batch, 1, height, width)."""
    if pseudo_colour == "none":
        return slices.expand(-1, 3, -1, -1)
    channels = [1.5 - (4 * slices - k).abs() for k in (3, 2, 1)]
    return torch.cat(channels, dim=1).clamp(0, 1)


class CNNCF(nn.Module):
    """The paper's network; slices are (batch, slices, height, width)."""

    def __init__(self, config: Config):
        super().__init__()
        options, classes = config.model, len(config.data.classes)
        assert isinstance(options, Options)
        self.options, slices = options, config.data.slices
        if slices > 1:
            groups = 3 if options.mix == "grouped" else 1
            self.mix = nn.Conv2d(slices, 3, 1, groups=groups)
        self.stem = Stem(options.stem)
        self.stage1 = Stage(options.stem, options.stage1_widths)
        height, width = (-(-side // 8) for side in config.data.working_size)
        pixels = 1 if options.gate_pool == "gap" else height * width
        self.predictor = nn.Linear(options.stage1_widths[-1] * pixels, classes)
        self.gate = Gate(
            options.gate_window,
            options.gate_sensitivity,
            options.gate_specificity,
            options.gate_count,
            options.gate_latch,
        )
        self.stage2 = Stage(options.stage1_widths[-1], options.stage2_widths)
        self.fc = nn.Linear(options.stage2_widths[-1], classes)

    def image(self, slices: Tensor) -> Tensor:
        if slices.shape[1] > 1:
            return self.mix(slices)
        return colours(slices, self.options.pseudo_colour)

    def forward(self, slices: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of stage I's classifier and of stage II."""
        features = self.stage1(self.stem(self.image(slices)))
        seen = features.mean((2, 3)) if self.options.gate_pool == "gap" else features.flatten(1)
        for norm in self.stage2.modules():  # the blocked stage's statistics stay
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 0.1 if self.gate.open else 0.0
        second = self.fc(self.stage2(features).mean((2, 3)))
        return self.predictor(seen), second

    def logits(self, slices: Tensor) -> Tensor:
        """The answer: stage II's where the gate is open."""
        first, second = self(slices)
        return second if self.gate.open else first

    def terms(
        self,
        slices: Tensor,
        label: Tensor,
        class_weights: Tensor,
        teachers: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses, means over the batch; the gate then judges."""
        first, second = self(slices)
        of_gate = _entropy(first, label, class_weights)
        answer = _taught(self.options, second, label, class_weights, teachers)
        opened = float(self.gate.open)  # times 0, not left out: its decay goes on
        weight = self.options.gate_weight if opened else 1.0
        terms = {name: opened * x for name, x in answer.items()} | {
            "gate_cross_entropy": of_gate,
            "gate_open": torch.tensor(opened),
            "loss": opened * answer["loss"] + weight * of_gate,
        }
        positive = self.positive
        self.gate.judge(first.argmax(1) == positive, label == positive)
        return terms

    positive: int = 0


class Published(ResNet):
    """The authors' published network: MONAI's residual network, with CT's mix before it."""

    def __init__(self, config: Config):
        options = config.model
        assert isinstance(options, Options)
        super().__init__(
            ResNetBlock if options.published_kernels == "basic" else ResNetBottleneck,
            list(options.published_blocks),
            list(options.published_widths),
            spatial_dims=2,
            n_input_channels=3,
            conv1_t_size=3,
            conv1_t_stride=1,
            no_max_pool=True,
            num_classes=len(config.data.classes),
            bias_downsample=False,
        )
        self.options, slices = options, config.data.slices
        if slices > 1:
            self.mix = nn.Conv2d(slices, 3, 1, groups=3 if options.mix == "grouped" else 1)

    def logits(self, slices: Tensor) -> Tensor:
        one = slices.shape[1] == 1
        return self(colours(slices, self.options.pseudo_colour) if one else self.mix(slices))

    def terms(
        self,
        slices: Tensor,
        label: Tensor,
        class_weights: Tensor,
        teachers: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses, means over the batch."""
        return _taught(self.options, self.logits(slices), label, class_weights, teachers)


def _taught(
    options: Options,
    logits: Tensor,
    label: Tensor,
    class_weights: Tensor,
    teachers: Tensor | None,
) -> dict[str, Tensor]:
    """Hard labels' loss, and, of a student, its share with that of soft ones."""
    hard = _entropy(logits, label, class_weights)
    if teachers is None:
        return {"cross_entropy": hard, "loss": hard}
    soft = distillation.loss(logits, teachers, options.distillation_temperature)
    share = options.distillation_weight
    loss = (1 - share) * hard + share * soft
    return {"cross_entropy": hard, "distillation": soft, "loss": loss}


def _entropy(logits: Tensor, label: Tensor, class_weights: Tensor) -> Tensor:
    """The weighted cross-entropy's mean over images; torch's own divides by the weights' sum."""
    return (
        class_weights[label] * nn.functional.cross_entropy(logits, label, reduction="none")
    ).mean()
