"""What `predict` and `evaluate` are told of how a network's probabilities become a result.

All is off by default, and a result says all of it: some of it hides what a network marked.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from absl import flags

from deepsc_jax.runtime.types import JsonObject

LesionGate = Literal["none", "soft", "hard"]


@dataclass(frozen=True)
class PredictionOptions:
    """How a network's probabilities become a result.

    Attributes:
      lesion_gate: what the class says of lesions: `none` nothing; `soft`: the lesion probability is
        multiplied by that of pneumonia, 1 less that of the lesion-free class; `hard`: it is 0
        where the lesion-free class is the most probable.
    """

    lesion_gate: LesionGate = "none"

    def facts(self) -> JsonObject:
        """As result.json and metrics.json say it."""
        return dataclasses.asdict(self)


def define_flags() -> None:
    """Define the flags of the options."""
    flags.DEFINE_enum(
        "lesion_gate",
        "none",
        ["none", "soft", "hard"],
        "soft multiplies the lesion probability by that of pneumonia; hard removes all lesions "
        "where the lesion-free class wins. Both hide lesions where the class is wrong.",
    )


def from_flags() -> PredictionOptions:
    """The options that the flags say."""
    return PredictionOptions(lesion_gate=flags.FLAGS.lesion_gate)
