"""Preprocessing and tiled inference of a whole phantom against the reference."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
import torch
from parity import INFERENCE, VALUES, relative
from parity_network import CONFIG, draw, system_of
from reference import preprocess as reference_preprocess
from reference.deepsc import inference as reference
from reference.deepsc.network import DeepSC

from deepsc_jax.config import Config, DataConfig
from deepsc_jax.data import preprocess
from deepsc_jax.data.scans import Scan
from deepsc_jax.inference import predictor as inference
from deepsc_jax.interop.torch import to_torch
from deepsc_jax.models.deepsc.torch_names import TORCH_NAMES
from deepsc_jax.phantoms import lesions as phantom

# Tiles of 8 slices and a depth that is not a multiple of 8; slices repeat in the last case.
GRIDS = {
    "coarse": DataConfig(
        working_spacing_mm=(12.0, 11.0, 11.0),
        working_size=(32, 32),
        tile=(8, 16, 32),
        slices=5,
        depth_bucket=8,
    ),
    "as-they-come": DataConfig(working_size=(32, 48), tile=(16, 32, 24), slices=7, depth_bucket=16),
    "more-slices-than-depth": DataConfig(
        working_spacing_mm=(25.0, 0.0, 0.0),
        working_size=(16, 16),
        tile=(8, 16, 16),
        slices=40,
        depth_bucket=8,
    ),
}


@pytest.fixture(scope="module")
def scan_and_lung() -> tuple[Scan, np.ndarray]:
    drawn = phantom.make_phantom(seed=5, index=0, size=64)
    values = drawn.hu.astype(np.float32)
    shape = (values.shape[0], values.shape[1], values.shape[2])
    scan = Scan("phantom", values, drawn.spacing_mm, np.eye(4), shape, None, nib.Nifti1Header())
    return scan, drawn.lung_mask


@pytest.mark.parametrize("grid", GRIDS)
def test_preprocessing(scan_and_lung: tuple[Scan, np.ndarray], grid: str, within: Any):
    data = GRIDS[grid]
    scan, lung = scan_and_lung
    ours = preprocess.prepare_scan(scan, lung, data)
    where = ours.grid
    sizes = list(zip(where.source_shape, where.shape, where.start, where.step, strict=True))
    depth, height, width = (reference_preprocess.forward(*size) for size in sizes)
    theirs = reference_preprocess.prepare(
        torch.from_numpy(scan.values),
        torch.from_numpy(lung),
        (depth, height, width),
        data.hu_window,
    ).numpy()
    # A lung voxel at one half may fall on either side of it.
    share = reference_preprocess.apply((depth, height, width), torch.from_numpy(lung)).numpy()
    clear = np.abs(share - 0.5) > 1e-6
    assert clear.mean() > 0.9
    there = relative(ours.volume * clear, theirs * clear)
    depth, height, width = (reference_preprocess.backward(*size) for size in sizes)
    back = reference_preprocess.apply((depth, height, width), torch.from_numpy(ours.volume))
    again = relative(preprocess.to_source(ours.volume, where), back.numpy())
    bound = VALUES["float32"]
    within("preprocessing", "float32", {"to working": (there, bound), "to source": (again, bound)})


@pytest.mark.parametrize(
    ("grid", "dtype"),
    [
        ("coarse", "float64"),
        ("more-slices-than-depth", "float32"),
        pytest.param("coarse", "float32", marks=pytest.mark.slow),
        pytest.param("more-slices-than-depth", "float64", marks=pytest.mark.slow),
    ],
)
def test_tiled_inference_of_a_phantom(
    scan_and_lung: tuple[Scan, np.ndarray], grid: str, dtype: str, within: Any
):
    config: Config = dataclasses.replace(CONFIG, data=GRIDS[grid])
    volume = preprocess.prepare_scan(*scan_and_lung, config.data).volume
    assert volume.any()
    params = draw(config)
    module = DeepSC(config).to(getattr(torch, dtype))
    module.load_state_dict(to_torch(params, TORCH_NAMES))
    lesion, probabilities, evidence = reference.predict(
        module, torch.from_numpy(volume).to(getattr(torch, dtype))
    )

    with jax.enable_x64(dtype == "float64"):
        cast = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
        system = system_of(config, jax.default_backend(), dtype)
        variables, stage = {"params": cast}, system.stage("joint")
        predictor = inference.Predictor(system, stage, variables, 0.5, "phantoms")
        found = predictor(volume.astype(dtype))
    assert found.lesion is not None
    assert found.classes is not None
    assert found.lesion.dtype == dtype
    errors = {
        "lesion": relative(found.lesion, lesion.numpy()),
        "class probabilities": relative(found.classes, probabilities.numpy()),
        "evidence": relative(list(found.evidence.values()), [m.numpy() for m in evidence]),
    }
    bound = INFERENCE[dtype]
    within("tiled inference", dtype, {name: (e, bound) for name, e in errors.items()})
