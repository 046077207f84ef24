"""What the commands ask of trained networks; stand-ins, whose predictions are worked out by hand."""

import dataclasses
import pathlib
from typing import Any, cast

import chests
import handful
import nibabel as nib
import numpy as np
import pytest

from deepsc_jax.data.prediction import Prediction
from deepsc_jax.inference import identity, results
from deepsc_jax.inference.ensemble import Ensemble
from deepsc_jax.inference.options import PredictionOptions
from deepsc_jax.inference.predictor import Predictor
from deepsc_jax.inference.requests import Request
from deepsc_jax.inference.results import Network
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.systems.building import build
from deepsc_jax.systems.system import Stage

SYSTEM = build(handful.CONFIG, "cpu")


@dataclasses.dataclass
class Member:
    """Says of any scan what it says of its voxels."""

    stage: Stage = SYSTEM.stage("joint")
    threshold: float = 0.5
    trained_on: str = "phantoms"
    network: Network = chests.NETWORK
    config: Any = handful.CONFIG

    def __call__(self, volume: np.ndarray) -> Prediction:
        return chests.compute(volume)


def ensemble(*members: Member, **options: Any) -> Ensemble:
    (member,) = members or (Member(),)
    return Ensemble(cast(Predictor, member), PredictionOptions(**options))


def test_a_gate_is_applied_and_said(tmp_path: pathlib.Path) -> None:
    scan = tmp_path / "scan.nii"
    lungs = chests.write_chest(scan)
    probabilities, kept = {}, {}
    for gate in ("none", "soft", "hard"):
        network = ensemble(lesion_gate=gate)
        out = tmp_path / gate
        result = results.predict_scan(Request(gate, scan, lungs), out, network.network, network)
        assert result["lesion_gate"] == gate
        kept[gate] = result["lesion_ml"]
        probabilities[gate] = network(np.full((8, 24, 32), 0.25, np.float32)).lesion
        again = ensemble(lesion_gate="none").network
        read = identity.read_result(out)
        sources = identity.identify(scan, lungs)
        assert results.is_done(read, out, sources, network.network)
        assert results.is_done(read, out, sources, again) == (gate == "none")
    assert kept["none"] == kept["hard"] > 0  # the stand-in's third class is never the likeliest
    np.testing.assert_allclose(probabilities["none"], 0.75)


@pytest.mark.parametrize(
    ("stage", "lacking"), [("segmentation", "classes"), ("classification", "lesions")]
)
def test_a_gate_wants_lesions_and_classes(stage: str, lacking: str) -> None:
    said = f"--lesion_gate=soft: the {stage} stage of --model=deepsc gives no {lacking}"
    with pytest.raises(InputError, match=said):
        ensemble(Member(stage=SYSTEM.stage(stage)), lesion_gate="soft")
    assert ensemble(Member(stage=SYSTEM.stage(stage))).threshold == 0.5


def test_lesions_that_are_too_small_are_in_the_probability_alone(tmp_path: pathlib.Path) -> None:
    scan = tmp_path / "scan.nii"
    lungs = chests.write_chest(scan)
    found = {}
    for smallest_ml in (0.0, 1e4):
        network = ensemble(smallest_lesion_ml=smallest_ml)
        out = tmp_path / str(smallest_ml)
        result = results.predict_scan(Request("scan", scan, lungs), out, network.network, network)
        assert result["smallest_lesion_ml"] == smallest_ml
        probability = nib.Nifti1Image.from_filename(out / "lesion_probability.nii.gz")
        found[smallest_ml] = result["lesion_ml"], probability.get_fdata().sum()
    assert found[0.0][0] > 0
    assert found[1e4] == (0.0, found[0.0][1])


def test_a_mirrored_prediction_is_the_same_of_the_mirror_image() -> None:
    """Of a network that is not symmetric: it sees lesions towards one side."""

    @dataclasses.dataclass
    class OneSided(Member):
        def __call__(self, volume: np.ndarray) -> Prediction:
            lesion = volume * np.linspace(0, 1, volume.shape[2], dtype=np.float32)
            classes = np.array([lesion.mean(), 1 - lesion.mean(), 0.0], np.float32)
            return Prediction({"lesion": lesion}, classes, {"evidence_1": lesion})

    volume = np.random.default_rng(0).random((3, 4, 5)).astype(np.float32)
    network = ensemble(OneSided(), mirror=True)
    found, other = network(volume), network(volume[..., ::-1])
    assert found.lesion is not None
    assert other.lesion is not None
    np.testing.assert_allclose(found.lesion, volume / 2, atol=1e-6)
    np.testing.assert_allclose(found.lesion, other.lesion[..., ::-1], atol=1e-6)
    np.testing.assert_allclose(found.classes, other.classes, atol=1e-6)
    np.testing.assert_allclose(found.evidence["evidence_1"], volume / 2, atol=1e-6)
    assert network.network.options.facts()["mirror"]
