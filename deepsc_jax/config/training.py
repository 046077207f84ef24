"""How a network is trained, whichever it is, and the options of a stage."""

import dataclasses

from deepsc_jax.config.options import option, require


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """The options of one training stage; models change the defaults and say where they are from."""

    steps: int = option(20000, "assumed: optimizer steps of this stage")
    batch: int = option(8, "assumed: scans in a global batch of this stage")
    learning_rate: float = option(1e-3, "assumed: initial learning rate of this stage")

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}: it must be at least 1")
        rate = self.learning_rate
        require(rate >= 0, f"learning_rate is {rate:g}: it must not be negative")


@dataclasses.dataclass(frozen=True)
class SgdConfig(StageConfig):
    """The options of a stage that is trained by SGD with momentum, a warm-up and steps."""

    learning_rate: float = option(1e-2, "paper: initial learning rate of this stage")
    momentum: float = option(0.9, "code: momentum of SGD")
    weight_decay: float = option(
        1e-4, "code: times every parameter, biases and norms too, added to its gradient"
    )
    warmup_steps: int = option(
        0, "assumed: steps in which the rate rises linearly from a tenth to all of it"
    )
    decay_every: int = option(10000, "assumed: steps after which the rate is multiplied by `decay`")
    decay: float = option(0.1, "paper: what the rate is multiplied by, again and again")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.decay_every >= 1, f"decay_every is {self.decay_every}: it must be at least 1")
        require(self.momentum < 1, f"momentum is {self.momentum:g}: it must be below 1")
        for name in ("momentum", "weight_decay", "warmup_steps", "decay"):
            value = getattr(self, name)
            require(value >= 0, f"{name} is {value:g}: it must not be negative")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What all stages of all models share."""

    seed: int = option(0, "assumed: seed of initial weights, data order and augmentation")
    adam_b1: float = option(0.9, "paper: first-order momentum of Adam")
    adam_b2: float = option(0.999, "paper: second-order momentum of Adam")
    adam_eps: float = option(1e-8, "assumed: epsilon of Adam, torch's default")
    tiles_per_scan: int = option(2, "assumed: tiles cut at random from a scan")
    foreground: float = option(
        0.5, "assumed: share of random tiles that are centred on a lesion voxel"
    )
    flip_probability: float = option(0.5, "assumed: chance of a left-right flip")
    intensity_shift: float = option(0.02, "assumed: extent of a random shift of [0, 1] values")
    intensity_scale: float = option(0.05, "assumed: extent of a random scale of [0, 1] values")
    cache_mib: int = option(1024, "assumed: MiB of decoded chunks kept in memory")
    log_every: int = option(10, "assumed: steps between two lines of metrics.jsonl")
    evaluate_every: int = option(500, "assumed: steps between two evaluations on validation")
    checkpoint_every: int = option(500, "assumed: steps between two checkpoints")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            may_be_zero = field.name in ("seed", "cache_mib")
            if field.type is int and not may_be_zero:
                require(value >= 1, f"{field.name} is {value}: it must be at least 1")
            require(value >= 0, f"{field.name} is {value}: it must not be negative")
        for name in ("adam_b1", "adam_b2"):
            value = getattr(self, name)
            require(value < 1, f"{name} is {value:g}: it must be below 1")
        for name in ("foreground", "flip_probability"):
            value = getattr(self, name)
            require(value <= 1, f"{name} is {value:g}: it is a share, at most 1")
