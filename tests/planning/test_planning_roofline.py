"""Bounds and transfers by hand, the facts of the chips, and the search for the largest batch."""

import pytest

from deepsc_jax.config import Config, PlatformConfig
from deepsc_jax.models.deepsc.config import Options
from deepsc_jax.planning import roofline, search, targets
from deepsc_jax.planning.hlo import Collective
from deepsc_jax.planning.targets import CHIPS, PRODUCTS
from deepsc_jax.runtime.errors import InputError

H100 = CHIPS["h100"]


def reduced(kind="all-reduce", size=900, devices=8, trips=1):
    return Collective(kind, "f32", size, trips, trips != 1, (tuple(range(devices)),))


def test_a_step_takes_as_long_as_the_slowest_of_its_reasons():
    found = roofline.bound({"bfloat16": 989 * 10**12, "float32_exact": 67 * 10**12}, 335, [], H100)
    assert (found.arithmetic, found.transfers) == (2.0, 0.0)
    assert found.memory == pytest.approx(1e-10)
    assert (found.step, found.efficiency) == (2.0, 1.0)
    found = roofline.bound({"bfloat16": 1}, int(6.7e12), [reduced(size=int(450e9))], H100)
    assert found.transfers == pytest.approx(2 * 7 / 8)
    assert found.step == pytest.approx(2.0)
    assert found.efficiency == pytest.approx(2 / (2 + 1.75))


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("all-reduce", 2 * 7 / 8), ("all-gather", 7 / 8), ("reduce-scatter", 7 / 8)],
)
def test_what_a_device_sends_of_an_array_within_a_node(kind, sent):
    assert roofline.transfer_seconds(reduced(kind), H100) == pytest.approx(sent * 900 / 450e9)
    assert roofline.transfer_seconds(reduced(kind, trips=5), H100) == pytest.approx(
        5 * sent * 900 / 450e9
    )


def test_between_nodes_all_network_ports_of_a_node_share_the_array():
    # 64 GPUs on 8 nodes: 8 ports of 50 GB/s, less than the 450 GB/s inside.
    found = roofline.transfer_seconds(reduced(devices=64), H100)
    assert found == pytest.approx(2 * 63 / 64 * 900 / 400e9)
    # One GPU of each of 8 nodes: one port.
    apart = Collective("all-reduce", "f32", 900, 1, False, (tuple(range(0, 64, 8)),))
    assert roofline.transfer_seconds(apart, H100) == pytest.approx(2 * 7 / 8 * 900 / 50e9)


def test_a_permute_sends_its_array_once_and_one_device_alone_sends_nothing():
    halo = Collective("collective-permute", "bf16", 900, 1, False, ((0, 1), (1, 2)))
    assert roofline.transfer_seconds(halo, H100) == pytest.approx(900 / 450e9)
    assert roofline.transfer_seconds(reduced(devices=1), H100) == 0


@pytest.mark.parametrize("name", CHIPS)
def test_every_chip_has_its_facts_and_their_source(name):
    chip = CHIPS[name]
    assert (chip.gpu is None) != (chip.tpu is None)
    assert set(chip.peaks) == set(PRODUCTS)
    assert chip.peaks["bfloat16"] >= chip.peaks["float32"] > chip.peaks["float32_exact"]
    assert 0 < chip.limit <= chip.memory
    assert chip.link >= chip.network
    assert chip.source


def test_a_torus_is_as_cubic_as_can_be():
    assert targets._torus(8, 2) == (2, 4)
    assert targets._torus(256, 2) == (16, 16)
    assert targets._torus(64, 3) == (4, 4, 4)
    assert targets._torus(1, 3) == (1, 1, 1)


def test_a_compiler_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"--platform=h100: .*xla_cuda13.*deepsc_jax\[plan\]"):
        targets.devices("h100", 8)
    with pytest.raises(InputError, match=r"--platform=v5e: .*libtpu.*deepsc_jax\[tpu\]"):
        targets.devices("v5e", 8)


@pytest.mark.parametrize("fixed", [0, 5, 300])
@pytest.mark.parametrize("each", [1, 7, 40])
@pytest.mark.parametrize("bent", [0, 0.0005])
def test_the_largest_batch_is_found_in_few_compilations(fixed, each, bent):
    limit, tried = 1000, []

    def peak(scans):
        tried.append(scans)
        return int(fixed + each * scans * (1 + bent * scans))

    best = search.largest_batch(peak, limit)
    assert peak(best) <= limit
    assert best == search.MOST or peak(best + 1) > limit
    assert len(tried) - 2 <= (6 if bent else 3), tried
    assert len(set(tried[:-2])) == len(tried[:-2])  # none is compiled twice


def test_where_one_scan_is_too_much_the_largest_batch_is_none():
    assert search.largest_batch(lambda scans: 11 * scans, 10) == 0
    assert search.largest_batch(lambda scans: 10 * scans, 10) == 1


def test_every_choice_of_remat_is_tried():
    found = search.remat_choices(Config(Options(), platform=PlatformConfig(accumulation=2)))
    assert {config.platform.remat for config in found} == {"none", "tiles", "blocks", "all"}
    assert {config.platform.accumulation for config in found} == {2}
