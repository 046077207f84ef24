"""The joint network and its objective against the reference."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import JOINT_GRADIENTS, JOINT_VALUES, compare, padded, to_tensors
from parity_network import CLASS_WEIGHTS, CONFIG, TILE, batch, changed, draw, to_jax
from reference.deepsc import DeepSC
from reference.training import scan_losses as reference_losses

from deepsc_jax.config import Config
from deepsc_jax.models import deepsc
from deepsc_jax.models.deepsc import Layout
from deepsc_jax.training.step import scan_losses

SEEDS = (0, 1, 2)
ABLATED = changed(
    CONFIG,
    model={"inception": "plain", "cross_stitch": False},
    loss={"task_aware_scales": "single", "evidence_class": "label"},
    train={"gradient_tiles": 1},
)
SLOW = pytest.mark.slow
TERMS = ("dice", "focal", "cross_entropy", "task_aware", "loss")


# XLA takes half a minute for each: one is quick enough for every run of the tests.
@pytest.mark.parametrize(
    ("config", "form", "scan_tiles", "dtype"),
    [
        pytest.param(CONFIG, "native", False, "float64", id="native-float64"),
        pytest.param(ABLATED, "folded", False, "float64", id="ablated-folded-float64", marks=SLOW),
        pytest.param(CONFIG, "folded", True, "float32", id="scanned-folded-float32", marks=SLOW),
    ],
)
def test_joint_network(config: Config, form: Any, scan_tiles: bool, dtype: str, within: Any):
    layout = Layout(form, jnp.dtype(dtype), scan_tiles, scan_tiles, scan_tiles)
    network = deepsc.DeepSC(config.model, config.data, layout)
    module, arrays = DeepSC(config), batch()
    task_aware = []
    count = config.train.gradient_tiles

    def ours(params: Any, tiles: Any, slices: Any) -> list:
        inputs = to_jax(arrays, dtype) | {"tiles": tiles, "slices": slices}
        out: Any = network.apply({"params": params}, inputs, "joint", count)
        weights = jnp.asarray(CLASS_WEIGHTS, dtype)
        terms = scan_losses(config, "joint", out, inputs, weights)
        volumes = [x[..., 0] for x in (out["lesion"], *out["scales"])]
        return [*(terms[name] for name in TERMS), out["logits"], *out["maps"], *volumes]

    def theirs(tiles: torch.Tensor, slices: torch.Tensor) -> list[torch.Tensor]:
        inputs = to_tensors(arrays, dtype) | {"tiles": tiles, "slices": slices}
        weights = torch.tensor(CLASS_WEIGHTS, dtype=tiles.dtype)
        rows = []
        for values in zip(*inputs.values(), strict=True):
            scan = dict(zip(inputs, values, strict=True))
            terms = reference_losses(module, scan, "joint", weights)
            out = module(scan, "joint", count or None)
            assert out.logits is not None
            assert out.maps is not None
            found = {tile.index: [tile.lesion, *tile.scales] for tile in out.tiles}
            volumes = []
            for i, step in enumerate((1, 8, 4, 2, 1)):
                side = tuple(t // step for t in TILE)
                parts = [
                    padded(found[k][i], side[0], axis=0) if k in found else tiles.new_zeros(side)
                    for k in range(tiles.shape[1])
                ]
                volumes.append(torch.stack(parts))
            maps = [m[0].movedim(0, -1) for m in out.maps]
            rows.append([*(terms[name] for name in TERMS), out.logits[0], *maps, *volumes])
        columns = [torch.stack(column) for column in zip(*rows, strict=True)]
        task_aware.append(columns[TERMS.index("task_aware")].detach().numpy())
        return columns

    first, *more = (
        ([drawn["tiles"], drawn["slices"]], draw(config, seed))
        for seed, drawn in ((seed, batch(seed)) for seed in SEEDS)
    )
    errors = compare(ours, theirs, first[0], dtype, first[1], module, more=more)
    within("joint model", dtype, errors.against(JOINT_VALUES[dtype], JOINT_GRADIENTS[dtype]))
    assert (np.concatenate(task_aware) > 0).sum() >= len(SEEDS)  # it is 0 for some predictions
