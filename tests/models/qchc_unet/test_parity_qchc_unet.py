"""QC-HC U-Net against PyTorch: parts, ablations, loss, running statistics, parameter counts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from drawn import draw_params
from monai.losses.tversky import TverskyLoss
from parity import (
    DTYPES,
    GRADIENTS,
    JOINT_GRADIENTS,
    JOINT_VALUES,
    VALUES,
    channel_first,
    channel_last,
    compare,
    module_gradient,
    relative,
)
from reference import qchc_unet as reference

from deepsc_jax.config import DataConfig
from deepsc_jax.interop.torch import from_torch, variables_to_torch
from deepsc_jax.models.layers.batch_norm import BATCH_STATS
from deepsc_jax.models.layers.layout import Layout
from deepsc_jax.models.qchc_unet import network as qchc
from deepsc_jax.models.qchc_unet.config import Options
from deepsc_jax.models.qchc_unet.torch_names import TORCH_NAMES

PLAIN = {"shortcut": False, "cascade": False, "projection": False, "hypercolumns": False}
MISCNN = PLAIN | {"bias": True, "upsampling_norm": False}
SMALL = Options(widths=(4, 8, 16))
VARIANTS = {
    "all": {},
    "no shortcut": {"shortcut": False},
    "no cascade": {"cascade": False},
    "no projection": {"projection": False},
    "no hypercolumns": {"hypercolumns": False},
    "plain": PLAIN,
    "MIScnn": MISCNN,
    "identity": {"identity": True},
    "bottleneck": {"hypercolumn_bottleneck": True},
}
QUANTITIES = (
    "values",
    "values by running statistics",
    "input gradients",
    "parameter gradients",
    "running statistics",
)


def labels(shape: tuple[int, ...], classes: int = 4, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, shape).astype(np.int32)


class InTraining:
    """A module with `train` set, as `draw_params` initialises it."""

    def __init__(self, apply: Callable[..., Any]):
        self.apply = apply

    def init(self, key: Any, *inputs: Any) -> Any:
        return self.apply(key, *inputs)


def step_errors(
    ours: Callable[..., Any],
    theirs: Callable[..., torch.Tensor],
    module: torch.nn.Module,
    inputs: list[np.ndarray],
    variables: Any,
    dtype: str,
) -> list[float]:
    """Of one training step, in the order of `QUANTITIES`.

    `ours(variables, train, *inputs)` gives outputs and what moved, `theirs` runs `module`.
    """
    kind = getattr(torch, dtype)
    module.to(kind).train().load_state_dict(variables_to_torch(variables, TORCH_NAMES))
    tensors = [torch.from_numpy(x).to(kind).requires_grad_() for x in inputs]
    y = theirs(*tensors)
    probe = np.random.default_rng(7).normal(size=tuple(y.shape))
    (y * torch.from_numpy(probe).to(kind)).sum().backward()
    with torch.no_grad():
        module.eval()
        after = theirs(*tensors)
    expected = (
        y.detach().numpy(),
        after.numpy(),
        [t.grad.numpy() for t in tensors if t.grad is not None],
        module_gradient(module, TORCH_NAMES),
        from_torch(module.state_dict(), TORCH_NAMES, collection=BATCH_STATS),
    )

    @jax.jit
    def step(variables: Any, probe: Any, *inputs: Any) -> Any:
        def objective(params: Any, *inputs: Any) -> Any:
            y, moved = ours({**variables, "params": params}, True, *inputs)
            return (y * probe).sum(), (y, moved[BATCH_STATS])

        wanted = tuple(range(len(inputs) + 1))
        found, (y, moved) = jax.grad(objective, wanted, has_aux=True)(variables["params"], *inputs)
        after, _ = ours({**variables, BATCH_STATS: moved}, False, *inputs)
        return y, after, list(found[1:]), found[0], moved

    with jax.enable_x64(dtype == "float64"):
        cast = jax.tree.map(lambda a: jnp.asarray(a, dtype), (variables, probe, inputs))
        found = jax.device_get(step(cast[0], cast[1], *cast[2]))
    return [relative(f, e) for f, e in zip(found, expected, strict=True)]


def bounds(errors: list[float], values: float, gradients: float) -> dict[str, Any]:
    limits = (values, values, gradients, gradients, values)
    return dict(zip(QUANTITIES, zip(errors, limits, strict=True), strict=True))


def without_perturbations(variables: Any) -> Any:
    return {name: tree for name, tree in variables.items() if name != "perturbations"}


def network_errors(options: Options, shape: tuple[int, ...], form: Any, dtype: str) -> list[float]:
    network = qchc.build(options, DataConfig(), Layout(form, jnp.dtype(dtype)))
    x = np.random.default_rng(5).normal(size=(*shape, 1))
    variables = without_perturbations(draw_params(network, jnp.zeros(x.shape)))
    module = reference.QCHCUNet(options)

    def ours(variables: Any, train: bool, x: Any) -> Any:
        out: Any
        out, moved = network.apply(variables, x, train=train, mutable=[BATCH_STATS])
        return out["logits"], moved

    def theirs(x: torch.Tensor) -> torch.Tensor:
        return channel_last(module(channel_first(x)))

    return step_errors(ours, theirs, module, [x], variables, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True], ids=["concatenating", "lowest"])
def test_encoder_block(last: bool, dtype: str, within: Any):
    options = Options(widths=(4, 8))
    block = qchc.Encoder(4, last, options, Layout("native", jnp.dtype(dtype)))
    x = np.maximum(np.random.default_rng(0).normal(size=(2, 4, 6, 5, 4)), 0)
    drawn = draw_params(InTraining(lambda key, x: block.init(key, x, True)), jnp.zeros(x.shape))
    variables = {name: {"encoder0": tree} for name, tree in drawn.items()}
    inner = reference.Encoder(4, 4, not last, options)
    module = torch.nn.ModuleDict({"encoder": torch.nn.ModuleList([inner])})

    def ours(variables: Any, train: bool, x: Any) -> Any:
        own = {name: tree["encoder0"] for name, tree in variables.items()}
        y, moved = block.apply(own, x, train, mutable=[BATCH_STATS])
        return y, {BATCH_STATS: {"encoder0": moved[BATCH_STATS]}}

    def theirs(x: torch.Tensor) -> torch.Tensor:
        return channel_last(inner(channel_first(x)))

    errors = step_errors(ours, theirs, module, [x], variables, dtype)
    within("QC encoder block", dtype, bounds(errors, VALUES[dtype], GRADIENTS[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoder_block(dtype: str, within: Any):
    options = Options(widths=(4, 8))
    block = qchc.Decoder(4, options, Layout("native", jnp.dtype(dtype)))
    rng = np.random.default_rng(0)
    below, skip = rng.normal(size=(2, 2, 3, 2, 8)), rng.normal(size=(2, 4, 6, 4, 8))
    init = InTraining(lambda key, *inputs: block.init(key, *inputs, True))
    drawn = draw_params(init, jnp.zeros(below.shape), jnp.zeros(skip.shape))
    variables = {name: {"decoder0": tree} for name, tree in drawn.items()}
    inner = reference.Decoder(8, 8, 4, options)
    module = torch.nn.ModuleDict({"decoder": torch.nn.ModuleList([inner])})

    def ours(variables: Any, train: bool, below: Any, skip: Any) -> Any:
        own = {name: tree["decoder0"] for name, tree in variables.items()}
        y, moved = block.apply(own, below, skip, train, mutable=[BATCH_STATS])
        return y, {BATCH_STATS: {"decoder0": moved[BATCH_STATS]}}

    def theirs(below: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return channel_last(inner(channel_first(below), channel_first(skip)))

    errors = step_errors(ours, theirs, module, [below, skip], variables, dtype)
    within("QC decoder block", dtype, bounds(errors, VALUES[dtype], GRADIENTS[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_hypercolumns_upsampling_is_torchs(factor: int, dtype: str, within: Any):
    x = np.random.default_rng(0).normal(size=(2, 2, 3, 1, 4))
    size = (2 * factor, 3 * factor, factor)
    errors = compare(
        lambda _, x: [qchc.upsample(x, size)],
        lambda x: [
            channel_last(
                torch.nn.functional.interpolate(
                    channel_first(x), size, mode="trilinear", align_corners=False
                )
            )
        ],
        [x],
        dtype,
    )
    within("hypercolumn upsampling", dtype, errors.against(VALUES[dtype], GRADIENTS[dtype]))


QUICK = ("no shortcut", "no cascade", "no projection", "plain")  # all is `test_whole_network`


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=() if v in QUICK else pytest.mark.slow) for v in VARIANTS],
)
def test_every_ablation(variant: str, within: Any):
    options = dataclasses.replace(SMALL, **VARIANTS[variant])
    errors = network_errors(options, (2, 8, 16, 8), "native", "float64")
    measured = bounds(errors, JOINT_VALUES["float64"], JOINT_GRADIENTS["float64"])
    within(f"QC-HC U-Net, {variant}", "float64", measured)


PAIRS = [
    ("native", "float64"),
    pytest.param("folded", "float32", marks=pytest.mark.slow),
    pytest.param("folded", "float64", marks=pytest.mark.slow),
    pytest.param("banded", "float64", marks=pytest.mark.slow),
    pytest.param("direct", "float32", marks=pytest.mark.slow),
    pytest.param("native", "float32", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("form", "dtype"), PAIRS)
def test_whole_network(form: str, dtype: str, within: Any):
    options = Options(widths=(4, 8, 16, 32, 64))
    errors = network_errors(options, (2, 16, 32, 32), form, dtype)
    within("QC-HC U-Net", dtype, bounds(errors, JOINT_VALUES[dtype], JOINT_GRADIENTS[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absent", [False, True], ids=["all classes", "absent classes"])
def test_losses(absent: bool, dtype: str, within: Any):
    # Unequal weights, or exchanging them would change nothing.
    options = Options(tversky_alpha=0.3, tversky_beta=0.7)
    shape = (2, 3, 4, 5)
    truth = labels(shape, 2 if absent else 4)
    logits = np.random.default_rng(1).normal(size=(*shape, 4))

    def ours(_: Any, logits: Any) -> list:
        return list(qchc.losses(options, logits, jnp.asarray(truth), None).values())

    def theirs(logits: torch.Tensor) -> list[torch.Tensor]:
        terms = []
        for z, t in zip(channel_first(logits), torch.from_numpy(truth).long(), strict=True):
            terms.append(list(reference.loss(z[None], t[None], options).values()))
        return [torch.stack(row) for row in zip(*terms, strict=True)]

    errors = compare(ours, theirs, [logits], dtype)
    within("Tversky + cross-entropy", dtype, errors.against(VALUES[dtype], GRADIENTS[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absent", [False, True], ids=["all classes", "absent classes"])
def test_tversky_is_monais_summed_over_classes(absent: bool, dtype: str, within: Any):
    # MONAI's alpha is of false positives.
    options = Options(tversky_alpha=0.3, tversky_beta=0.7)
    shape = (2, 3, 4, 5)
    truth = labels(shape, 2 if absent else 4)
    logits = np.random.default_rng(1).normal(size=(*shape, 4))
    theirs = TverskyLoss(
        softmax=True, to_onehot_y=True, alpha=0.7, beta=0.3, smooth_nr=1e-6, smooth_dr=1e-6,
        reduction="none",
    )  # fmt: skip
    target = torch.from_numpy(truth).long()[:, None]
    errors = compare(
        lambda _, z: [qchc.losses(options, z, jnp.asarray(truth), None)["tversky"]],
        lambda z: [theirs(channel_first(z), target).flatten(1).sum(dim=1)],
        [logits],
        dtype,
    )
    within("Tversky against MONAI", dtype, errors.against(VALUES[dtype], GRADIENTS[dtype]))


def counted(options: Options) -> tuple[int, int]:
    """Parameters of ours and of the reference, without computing either."""
    network = qchc.build(options, DataConfig(), Layout())
    side = options.tile_step
    shape = jax.ShapeDtypeStruct((1, side, side, side, 1), jnp.float32)
    variables: Any = jax.eval_shape(lambda x: network.init(jax.random.key(0), x), shape)
    with torch.device("meta"):
        module = reference.QCHCUNet(options)
    zeros = jax.tree.map(
        lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), without_perturbations(variables)
    )
    weights = variables_to_torch(zeros, TORCH_NAMES)
    expected = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    assert {name: tuple(x.shape) for name, x in weights.items()} == expected
    ours = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(variables["params"]))
    return ours, sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 29_920_688),
        ({"hypercolumns": False}, 29_918_884),
        ({"widths": (8, 16, 32, 64, 128)}, 1_872_056),
        ({"widths": (8, 16, 32, 64)}, 465_844),
        (MISCNN, 22_581_316),
        (MISCNN | {"widths": (8, 16, 32, 64, 128)}, 1_413_268),
        (PLAIN, 22_578_852),
    ],
)
def test_numbers_of_parameters_and_names(changes: dict[str, Any], count: int):
    assert counted(Options(**changes)) == (count, count)
