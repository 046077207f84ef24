"""The network over whole scans: what its programs may depend on, and what its digest does."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import smallest
from drawn import masked_volume
from parity_network import draw

from deepsc_jax.config import Config, DataConfig
from deepsc_jax.inference import predictor as inference
from deepsc_jax.systems import whole_scan
from deepsc_jax.systems.building import build

CONFIG = Config(
    data=DataConfig(working_size=(8, 16), tile=(8, 8, 8), slices=8, depth_bucket=8),
    model=smallest.MODEL,
)
ONE_TILE = dataclasses.replace(  # a tile holds a scan of eight slices
    CONFIG, data=dataclasses.replace(CONFIG.data, tile=(8, 8, 16))
)


@pytest.fixture(scope="module")
def params() -> Any:
    return draw(CONFIG)


def predictor_of(
    params: Any, stage: str = "joint", config: Config = CONFIG, whole_scans: bool = False
) -> inference.Predictor:
    system = build(config, "cpu")
    variables = {"params": params}
    return inference.Predictor(
        system, system.stage(stage), variables, 0.5, "phantoms", whole_scans=whole_scans
    )


def volume(depth: int) -> np.ndarray:
    return masked_volume((1, depth, 8, 16), seed=depth)[0].astype(np.float32)


def test_a_second_scan_of_whatever_depth_compiles_nothing(params: Any) -> None:
    predictor = predictor_of(params)
    predictor(volume(20))  # three tiles deep: more than one chunk
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if "compile" in event or "trace" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for depth in (3, 8, 47):
            found = predictor(volume(depth))
            assert found.lesion is not None
            assert found.lesion.shape == (depth, 8, 16)
        assert compiled == []
        jax.jit(lambda x: x + 1)(1.0)
        assert compiled  # it would have been heard
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_another_network_is_known_by_its_digest(params: Any) -> None:
    def network(params: Any = params, config: Config = CONFIG) -> Any:
        return predictor_of(params, config=config).network

    copy = jax.tree.map(lambda x: np.array(x), params)
    assert network(copy) == network()
    leaves, tree = jax.tree.flatten(copy)
    leaves[-1].flat[-1] += 1e-6
    assert network(jax.tree.unflatten(tree, leaves)).digest != network().digest
    other = dataclasses.replace(smallest.MODEL, cross_stitch=False)
    assert network(config=dataclasses.replace(CONFIG, model=other)).digest != network().digest


def test_a_chunk_is_read_while_the_next_is_computed(params: Any, monkeypatch: Any) -> None:
    predictor = predictor_of(params, "segmentation")
    program: Any = predictor._predict
    segment, events = program._segment, []

    def dispatch(*arguments: Any) -> Any:
        events.append("dispatch")
        return segment(*arguments)

    def noted(items: Any) -> Any:
        for tiles, corners in items:
            events.append(f"read {len(corners)}")
            yield tiles, corners

    one_behind = whole_scan.one_behind
    monkeypatch.setattr(program, "_segment", dispatch)
    monkeypatch.setattr(whole_scan, "one_behind", lambda x: noted(one_behind(x)))
    found = predictor(volume(40)).lesion  # ten tiles, in chunks of four
    assert events == ["dispatch", "dispatch", "read 4", "dispatch", "read 4", "read 2"]
    assert found is not None
    np.testing.assert_array_equal(found > 0, volume(40) > 0)


@pytest.mark.parametrize("depth", [pytest.param(6, marks=pytest.mark.slow), 19])
def test_a_network_trained_on_whole_scans_sees_a_deeper_one_as_one_tile(
    params: Any, depth: int
) -> None:
    """As a network of the same parameters does whose tile is that deep, for which it is no news."""
    deep = -(-depth // 8) * 8
    deeper = dataclasses.replace(ONE_TILE.data, tile=(deep, 8, 16), depth_bucket=deep)
    expected = predictor_of(params, config=dataclasses.replace(ONE_TILE, data=deeper))(
        volume(depth)
    )
    whole = predictor_of(params, config=ONE_TILE, whole_scans=True)
    found, tiled = whole(volume(depth)), predictor_of(params, config=ONE_TILE)(volume(depth))
    assert found.lesion is not None
    assert expected.lesion is not None
    assert tiled.lesion is not None
    assert found.classes is not None
    assert expected.classes is not None
    # One tile at a time or four, a convolution sums in another order.
    np.testing.assert_allclose(found.lesion, expected.lesion, atol=1e-5)
    np.testing.assert_allclose(found.classes, expected.classes, atol=1e-5)
    for name, mask in found.evidence.items():
        np.testing.assert_allclose(mask, expected.evidence[name], atol=1e-4)
    assert (np.abs(tiled.lesion - found.lesion).max() > 1e-3) == (depth > 8)
    assert whole.network.digest != predictor_of(params, config=ONE_TILE).network.digest


@pytest.mark.slow
def test_a_network_broken_on_purpose_is_another_in_that_alone(params: Any) -> None:
    whole, scan = predictor_of(params), volume(20)
    broken = whole.broken()
    assert broken.keys() == {"random_head", "no_lesions"}
    expected = whole(scan)
    for name, predict in broken.items():
        found = predict(scan)
        assert found.lesion is not None
        assert expected.lesion is not None
        np.testing.assert_array_equal(found.lesion, expected.lesion, name)
        assert found.classes is not None
        assert expected.classes is not None
        assert np.abs(found.classes - expected.classes).max() > 1e-4, name
        assert not np.allclose(found.evidence["evidence_3"], expected.evidence["evidence_3"])
    assert predictor_of(params, "classification").broken().keys() == {"random_head"}
    assert predictor_of(params, "segmentation").broken() == {}
