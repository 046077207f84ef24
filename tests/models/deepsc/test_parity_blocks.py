"""Every block against the PyTorch reference: values, and gradients of inputs and parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from drawn import masked_volume
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.blocks.dynunet_block import UnetResBlock
from parity import (
    DTYPES,
    GRADIENTS,
    VALUES,
    channel_first,
    channel_last,
    compare,
    padded,
    part,
    relative,
)
from reference.deepsc import classifier, inception, lesion
from reference.deepsc.lungs import LungNorm

from deepsc_jax.models.deepsc.classifier import Classifier, ResidualUnit, evidence_masks
from deepsc_jax.models.deepsc.inception import Inception
from deepsc_jax.models.deepsc.lesion import LesionSubnet
from deepsc_jax.models.layers import blocks as layers
from deepsc_jax.models.layers.convolution import conv3d
from deepsc_jax.models.layers.layout import ConvForm, Layout

BRANCHES = ((1,), (1, 3), (1, 3, 3), (3, 5))
FORMS: tuple[ConvForm, ...] = ("native", "sliced", "folded", "direct")
# Two forms and every type once; the other two pairs are slow tests.
PAIRS = [
    ("native", "float64"),
    ("folded", "float32"),
    pytest.param("folded", "float64", marks=pytest.mark.slow),
    pytest.param("native", "float32", marks=pytest.mark.slow),
]
# (batch, padded depth, height, width), and the real slices of each scan.
PADDED = {"native": ((2, 5, 8, 6), (3, 5)), "folded": ((1, 3, 10, 8), (1,))}


def lungs_of(x: np.ndarray, valid: tuple[int, ...]) -> np.ndarray:
    """Where a masked volume is not 0, within its real slices."""
    real = np.arange(x.shape[1]) < np.asarray(valid)[:, None]
    return (x[..., :1] > 0) & real[:, :, None, None, None]


def seen(x: torch.Tensor, valid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One scan's real slices, channel first, 0 outside of the lungs, and the lungs."""
    real = channel_first(x[:, :valid])
    lungs = real[:, :1] > 0
    return real * lungs, lungs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_convolutions(form: ConvForm, dtype: str, within: Any):
    # Few channels and many: folded stacks the slices of the first and sums those of the second.
    rng = np.random.default_rng(0)
    inputs, settings = [], []
    for channels, kernel, stride in ((3, 3, 1), (3, 3, 2), (33, 3, 2), (2, 5, 2), (4, 1, 1)):
        inputs.append(rng.normal(size=(2, 3, 7, 8, channels)))
        inputs.append(rng.normal(size=(kernel, kernel, kernel, channels, 4)))
        settings.append((kernel // 2, stride))

    def ours(_: Any, *arrays: Any) -> list:
        pairs = zip(arrays[::2], arrays[1::2], settings, strict=True)
        return [conv3d(x, kernel, stride, form) for x, kernel, (_, stride) in pairs]

    def theirs(*tensors: torch.Tensor) -> list[torch.Tensor]:
        pairs = zip(tensors[::2], tensors[1::2], settings, strict=True)
        return [
            channel_last(
                torch.nn.functional.conv3d(
                    channel_first(x),
                    kernel.permute(4, 3, 0, 1, 2),
                    stride=(1, stride, stride),
                    padding=pad,
                )
            )
            for x, kernel, (pad, stride) in pairs
        ]

    errors = compare(ours, theirs, inputs, dtype)
    within("convolution", dtype, errors.against(VALUES[dtype], GRADIENTS[dtype]))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    sides=st.tuples(*[st.integers(1, n) for n in (2, 6, 9, 9)]),
    channels=st.tuples(st.integers(1, 40), st.integers(1, 6)),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.sampled_from([1, 2]),
    form=st.sampled_from(FORMS),
)
def test_convolutions_of_any_shape(
    sides: tuple[int, ...], channels: tuple[int, int], kernel: int, stride: int, form: ConvForm
):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*sides, channels[0]))
    weights = rng.normal(size=(kernel, kernel, kernel, *channels))
    expected = torch.nn.functional.conv3d(
        torch.from_numpy(x).movedim(-1, 1),
        torch.from_numpy(weights).permute(4, 3, 0, 1, 2),
        stride=(1, stride, stride),
        padding=kernel // 2,
    )
    with jax.enable_x64(True):
        found = conv3d(jnp.asarray(x), jnp.asarray(weights), stride, form)
    assert relative(found, channel_last(expected).numpy()) <= VALUES["float64"]


@pytest.mark.parametrize(("form", "dtype"), PAIRS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["inception", "plain"])
def test_inception_block(drawn: Any, kind: Any, stride: int, form: Any, dtype: str, within: Any):
    shape, valid = PADDED[form]
    block = Inception(kind, BRANCHES, 8, 2, stride, Layout(form, jnp.dtype(dtype)))
    x = masked_volume((*shape, 2))
    lungs = jnp.asarray(lungs_of(x, valid))
    params = drawn(block, jnp.zeros(x.shape), lungs)["params"]
    if kind == "plain":
        reference: Any = inception.Plain(2, 5, 8, 2, stride)
    else:
        reference = inception.Inception(2, BRANCHES, 8, 2, stride)

    def ours(params: Any, x: Any) -> list:
        lungs = layers.real_slices(jnp.asarray(valid), x.shape[1]) & (x[..., :1] > 0)
        return [block.apply({"params": params["inception_seg"]}, layers.masked(x, lungs), lungs)]

    def theirs(x: torch.Tensor) -> list[torch.Tensor]:
        rows = [
            padded(channel_last(reference(*seen(row, n))), shape[1])
            for row, n in zip(x.split(1), valid, strict=True)
        ]
        return [torch.cat(rows)]

    again = drawn(block, jnp.zeros(x.shape), lungs, seed=1)["params"]
    more = [([masked_volume(x.shape, seed=1)], {"inception_seg": again})]
    errors = compare(
        ours,
        theirs,
        [x],
        dtype,
        {"inception_seg": params},
        part("inception_seg", reference),
        more=more,
    )
    within("inception block", dtype, errors.against(VALUES[dtype], GRADIENTS[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_max_pool_shares_the_gradient_of_ties(dtype: str, within: Any):
    x = np.random.default_rng(0).integers(0, 3, (2, 4, 6, 8, 3)).astype(float)
    errors = compare(
        lambda _, x: [layers.max_pool(x)],
        lambda x: [channel_last(lesion.pool(channel_first(x)))],
        [x],
        dtype,
    )
    within("max-pool with ties", dtype, errors.against(0, GRADIENTS[dtype]))


@pytest.mark.parametrize(("mean", "dtype"), [(0, "float32"), (0, "float64"), (1000, "float32")])
def test_group_norm(drawn: Any, mean: int, dtype: str, within: Any):
    # torch's own float32 loses five digits of the gradient at a mean of 1000.
    norm, reference = layers.GroupNorm(3), torch.nn.GroupNorm(3, 6)
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5, 6)).astype(np.float32) + np.float32(mean)
    params = drawn(norm, jnp.zeros(x.shape), None)["params"]
    errors = compare(
        lambda p, x: [norm.apply({"params": p["inception_seg"]["norm"]}, x, None)],
        lambda x: [channel_last(reference(channel_first(x)))],
        [x],
        dtype,
        {"inception_seg": {"norm": params}},
        part("inception_seg", torch.nn.ModuleDict({"norm": reference})),
        reference_dtype="float64",
    )
    within("group norm", dtype, errors.against(VALUES[dtype], GRADIENTS[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_group_norm_of_lungs(drawn: Any, dtype: str, within: Any):
    norm, reference = layers.GroupNorm(2), LungNorm(2, 4)
    x = masked_volume((3, 3, 8, 8, 4)) + 100.0
    lungs = np.asarray(lungs_of(masked_volume((3, 3, 8, 8, 4)), (3, 2, 0)))
    params = drawn(norm, jnp.zeros(x.shape), jnp.asarray(lungs))["params"]
    inside = channel_first(torch.from_numpy(lungs))
    errors = compare(
        lambda p, x: [norm.apply({"params": p["inception_seg"]["norm"]}, x, jnp.asarray(lungs))],
        lambda x: [channel_last(reference(channel_first(x), inside))],
        [x],
        dtype,
        {"inception_seg": {"norm": params}},
        part("inception_seg", torch.nn.ModuleDict({"norm": reference})),
        reference_dtype="float64",
    )
    within("group norm of lungs", dtype, errors.against(VALUES[dtype], GRADIENTS[dtype]))


@pytest.mark.parametrize(("form", "dtype"), PAIRS)
def test_lesion_subnet(drawn: Any, form: Any, dtype: str, within: Any):
    shape, valid = (2, 8, 8, 16), (5, 8)
    if form == "folded":
        shape, valid = (2, 16, 16, 8), (11, 3)
    channels, weights = (4, 6, 8), (0.05, 0.1, 0.25, 0.6)
    subnet = LesionSubnet(channels, weights, 2, Layout(form, jnp.dtype(dtype)))
    x = masked_volume((*shape, 3))
    real, lungs = jnp.asarray(valid), jnp.asarray(lungs_of(x, valid))
    params = drawn(subnet, jnp.zeros(x.shape), lungs, real)["params"]
    reference = lesion.Lesion(3, channels, 2, weights)

    def ours(params: Any, x: Any) -> list:
        lungs = layers.real_slices(real, x.shape[1]) & (x[..., :1] > 0)
        variables = {"params": params["lesion"]}
        whole, scales = subnet.apply(variables, layers.masked(x, lungs), lungs, real)
        return [whole, *scales]

    def theirs(x: torch.Tensor) -> list[torch.Tensor]:
        rows = []
        for row, n in zip(x.split(1), valid, strict=True):
            whole, scales = reference(*seen(row, n))
            steps = (1, 8, 4, 2, 1)
            rows.append(
                [
                    padded(channel_last(s), shape[1] // step)
                    for s, step in zip([whole, *scales], steps, strict=True)
                ]
            )
        return [torch.cat(column) for column in zip(*rows, strict=True)]

    again = drawn(subnet, jnp.zeros(x.shape), lungs, real, seed=1)["params"]
    more = [([masked_volume(x.shape, seed=1)], {"lesion": again})]
    module = part("lesion", reference)
    errors = compare(ours, theirs, [x], dtype, {"lesion": params}, module, more=more)
    within("lesion subnet", dtype, errors.against(VALUES[dtype], GRADIENTS[dtype]))


@pytest.mark.parametrize(("form", "dtype"), PAIRS)
def test_classifier_and_evidence_masks(drawn: Any, form: Any, dtype: str, within: Any):
    shape = (2, 5, 8, 12) if form == "native" else (1, 2, 12, 8)
    channels = (4, 6, 8)
    subnet = Classifier(3, 4, channels, 2, Layout(form, jnp.dtype(dtype)))
    inputs = [masked_volume((*shape, 4)), masked_volume((*shape, 1), seed=1)]
    lungs = lungs_of(masked_volume((*shape, 1), seed=3), (shape[1],) * shape[0])
    zeros = [*(jnp.zeros(x.shape) for x in inputs), jnp.asarray(lungs)]
    params = drawn(subnet, *zeros)["params"]
    reference = classifier.Classifier(4, 4, channels, 2, 3)
    classes = [1, 2][: shape[0]]

    def ours(params: Any, *inputs: Any) -> list:
        variables = {"params": params["classifier"]}
        out: Any = subnet.apply(variables, *inputs, jnp.asarray(lungs))
        chosen = jnp.asarray(classes)
        masks = evidence_masks(out["maps"], out["weights"], out["lungs"], chosen)
        return [out["logits"], *out["maps"], *masks]

    def theirs(*inputs: torch.Tensor) -> list[torch.Tensor]:
        inside = channel_first(torch.from_numpy(lungs))
        logits, maps, grids = reference(*map(channel_first, inputs), inside)
        masks = reference.evidence(maps, grids, torch.tensor(classes))
        return [logits, *map(channel_last, maps), *masks]

    again = drawn(subnet, *zeros, seed=1)["params"]
    more = [([masked_volume(x.shape, seed=2) for x in inputs], {"classifier": again})]
    module = part("classifier", reference)
    errors = compare(ours, theirs, inputs, dtype, {"classifier": params}, module, more=more)
    within("classification subnet", dtype, errors.against(VALUES[dtype], GRADIENTS[dtype]))


@pytest.mark.parametrize(("channels", "stride"), [(3, 1), (6, 1), (6, 2)])
def test_the_residual_unit_is_monais(drawn: Any, channels: int, stride: int):
    unit = ResidualUnit(6, 2, stride, Layout("folded"))
    x = masked_volume((2, 3, 8, 6, channels)).astype(np.float32)
    params = drawn(unit, jnp.zeros(x.shape), None)["params"]
    theirs = UnetResBlock(
        3, channels, 6, 3, (1, stride, stride), norm_name=("group", {"num_groups": 2}),
        act_name="relu",
    )  # fmt: skip
    names = {
        "conv1.conv.weight": params["conv0"]["conv"]["kernel"],
        "norm1.weight": params["conv0"]["norm"]["scale"],
        "norm1.bias": params["conv0"]["norm"]["bias"],
        "conv2.conv.weight": params["conv1"]["kernel"],
        "norm2.weight": params["norm1"]["scale"],
        "norm2.bias": params["norm1"]["bias"],
    }
    if "shortcut" in params:
        names |= {
            "conv3.conv.weight": params["shortcut"]["kernel"],
            "norm3.weight": params["shortcut_norm"]["scale"],
            "norm3.bias": params["shortcut_norm"]["bias"],
        }
    weights = {name: torch.from_numpy(np.array(value)) for name, value in names.items()}
    theirs.load_state_dict(
        {k: v.permute(4, 3, 0, 1, 2) if v.ndim == 5 else v for k, v in weights.items()}
    )
    expected = channel_last(theirs(channel_first(torch.from_numpy(x)))).detach().numpy()
    assert relative(unit.apply({"params": params}, x, None), expected) <= VALUES["float32"]
