"""SIGTERM: heard by the loop, agreed on, and given back afterwards."""

import os
import signal

import pytest

from deepsc_jax.config import PlatformConfig
from deepsc_jax.runtime import device_mesh
from deepsc_jax.training.preemption import Preemption


@pytest.mark.parametrize(("data", "space"), [(1, 1), (4, 2)])
def test_a_signal_ends_the_loop_a_few_steps_later(data: int, space: int) -> None:
    mesh = device_mesh.make_mesh(PlatformConfig(data_devices=data, space=space))
    before = signal.getsignal(signal.SIGTERM)
    with Preemption(mesh) as preemption:
        assert not any(preemption.agreed() for _ in range(5))
        os.kill(os.getpid(), signal.SIGTERM)
        assert [preemption.agreed() for _ in range(4)] == [False, False, True, True]
    assert signal.getsignal(signal.SIGTERM) == before
