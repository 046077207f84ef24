"""What the commands ask of trained networks, on stand-ins whose predictions are by hand."""

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
from deepsc_jax.inference.ensemble import Ensemble, require_alike
from deepsc_jax.inference.network import Network
from deepsc_jax.inference.options import PredictionOptions
from deepsc_jax.inference.request import Request
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.systems.building import build
from deepsc_jax.systems.system import Stage

SYSTEM = build(handful.CONFIG, "cpu")
JOINT = SYSTEM.stage("joint")


@dataclasses.dataclass
class Member:
    """Says of any scan what it says of its voxels."""

    stage: Stage = JOINT
    threshold: float = 0.5
    trained_on: str = "phantoms"
    network: Network = chests.NETWORK
    config: Any = handful.CONFIG

    def __call__(self, volume: np.ndarray) -> Prediction:
        return chests.compute(volume)


def ensemble(*members: Member, **options: Any) -> Ensemble:
    return Ensemble(cast(Any, members or (Member(),)), PredictionOptions(**options))


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
    assert found.classes is not None
    assert other.classes is not None
    np.testing.assert_allclose(found.classes, other.classes, atol=1e-6)
    np.testing.assert_allclose(found.evidence["evidence_1"], volume / 2, atol=1e-6)
    assert network.network.options.facts()["mirror"]


@dataclasses.dataclass
class Constant(Member):
    """Says the same of every voxel."""

    lesion: float = 0.0

    def __call__(self, volume: np.ndarray) -> Prediction:
        lesion = np.full(volume.shape, self.lesion, np.float32)
        return Prediction({"lesion": lesion}, np.array([self.lesion, 1 - self.lesion, 0.0]))


def test_an_ensemble_is_the_mean_of_its_networks() -> None:
    other = dataclasses.replace(chests.NETWORK, digest="other")
    members = [
        Constant(threshold=0.2, lesion=0.1),
        Constant(threshold=0.3, lesion=0.5, trained_on="scans", network=other),
    ]
    both = ensemble(*members)
    found = both(np.zeros((2, 3, 4), np.float32))
    assert found.lesion is not None
    np.testing.assert_allclose(found.lesion, 0.3, rtol=1e-6)
    assert found.classes is not None
    np.testing.assert_allclose(found.classes, [0.3, 0.7, 0.0], rtol=1e-6)
    assert both.threshold == both.network.threshold == 0.25
    assert both.trained_on == both.network.trained_on == "phantoms and scans"
    assert both.network.networks == both.facts()["networks"] == 2
    assert ensemble(*members, threshold=0.6).network.threshold == 0.6
    digests = {ensemble(*of).network.digest for of in (members, members[:1], members[1:])}
    assert len(digests) == 3
    assert ensemble(members[0]).network.digest == chests.NETWORK.digest


def test_networks_that_cannot_be_averaged_are_refused() -> None:
    def coarser(**changes: Any) -> Member:
        data = dataclasses.replace(handful.CONFIG.data, **changes)
        return Member(config=dataclasses.replace(handful.CONFIG, data=data))

    paths = [pathlib.Path("a"), pathlib.Path("b")]

    def check(other: Member) -> None:
        require_alike(paths, cast(Any, [Member(), other]))

    check(coarser(slices=16, intensity_mean=0.0))  # each network's own
    with pytest.raises(
        InputError,
        match=r"--checkpoint: b has --hu_window \(-1000, 0\), and a \(-1400\.0, 200\.0\)",
    ):
        check(coarser(hu_window=(-1000, 0)))
    with pytest.raises(InputError, match=r"--checkpoint: b has tasks \('lesions',\), and a "):
        check(Member(stage=SYSTEM.stage("segmentation")))


def test_networks_of_several_folds_are_evaluated_on_test_alone() -> None:
    def of_fold(fold: str) -> Member:
        train = dataclasses.replace(handful.CONFIG.train, fold=fold)
        return Member(config=dataclasses.replace(handful.CONFIG, train=train))

    assert ensemble(of_fold("1/5")).fold("validation") == (1, 5)
    both = ensemble(of_fold("1/5"), of_fold("0/5"))
    assert both.fold("test") is None
    with pytest.raises(InputError, match=r"--split=validation: the networks .* different folds"):
        both.fold("validation")


def test_one_network_is_broken_at_a_time_and_one_that_can_be() -> None:
    with pytest.raises(InputError, match="--evidence=sanity: is of one network"):
        ensemble(Member(), Member()).broken()
    member = Member(stage=SYSTEM.stage("segmentation"))
    member.broken = dict  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(InputError, match="the segmentation stage of --model=deepsc has no part"):
        ensemble(member).broken()
