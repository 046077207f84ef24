"""What `predict` and `evaluate` are told of how a network's probabilities become a result.

All is off by default, and a result says all of it: some of it hides what a network marked.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from absl import flags

from deepsc_jax.runtime.types import JsonObject

LARGEST_ML = 1e4  # more than lungs hold
LesionGate = Literal["none", "soft", "hard"]


@dataclass(frozen=True)
class PredictionOptions:
    """How the probabilities of networks become a result.

    Attributes:
      lesion_gate: what the class says of lesions: `none` nothing; `soft`: the lesion probability is
        multiplied by that of pneumonia, 1 less that of the lesion-free class; `hard`: it is 0
        where the lesion-free class is the most probable.
      smallest_lesion_ml: connected lesions below it are removed from the mask, not from the
        probabilities; 0 for none.
      mirror: whether probabilities are the mean of the scan's and of its mirror image's.
      threshold: lesion probability from which a voxel is lesion; None for the networks' mean.
    """

    lesion_gate: LesionGate = "none"
    smallest_lesion_ml: float = 0.0
    mirror: bool = False
    threshold: float | None = None

    def facts(self) -> JsonObject:
        """As result.json and metrics.json say them, which say the threshold that was taken."""
        facts = dataclasses.asdict(self)
        del facts["threshold"]
        return facts


def define_flags() -> None:
    """Define the flags of networks and of the options."""
    flags.DEFINE_list(
        "checkpoint",
        None,
        "A training run's --workdir, or several, separated by commas: their probabilities are "
        "averaged.",
        required=True,
    )
    flags.DEFINE_string("stage", None, "Whose checkpoint; default: the last one trained.")
    flags.DEFINE_float(
        "threshold",
        None,
        "Lesion probability from which a voxel is lesion; default: as chosen on validation, of "
        "several networks the mean.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    flags.DEFINE_enum(
        "lesion_gate",
        "none",
        ["none", "soft", "hard"],
        "soft multiplies the lesion probability by that of pneumonia; hard removes all lesions "
        "where the lesion-free class wins. Both hide lesions where the class is wrong.",
    )
    flags.DEFINE_float(
        "smallest_lesion_ml",
        0.0,
        "Remove connected lesions below it from the mask; the probabilities keep them.",
        lower_bound=0.0,
        upper_bound=LARGEST_ML,
    )
    flags.DEFINE_bool(
        "mirror",
        False,
        "The mean of the probabilities of the scan and of its mirror image; twice the time.",
    )


def from_flags() -> PredictionOptions:
    """The options that the flags say."""
    options = flags.FLAGS
    return PredictionOptions(
        lesion_gate=options.lesion_gate,
        smallest_lesion_ml=options.smallest_lesion_ml,
        mirror=options.mirror,
        threshold=options.threshold,
    )
