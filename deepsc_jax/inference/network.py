"""What is known of a trained network where it is not computed."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from deepsc_jax import __version__
from deepsc_jax.config import DataConfig
from deepsc_jax.inference.options import PredictionOptions


@dataclass(frozen=True)
class Network:
    """What is known of a trained network where it is not computed.

    Attributes:
      data: how scans are preprocessed for it.
      stage: the stage whose checkpoint it is.
      threshold: lesion probability from which a voxel is lesion.
      trained_on: `phantoms`, `scans`, or `unknown data`.
      digest: another for other parameters, and for another architecture of the same ones.
      volumes: what it gives probabilities of, and maps of evidence, by name.
      options: what is made of its predictions.
      networks: whose mean it is.
    """

    data: DataConfig
    stage: str
    threshold: float
    trained_on: str
    digest: str
    volumes: tuple[str, ...]
    options: PredictionOptions = dataclasses.field(default_factory=PredictionOptions)
    networks: int = 1


def network_digest(network: Network) -> str:
    """What a result depends on beside its scan and lung mask, as a SHA-256."""
    data = dataclasses.asdict(network.data)
    facts = [__version__, network.digest, data, network.stage]
    facts += [network.threshold, network.trained_on, network.options.facts()]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()
