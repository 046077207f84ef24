"""A signal: agreed on by all devices a few steps later, or at once where it is waited for."""

import signal

import pytest

from deepsc_jax.config import PlatformConfig
from deepsc_jax.runtime import device_mesh
from deepsc_jax.runtime.signals import signals
from deepsc_jax.training.preemption import Preemption


@pytest.mark.parametrize(("data", "space"), [(1, 1), (4, 2)])
def test_a_signal_ends_the_loop_a_few_steps_later(
    data: int, space: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    preemption = Preemption(device_mesh.make_mesh(PlatformConfig(data_devices=data, space=space)))
    assert not any(preemption.agreed() for _ in range(5))
    assert not preemption.agreed_now()
    monkeypatch.setattr(signals, "received", signal.SIGTERM)
    assert preemption.agreed_now()
    monkeypatch.setattr(signals, "received", None)
    assert not any(preemption.agreed() for _ in range(5))
    monkeypatch.setattr(signals, "received", signal.SIGTERM)
    assert [preemption.agreed() for _ in range(4)] == [False, False, True, True]
