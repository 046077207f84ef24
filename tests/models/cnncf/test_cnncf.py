"""CNNCF's options, what its gate lets through, and one program on several devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smallest_cnncf
from smallest_cnncf import PATCHES

from deepsc_jax.config import DataConfig, PlatformConfig
from deepsc_jax.models.cnncf import gate, network
from deepsc_jax.models.cnncf.config import Options, RegressorOptions, Training
from deepsc_jax.models.layers.layout import Layout
from deepsc_jax.runtime import device_mesh
from deepsc_jax.systems import sgd
from deepsc_jax.systems.system import initial
from deepsc_jax.training import state as states
from deepsc_jax.training.step import make_train_step

CONFIG = smallest_cnncf.config(gate_window=2, gate_count=1)
WEIGHTS = {"class_weights": jnp.asarray(smallest_cnncf.CLASS_WEIGHTS)}


def trained(config: Any, steps: int, devices: int = 1, dtype: str = "float32") -> tuple[Any, Any]:
    """The state before and after some steps, on the host."""
    system = smallest_cnncf.system(config, dtype)
    mesh = device_mesh.make_mesh(PlatformConfig(data_devices=devices), jax.devices()[:devices])
    (stage,) = system.stages
    state = states.create(system, stage, smallest_cnncf.cast(initial(system), dtype))
    before = jax.device_get(state)
    step = make_train_step(system, stage, mesh, smallest_cnncf.cast({"a": WEIGHTS}, dtype)["a"])
    state = jax.device_put(state, device_mesh.replicated(mesh))
    for seed in range(steps):
        arrays = smallest_cnncf.cast(smallest_cnncf.batch(1, seed), dtype)
        state, _ = step(state, jax.device_put(arrays, device_mesh.batch_sharding(mesh)))
    return before, jax.device_get(state)


def part(state: Any, names: tuple[str, ...]) -> list[np.ndarray]:
    """Parameters and statistics of the modules whose names begin so."""
    trees = [state.params, state.carried["batch_stats"]]
    return [
        leaf
        for tree in trees
        for name in sorted(tree)
        if name.startswith(names)
        for leaf in jax.tree.leaves(tree[name])
    ]


@pytest.mark.slow
def test_stage_2_waits_until_the_gate_opens():
    """But for decay; its statistics keep their bits. Stage I trains from the first step on."""
    training = dataclasses.replace(smallest_cnncf.OPTIONS.classification, weight_decay=0.0)
    config = smallest_cnncf.config(gate_window=2, gate_count=1, classification=training)
    before, shut = trained(config, 2)
    assert shut.carried["gate"]["since"] == 2  # judged after the second step, in which it was shut
    for one, other in zip(*(part(s, ("stage2", "fc")) for s in (before, shut)), strict=True):
        np.testing.assert_array_equal(one, other)
    _, opened = trained(config, 3)
    for one, other in zip(*(part(s, ("stage2", "fc")) for s in (before, opened)), strict=True):
        assert (one != other).any()
    for one, other in zip(*(part(s, ("stage1", "stem")) for s in (before, shut)), strict=True):
        assert (one != other).any()


def test_who_answers_is_who_the_gate_lets():
    system, batch = smallest_cnncf.system(CONFIG), smallest_cnncf.batch(1)
    variables, (stage,) = initial(system), system.stages
    for is_open, answer in ((False, "stage1_logits"), (True, "stage2_logits")):
        variables |= {gate.COLLECTION: smallest_cnncf.state(is_open)}
        out = system.outputs(stage, variables, smallest_cnncf.cast(batch, "float32"))
        np.testing.assert_array_equal(out["logits"], out[answer])
    assert (out["stage1_logits"] != out["stage2_logits"]).any()


@pytest.mark.slow
def test_one_two_and_four_devices_take_the_same_steps():
    with jax.enable_x64(True):
        config = smallest_cnncf.config(gate_window=2, gate_count=1, gate_sensitivity=0.5)
        _, one = trained(config, 5, 1, "float64")
        for devices in (2, 4):
            _, other = trained(config, 5, devices, "float64")
            for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_it_warns_at_each_decay_and_at_the_end_while_the_gate_is_closed():
    options, training = Options(), Training(steps=70, decay_every=30)
    shut = {gate.COLLECTION: gate.shut() | {"sensitivity": jnp.float32(0.625)}}
    said = [step for step in range(1, 71) if network.warnings(options, training, step, shut)]
    assert said == [30, 60, 70]
    (line,) = network.warnings(options, training, 30, shut)
    assert "0 good windows in a row, 3 open it" in line
    assert "sensitivity of 0.62" in line
    opened = {gate.COLLECTION: smallest_cnncf.state(True)}
    assert network.warnings(options, training, 70, opened) == ()
    assert network.notes(opened) == ("gate: open since step 3",)
    published = Options(variant="published")
    assert network.warnings(published, training, 70, {}) == network.notes({}) == ()


def test_the_rate_warms_up_and_falls_in_steps():
    rate = sgd.rate(Training(steps=50, learning_rate=0.01, warmup_steps=4, decay_every=10))
    steps = (0, 1, 2, 3, 4, 5, 9, 10, 29)
    expected = [0.001, 0.00325, 0.0055, 0.00775, 0.01, 0.01, 0.01, 0.001, 1e-4]
    np.testing.assert_allclose(np.array([rate(i) for i in steps]), expected, rtol=1e-5)
    without = sgd.rate(Training(warmup_steps=0, decay_every=10))
    np.testing.assert_allclose(np.asarray(without(0)), 0.01, rtol=1e-6)


def test_pseudo_colours_are_jets():
    """OpenCV's COLORMAP_JET of levels 0, 31, 64, 128, 191, 255, as RGB."""
    levels = jnp.asarray([0, 31, 64, 128, 191, 255])[:, None] / 255
    expected = [
        [0, 0, 128],
        [0, 0, 252],
        [0, 128, 255],
        [130, 255, 126],
        [255, 128, 0],
        [128, 0, 0],
    ]
    np.testing.assert_allclose(255 * network.jet(levels), expected, atol=2)


def test_a_scan_is_mixed_by_thirds():
    mix = network.SliceMix(grouped=True)
    x = jnp.arange(6.0)[None, :, None, None] * jnp.ones((1, 6, 2, 2))
    kernel = jnp.asarray([[1, 2, 3], [10, 20, 30]], jnp.float32)[None, None]
    variables = {"params": {"kernel": kernel, "bias": jnp.asarray([0.5, 0, 0])}}
    y: Any = mix.apply(variables, x)
    # Channel g of slices 2g and 2g + 1.
    np.testing.assert_allclose(y[0, 0, 0], [10.5, 2 * 2 + 3 * 20, 4 * 3 + 5 * 30])


@pytest.mark.parametrize(
    ("options", "slices", "reason"),
    [
        ({}, 5, "slices is 5: give 1"),
        ({"pseudo_colour": "jet"}, 6, "pseudo_colour is jet and slices is 6"),
        ({"positive": "flu"}, 1, "positive is flu: give one of covid-19"),
        ({"stage2_widths": (8, 0, 8)}, 1, r"stage2_widths is \(8, 0, 8\)"),
        ({"stem": 0}, 1, "stem is 0"),
        ({"published_blocks": (1, 1)}, 1, "give each group one of both"),
        ({"gate_window": 0}, 1, "gate_window is 0"),
        ({"gate_sensitivity": -0.1}, 1, "gate_sensitivity is -0.1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], slices: int, reason: str):
    with pytest.raises(ValueError, match=reason):
        Options(**options).check(DataConfig(slices=slices), PlatformConfig())


def test_what_would_be_another_function_is_refused():
    for options, data in ((Options(), DataConfig(slices=1)), (RegressorOptions(), PATCHES)):
        options.check(data, PlatformConfig())
        for platform in (PlatformConfig(accumulation=2), PlatformConfig(space=2)):
            with pytest.raises(ValueError, match=r"(accumulation|space) is 2"):
                options.check(data, platform)
    with pytest.raises(ValueError, match="momentum is 1"):
        Training(momentum=1.0)
    with pytest.raises(ValueError, match=r"hidden is \(0, 3\)"):
        RegressorOptions(hidden=(0, 3)).check(PATCHES, PlatformConfig())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"patches": "none"}, "patches is none: it reads patches of lesions: give window or"),
        ({"indicators": ()}, "indicators is empty: give the columns of the case list"),
        (
            {"working_size": (40, 40), "tile": (1, 40, 40)},
            r"working_size is \(40, 40\): the sides of a patch must be multiples of 16",
        ),
    ],
)
def test_what_a_regressor_cannot_read_is_refused(changes: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        RegressorOptions().check(dataclasses.replace(PATCHES, **changes), PlatformConfig())


def test_a_wider_network_has_more_channels_everywhere():
    wide = Options().widened(2)
    assert (wide.stem, wide.stage1_widths, wide.stage2_widths) == (
        128,
        (128, 256, 512),
        (512, 512, 1024),
    )
    assert wide.published_widths == (128, 256, 512, 1024)
    assert RegressorOptions().widened(2).widths == (512, 512, 1024)
    assert network.build(wide, DataConfig(), Layout()).options is wide  # pyright: ignore
