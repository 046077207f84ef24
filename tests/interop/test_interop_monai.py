"""The peer: MONAI's U-Net on the segmentation stage's batches."""

import dataclasses
import pathlib

import numpy as np
import pytest
import torch

from deepsc_jax.config import Config, DataConfig
from deepsc_jax.data import preparation
from deepsc_jax.data.store import Store
from deepsc_jax.evaluation.scoring import evaluate
from deepsc_jax.interop import monai
from deepsc_jax.models.comparators import resnet3d
from deepsc_jax.models.deepsc.config import Options, PreTraining
from deepsc_jax.phantoms.writing import write_phantoms
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.systems.building import build

DATA = DataConfig(
    working_spacing_mm=(8, 9, 9),
    working_size=(24, 32),
    tile=(8, 24, 16),
    depth_bucket=8,
    slices=8,
)
CONFIG = Config(Options(segmentation=PreTraining(steps=30, learning_rate=1e-2, batch=2)), data=DATA)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    out = tmp_path_factory.mktemp("data")
    cases = write_phantoms((4, 0, 2), out, seed=0, size=48, workers=1)
    assert preparation.prepare(cases, out, DATA, workers=1) == []
    return Store(pathlib.Path(out) / "store", DATA)


class Threshold(torch.nn.Module):
    """A network whose answer is known: lesion's logit is ten times the standardised input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([0 * x, 10 * x], dim=1)


def test_tiles_are_put_back_where_they_were_cut():
    volume = np.random.default_rng(0).uniform(size=(11, 24, 32)).astype(np.float32)
    volume[:, :4] = 0
    peer = monai.Peer(CONFIG, Threshold())
    found = peer(volume).lesion
    assert found is not None
    mean, sd = CONFIG.data.intensity_mean, CONFIG.data.intensity_sd
    logit = np.where(volume > 0, 10 * (volume - mean) / sd, 0)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-logit)), atol=1e-5)


def test_the_peer_learns_and_is_evaluated_as_ours_is(store: Store):
    few = CONFIG.with_stage("segmentation", steps=1)
    peers = [monai.train(settings, store, (4, 8)) for settings in (few, CONFIG)]
    dsc = []
    for peer in peers:
        metrics, rows = evaluate(peer, store, "test")
        assert len(rows) == 2
        dsc.append(metrics["lesions"]["dsc"]["mean"])
    assert dsc[1] > dsc[0] + 0.02


def test_a_model_without_tiles_to_draw_is_refused():
    system = build(dataclasses.replace(CONFIG, model=resnet3d.Options()), "cpu")
    with pytest.raises(InputError, match="--model=resnet3d: it has no stage that draws tiles"):
        monai.segmentation_stage(system)


@pytest.mark.parametrize("texts", [["a"], ["16"], [], ["16", "-4"], ["16", "x"]])
def test_channels_that_are_none_are_refused(texts: list[str]):
    with pytest.raises(InputError, match=f"--channels={','.join(texts)}: expected whole numbers"):
        monai._channels(texts)
