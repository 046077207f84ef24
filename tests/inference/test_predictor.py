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


@pytest.fixture(scope="module")
def params() -> Any:
    return draw(CONFIG)


def predictor_of(params: Any, stage: str = "joint", config: Config = CONFIG) -> inference.Predictor:
    system = build(config, "cpu")
    return inference.Predictor(system, system.stage(stage), {"params": params}, 0.5, "phantoms")


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
