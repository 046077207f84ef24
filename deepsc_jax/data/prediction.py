"""What a network says of a scan."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

Volume = Float[np.ndarray, "depth height width"]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a network says of a scan, on its working grid; the engine knows the parts by name.

    Attributes:
      volumes: probabilities by what they are of, such as `lesion`.
      classes: a probability for each class, or None.
      evidence: maps in [0, 1] for the most probable class, the finest first, by name.
      values: numbers by name.
      notes: sentences for whoever reads the result.
    """

    volumes: Mapping[str, Volume] = dataclasses.field(default_factory=dict)
    classes: Float[np.ndarray, "class"] | None = None
    evidence: Mapping[str, Volume] = dataclasses.field(default_factory=dict)
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def lesion(self) -> Volume | None:
        """The lesion probability, where the network segments."""
        return self.volumes.get("lesion")
