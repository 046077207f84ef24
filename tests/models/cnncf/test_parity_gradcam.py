"""Grad-CAM at stage I of CNNCF against PyTorch's hooks."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
import smallest_cnncf
import torch
from parity import JOINT_GRADIENTS, relative
from parity_norms import draw
from reference import cnncf as reference
from reference.cnncf.network import CNNCF

from deepsc_jax.interop.torch import variables_to_torch
from deepsc_jax.models.cnncf import gate, network
from deepsc_jax.systems.gradcam import grad_cam


def hooked(module: CNNCF, slices: torch.Tensor, classes: list[int]) -> torch.Tensor:
    """With a gradient taken by a hook on stage I's output."""
    kept: dict[str, torch.Tensor] = {}

    def keep(_: Any, __: Any, output: torch.Tensor) -> None:
        kept["map"] = output
        output.register_hook(lambda gradient: kept.update(gradient=gradient))

    handle = module.stage1.register_forward_hook(keep)
    logits = module.eval().logits(slices)
    handle.remove()
    logits[range(len(classes)), classes].sum().backward()
    weights = kept["gradient"].mean((2, 3), keepdim=True)
    return (weights * kept["map"]).sum(1).relu().detach()


@pytest.mark.parametrize("is_open", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_grad_cam_at_stage_1(is_open: bool, within: Any):
    config, dtype = smallest_cnncf.config(), "float64"
    system = smallest_cnncf.system(config, dtype)
    batch = smallest_cnncf.batch(1)
    x = jnp.zeros((*batch["slices"].shape, 1))
    single = smallest_cnncf.system(config).network  # of the same parameters
    variables = draw(lambda key: single.init(key, x, train=True))
    variables |= {gate.COLLECTION: smallest_cnncf.state(is_open)}
    module = reference.network(config).double()
    module.load_state_dict(variables_to_torch(variables, network.TORCH_NAMES))
    assert isinstance(module, CNNCF)
    classes = [0, 2, 1, 0]
    expected = hooked(module, torch.from_numpy(batch["slices"]), classes).numpy()
    with jax.enable_x64(True):
        found = grad_cam(
            system,
            system.stages[0],
            smallest_cnncf.cast(variables, dtype),
            smallest_cnncf.cast(batch, dtype),
            "stage1",
            jnp.array(classes),
        )
    measured = {"values": (relative(found, expected), JOINT_GRADIENTS[dtype])}
    within("Grad-CAM", dtype, measured)
