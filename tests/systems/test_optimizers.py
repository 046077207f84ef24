"""Learning rates and optimizers by hand."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepsc_jax.config.training import StageConfig, TrainConfig
from deepsc_jax.systems.optimizers import adam, averaged, chosen, learning_rate

STAGE = StageConfig(steps=100, batch=8, learning_rate=1e-3)
PARAMS = {"conv": {"kernel": jnp.full((2, 2), 3.0)}, "norm": {"scale": jnp.full(2, 3.0)}}


def rates(steps: list[int], **options: Any) -> list[float]:
    rate: Any = learning_rate(TrainConfig(**options), STAGE)
    return [float(rate(step)) for step in steps]


def test_the_rate_falls_linearly_to_zero_by_default():
    assert rates([0, 50, 100, 120]) == pytest.approx([1e-3, 5e-4, 0, 0])


def test_cosine_and_constant_schedules():
    assert rates([0, 25, 50, 100], schedule="cosine") == pytest.approx(
        [1e-3, 1e-3 * (1 + np.cos(np.pi / 4)) / 2, 5e-4, 0], abs=1e-9
    )
    assert rates([0, 50, 100], schedule="constant") == pytest.approx([1e-3] * 3)


def test_a_warm_up_rises_to_the_rate_and_then_the_schedule_begins():
    found = rates([0, 4, 9, 10, 55, 100], warmup_steps=10)
    assert found == pytest.approx([1e-4, 5e-4, 1e-3, 1e-3, 5e-4, 0])


def test_the_rate_grows_with_the_batch_it_is_not_given_for():
    assert rates([0], rate_batch=2) == pytest.approx([4e-3])
    assert rates([0], rate_batch=8) == pytest.approx([1e-3])


def first_update(gradient: Any, **options: Any) -> Any:
    train = TrainConfig(adam_eps=0.0, **options)
    optimizer = adam(train, learning_rate(train, STAGE))
    return optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)[0]


def test_kernels_alone_decay():
    # Adam's first step is the rate whatever the gradient; AdamW adds rate * decay * parameter.
    gradient = jax.tree.map(jnp.ones_like, PARAMS)
    found = first_update(gradient, weight_decay=0.1)
    np.testing.assert_allclose(found["conv"]["kernel"], -1e-3 * (1 + 0.1 * 3), rtol=1e-5)
    np.testing.assert_allclose(found["norm"]["scale"], -1e-3, rtol=1e-5)


def test_a_long_gradient_is_shortened_before_adam():
    # Of gradients cut to one length every step of Adam is the rate; a long first one lingers.
    def second(clip_norm: float) -> float:
        train = TrainConfig(clip_norm=clip_norm)
        optimizer = adam(train, learning_rate(train, STAGE))
        state = optimizer.init(PARAMS)
        for size in (100.0, 1.0):
            gradient = jax.tree.map(lambda p, s=size: jnp.full_like(p, s), PARAMS)
            update: Any
            update, state = optimizer.update(gradient, state, PARAMS)
        return float(update["norm"]["scale"][0])

    assert second(1.0) == pytest.approx(-0.99e-3, rel=1e-3)
    assert second(0.0) > -0.8e-3
    assert second(1e9) == pytest.approx(second(0.0))


def test_the_default_is_plain_adam():
    gradient = jax.tree.map(lambda p: 0.3 * p, PARAMS)
    train = TrainConfig()
    found = adam(train, learning_rate(train, STAGE))
    expected = optax.adam(1e-3)
    one, other = (o.update(gradient, o.init(PARAMS), PARAMS)[0] for o in (found, expected))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_average_forgets_its_start_and_then_keeps_its_decay():
    average, params = {"w": jnp.array(0.0)}, {"w": jnp.array(1.0)}
    # 1 - (1 + n) / (10 + n) of the new value while that is below the decay.
    first = averaged(average, params, jnp.array(1), 0.9)
    assert float(first["w"]) == pytest.approx(1 - 2 / 11)
    late = averaged(average, params, jnp.array(10_000), 0.9)
    assert float(late["w"]) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average_decay": 1.0}, "average_decay"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"warmup_steps": -1}, "warmup_steps"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TrainConfig(), **options)


def test_sgd_with_nesterovs_momentum_by_hand():
    train = TrainConfig(optimizer="sgd", momentum=0.5, schedule="constant", weight_decay=0.1)
    optimizer = chosen(train, learning_rate(train, STAGE))
    state, gradient = optimizer.init(PARAMS), jax.tree.map(jnp.ones_like, PARAMS)
    # v = g, then v = 1.5 g; a step is the rate times g + 0.5 v. A kernel's g is 1 + 0.1 * 3.
    for expected in (1.5, 1.75):
        update, state = optimizer.update(gradient, state, PARAMS)
        scale, kernel = (
            cast(Any, update)[a][b] for a, b in (("norm", "scale"), ("conv", "kernel"))
        )
        np.testing.assert_allclose(scale, -1e-3 * expected, rtol=1e-6)
        np.testing.assert_allclose(kernel, -1.3e-3 * expected, rtol=1e-6)


def test_adam_is_chosen_by_default():
    rate = optax.constant_schedule(1e-3)
    found, expected = (o.init(PARAMS) for o in (chosen(TrainConfig(), rate), optax.adam(rate)))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
