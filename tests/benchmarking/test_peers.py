"""The peers that are timed compute what the readable reference does: values and gradients."""

import dataclasses
import importlib
import itertools
from typing import Any

import pytest
import smallest
import torch
from measured import CONFIG, job
from peers.parts import Parts, make_step

from deepsc_jax.benchmarking import jobs
from deepsc_jax.config import Config, DataConfig
from deepsc_jax.models.comparators import unet3d
from deepsc_jax.models.deepsc.config import JointTraining, PreTraining

PAIR = PreTraining(batch=2)
MODEL = dataclasses.replace(
    smallest.MODEL,
    scale_supervision=0.5,
    segmentation=PAIR,
    classification=PAIR,
    joint=JointTraining(batch=2),
)
DEPTH = 12  # of scans: their last layer of tiles is thin
DATA = DataConfig(working_size=(16, 32), tile=(8, 16, 16), slices=6, depth_bucket=16)
TRAIN = dataclasses.replace(CONFIG.train, tiles_per_scan=2)
DEEPSC = dataclasses.replace(CONFIG, model=MODEL, data=DATA, train=TRAIN)
ABLATED = dataclasses.replace(
    DEEPSC,
    model=dataclasses.replace(
        MODEL,
        inception="plain",
        cross_stitch=False,
        task_aware_scales="single",
        evidence_class="label",
        gradient_tiles=3,
        lesion_gradient="stopped",
        tversky_alpha=0.3,
        tversky_beta=0.7,
    ),
)
UNET3D = Config(
    data=DataConfig(working_size=(16, 32), tile=(16, 16, 16), slices=8, depth_bucket=16),
    model=unet3d.Options(widths=(4, 4, 8)),
    train=dataclasses.replace(TRAIN, optimizer="sgd"),
)
WAYS = [Parts(), Parts("layer", recompute=True), Parts("tile")]
CLASS_WEIGHTS = (0.5, 1.0, 2.0)
# Rounding of float64, through divisions by small sums.
BOUND = 1e-9


def drawn(config: Config, stage: str) -> dict[str, torch.Tensor]:
    """A batch in float64."""
    size = (DEPTH, *config.data.working_size)
    made = jobs.batch(job(stage=stage, config=config, scan_size=size))
    kinds = {"f": torch.float64, "i": torch.int64}
    return {name: torch.from_numpy(x).to(kinds[x.dtype.kind]) for name, x in made.items()}


def pair(config: Config) -> tuple[Any, Any, Any, Any]:
    """The modules of both, and a network of each, with the same parameters, none of them 0."""
    name = config.model.NAME
    reference, peer = (importlib.import_module(f"{kind}.{name}") for kind in ("reference", "peers"))
    torch.manual_seed(0)
    theirs = reference.network(config).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    mine = peer.network(config).double()
    mine.load_state_dict(theirs.state_dict())
    return reference, peer, theirs, mine


def off(found: Any, expected: Any) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("parts", WAYS)
@pytest.mark.parametrize(
    ("config", "stage"),
    [
        pytest.param(DEEPSC, "segmentation", marks=pytest.mark.slow),
        pytest.param(DEEPSC, "classification", marks=pytest.mark.slow),
        (DEEPSC, "joint"),
        pytest.param(ABLATED, "joint", marks=pytest.mark.slow),
        (UNET3D, "segmentation"),
    ],
)
def test_terms_and_gradients_of_a_step(config: Config, stage: str, parts: Parts):
    reference, peer, theirs, mine = pair(config)
    batch, weights = drawn(config, stage), torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)
    # Its step leaves the gradients, and yields the terms as before it.
    expected = next(reference.train(theirs, config, stage, itertools.repeat(batch), weights))
    objective = peer.Objective(mine, config, stage, batch, weights, parts).double()
    terms = objective(peer.inputs(config, stage, batch))
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        assert float(term) == pytest.approx(expected[name], rel=BOUND, abs=1e-12), name
    terms["loss"].backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, parameter in mine.named_parameters():
        if name not in gradients:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        assert parameter.grad is not None, name
        assert float((parameter.grad - gradients[name]).abs().max()) < BOUND * largest, name


@pytest.mark.parametrize(
    ("config", "stage"), [(DEEPSC, "joint"), (DEEPSC, "segmentation"), (UNET3D, "segmentation")]
)
def test_outputs_and_the_step_after(config: Config, stage: str):
    reference, peer, theirs, mine = pair(config)
    batch, weights = drawn(config, stage), torch.ones(3, dtype=torch.float64)
    with torch.no_grad():
        expected = reference.forward(theirs, config, batch, stage)
    given = peer.inputs(config, stage, batch)
    found = peer.Forward(mine, config, stage, batch, Parts("layer")).double()(given)
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert off(x.flatten(), expected[name].flatten()) < BOUND
    objective = peer.Objective(mine, config, stage, batch, weights, Parts()).double()
    steps = reference.train(theirs, config, stage, itertools.repeat(batch), weights)
    step = make_step(objective, config, stage, given)
    for _ in range(2):  # the second sees what Adam made of the first
        expected_loss, loss = next(steps)["loss"], float(step()["loss"])
        assert loss == pytest.approx(expected_loss, rel=1e-6)


@pytest.mark.parametrize("parts", WAYS)
@pytest.mark.parametrize("config", [DEEPSC, UNET3D])
def test_a_whole_scan(config: Config, parts: Parts):
    reference, peer, theirs, mine = pair(config)
    shape = (DEPTH, *config.data.working_size)
    volume = torch.from_numpy(jobs.draw_scan(shape, 0)[0]).double()
    volumes, classes = reference.predict(theirs, config, volume)
    found, found_classes = peer.Predictor(mine, config, shape, parts).double()(volume)
    assert found.keys() == volumes.keys()
    for name, x in found.items():
        assert off(x, volumes[name]) < BOUND, name
    assert (classes is None) == (found_classes is None)
    if classes is not None:
        assert off(found_classes, classes) < BOUND
