"""The benchmark: its statistics, its rows, what it refuses, and real runs of tiny networks."""

import dataclasses
import importlib
import itertools
import json
import pathlib
import pickle
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import smallest
from measured import CONFIG, job, measured

from deepsc_jax.benchmarking import bars, energy, jobs, measure, report, works
from deepsc_jax.benchmarking.jobs import Job
from deepsc_jax.config import PlatformConfig, TrainConfig
from deepsc_jax.systems.decoding import decode

REPOSITORY = pathlib.Path(__file__).parents[2]
TINY = [
    *smallest.FLAGS,
    "--depth_bucket=8",
    "--deepsc.segmentation.batch=2",
    "--deepsc.joint.batch=2",
    "--tiles_per_scan=1",
]
KEYS = {"work", "ours_s", "peer", "peer_s", "ratio", "ours_peak_mib", "peer_peak_mib"}


def benchmark(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "deepsc_jax.benchmark", *TINY, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)


@pytest.fixture(scope="module")
def beside_torch(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """A segmentation step beside two variants of the reference: the document and the table."""
    file = tmp_path_factory.mktemp("benchmark") / "rows.json"
    arguments = ("--work=train_segmentation", "--peer=torch", "--variants=eager,channels_last")
    done = benchmark(*arguments, f"--json={file}")
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


@pytest.mark.slow
def test_a_train_step_beside_torch(beside_torch: tuple[dict, str]):
    document, text = beside_torch
    rows = document["rows"]
    names = [row["peer"] for row in rows]
    assert names == ["torch eager", "torch channels_last", "torch, the best of 2"]
    for row in rows:
        assert row.keys() >= KEYS
        assert row["ours_min_s"] <= row["ours_s"] <= row["ours_max_s"]
        assert row["peer_min_s"] <= row["peer_s"] <= row["peer_max_s"]
        assert row["ratio"] == pytest.approx(row["ours_s"] / row["peer_s"])
        rounds = zip(row["ours_turns_s"], row["peer_turns_s"], strict=True)
        assert row["ratio_min"] == min(ours / peer for ours, peer in rounds)
        assert row["scans_per_s"] == pytest.approx(2 / row["ours_s"])
        assert row["tiles_per_s"] == row["scans_per_s"]
        assert 0 < row["ours_peak_mib"] < 4000
        assert 0 < row["peer_peak_mib"] < 4000
        assert row["compile_s"] > 0
        assert row["repeats"] == 5
        assert row["peer"] in text
    assert rows[2]["peer_s"] == min(row["peer_s"] for row in rows[:2])


@pytest.mark.slow
def test_the_environment_is_recorded(beside_torch: tuple[dict, str]):
    found = beside_torch[0]["environment"]
    assert found["flags"]["tile"] == [8, 16, 16]
    assert "deepsc.joint.learning_rate" not in found["flags"]
    assert "--peer=torch" in found["command"]
    row = beside_torch[0]["rows"][0]
    for settings in (row["ours_settings"], row["peer_settings"]):
        assert sys.platform != "linux" or settings["MALLOC_MMAP_MAX_"] == "0"
    assert found["device"]
    assert found["versions"].keys() >= {"jax", "torch", "monai"}
    assert found["platform"] in ("cpu", "gpu", "tpu")
    assert found["cores"] >= 1


@pytest.mark.slow
def test_the_flops_of_a_step_are_those_of_its_products(beside_torch: tuple[dict, str]):
    row = beside_torch[0]["rows"][0]
    # One convolution by hand, of the many: 3x3x3 kernels, 4 to 4 channels, on 2 tiles of 8x16x16,
    # less the products with padding; forward and both gradients; and fewer than 20 of that size.
    one = 3 * 2 * 2 * 4 * 4 * (3 * 8 - 2) * (3 * 16 - 2) ** 2
    assert one < row["flops"] < 20 * one
    assert 0 < row["share_of_peak"] < 1


@pytest.mark.slow
def test_flops_are_those_that_torch_counts_less_products_with_padding():
    torch = pytest.importorskip("torch")
    counter = importlib.import_module("torch.utils.flop_counter").FlopCounterMode(display=False)
    config = dataclasses.replace(CONFIG, model=smallest.MODEL)
    whole = (16, 32, 48)  # as deep as its bucket: no tile is cut or padded
    joint = job(stage="joint", config=config, scan_size=whole)
    batch = {
        name: torch.from_numpy(x if x.dtype.kind == "f" else x.astype("int64"))
        for name, x in jobs.batch(joint).items()
    }
    reference = importlib.import_module("reference.deepsc")
    steps = reference.train(
        reference.network(config), config, "joint", itertools.repeat(batch), torch.ones(3)
    )
    with counter:
        next(steps)
    ours = works.count_flops(joint)
    share = sum(ours.values()) / counter.get_total_flops()
    assert 0.7 < share < 0.9  # 3x3x3 in 8x16x16 voxels: 0.84; on coarser levels less; 1x1x1: 1


@pytest.mark.slow
def test_ours_reads_what_a_process_before_it_compiled(tmp_path: pathlib.Path):
    found = []
    for _ in range(2):
        started = measure.Worker(placed(tmp_path))
        found.append(started.ready["compile_s"])
        started.close()
    assert any(placed(tmp_path).programs.iterdir())
    assert found[1] < found[0] / 2


def placed(folder: pathlib.Path) -> Job:
    return dataclasses.replace(job(), folder=folder)


def test_a_form_that_is_not_this_devices_is_left_out(tmp_path: pathlib.Path):
    deep = dataclasses.replace(CONFIG.data, tile=(16, 16, 16), slices=16, depth_bucket=16)
    wide = dataclasses.replace(CONFIG, data=deep, platform=PlatformConfig(space=2))
    asked = job(config=wide, side="forms", variant="sliced")
    started = measure.Worker(dataclasses.replace(asked, folder=tmp_path))
    started.close()
    assert started.ready["left_out"].startswith("conv_form is sliced and space is 2")


@pytest.mark.slow
@pytest.mark.parametrize(("peer", "variant"), [("torch", "compiled"), ("forms", "native")])
def test_one_variant_alone(peer: str, variant: str, tmp_path: pathlib.Path):
    file = tmp_path / "rows.json"
    done = benchmark("--work=forward", f"--peer={peer}", f"--variants={variant}", f"--json={file}")
    assert done.returncode == 0, done.stderr
    names = [row["peer"] for row in json.loads(file.read_text())["rows"]]
    assert names == [f"{peer} {variant}"]


@pytest.mark.slow
def test_works_that_read_a_store_make_one(tmp_path: pathlib.Path):
    file = tmp_path / "rows.json"
    done = benchmark(
        "--work=loading,loop",
        "--working_spacing_mm=20,20,20",  # phantoms of several depth buckets
        f"--json={file}",
    )
    assert done.returncode == 0, done.stderr
    loading, loop = json.loads(file.read_text())["rows"]
    assert loading["peer"] is loading["ratio"] is None
    assert (loading["flops"], loading["share_of_peak"]) == (0, None)
    assert loop["flops"] > 0
    for row in (loading, loop):
        assert row["tiles_per_s"] / row["scans_per_s"] > 1


def test_rows_of_pairs_and_of_the_best_variant():
    found = [
        measured(),
        measured("torch", "eager", (8, 8, 8)),
        measured("torch", "compiled", (1, 4, 5), flops={}),
        measured("monai", "eager", (1, 1, 1), flops={"float32": 7}),
    ]
    rows = report.rows(found, 5)
    assert [(row["peer"], row["ratio"]) for row in rows] == [
        ("torch eager", 2 / 8),
        ("torch compiled", 2 / 4),
        ("monai eager", 2.0),
        ("torch, the best of 2", 2 / 4),
    ]
    assert rows[3]["best"] == "compiled"
    assert (rows[0]["ours_min_s"], rows[0]["ours_max_s"]) == (1, 4)
    # Of seconds 2, 1, 4 and 1, 4, 5, round by round.
    assert (rows[1]["ratio_min"], rows[1]["ratio_max"]) == (1 / 4, 2)
    assert rows[1]["peer_flops"] == rows[1]["flops"] == 2.5e9
    assert rows[2]["peer_flops"] == 7
    # 0.5 s for the float32 products and 0.5 s for the others, on each of two chips: 1/2 s of 2.
    assert rows[0]["share_of_peak"] == pytest.approx(0.25)
    assert rows[0]["tflops_per_s"] == pytest.approx(2.5e9 / 2 / 1e12)
    assert rows[0]["ours_peak_mib"] == 2
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    lines = report.table(rows).splitlines()
    assert len({len(line) for line in lines[:5]}) == 1


def test_device_memory_counts_where_it_is_told():
    end = {**measured().end, "device_bytes": 3 * 2**20}
    assert report.rows([measured(end=end)], 5)[0]["ours_peak_mib"] == 3


def test_batches_are_those_of_the_pipeline():
    joint = jobs.batch(job(stage="joint"))
    assert joint["tiles"].shape == joint["lesions"].shape == (2, 4 * 2 * 3, 8, 16, 16)
    assert joint["slices"].shape == (2, 12, 32, 48)
    assert not joint["tiles"][:, joint["origins"][0, :, 0] >= 24].any()  # past the 20 slices
    assert joint["lesions"].sum(axis=(1, 2, 3, 4)).min() > 0
    assert set(joint["label"]) == {0, 1}
    assert jobs.batch(job(stage="segmentation"))["tiles"].shape == (4, 3, 8, 16, 16)
    assert "tiles" not in jobs.batch(job(stage="classification"))


MOVED = dataclasses.replace(CONFIG.train, rotation_degrees=20.0, noise=0.1, gamma=(0.7, 1.5))


@pytest.mark.parametrize("train", [CONFIG.train, MOVED])
@pytest.mark.parametrize("stage", ["segmentation", "classification", "joint"])
def test_what_travels_decodes_to_what_peers_are_given(stage: str, train: TrainConfig):
    made = job(stage=stage, config=dataclasses.replace(CONFIG, train=train))
    sent, seen = jobs.batch(made, travels=True), jobs.batch(made)
    assert "augmentation" in sent
    decoded = decode(sent, made.reads, CONFIG.data, train)
    for name, expected in seen.items():
        # A level of 16 bits; where voxels move, two roundings of a resampled one.
        assert np.abs(np.asarray(decoded[name], np.float64) - expected).max() < 3 / 65535, name


@pytest.mark.parametrize(
    ("work", "stage", "expected"),
    [
        ("train", "segmentation", (4, 12)),
        ("train", "classification", (8, 0)),
        ("train", "joint", (2, 48)),
        ("inference", "joint", (1, 18)),
        ("loading", "segmentation", (4, 12)),
    ],
)
def test_scans_and_tiles_of_a_work(work: Any, stage: str, expected: tuple[int, int]):
    assert jobs.counts(job(work, stage=stage)) == expected


def test_energy_is_the_packages_and_survives_a_wrap(tmp_path: pathlib.Path):
    for name, energy_uj in (("intel-rapl:0", 3e6), ("intel-rapl:0:0", 1e6), ("intel-rapl:1", 2e6)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{energy_uj:.0f}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("10000000\n")
    meter = energy.Meter(tmp_path)
    meter._gpus = []
    assert meter.joules() == 5
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("1000000\n")
    assert meter.joules() == 13
    assert energy.Meter(tmp_path / "nothing")._packages == []


def test_bars_are_judged_against_the_variant_that_is_best_in_them():
    rows = [
        {"peer": "torch eager", "ratio": 0.5, "memory_ratio": 1.2},
        {"peer": "torch compiled", "ratio": 0.9, "memory_ratio": 0.8},
        {"peer": "torch, the best of 2", "ratio": 0.9, "memory_ratio": 0.8},
    ]
    time = bars.judge(bars.BARS["joint"], rows)
    assert (time["against"], time["found"], time["reached"]) == ("torch compiled", 0.9, True)
    memory = bars.judge(bars.BARS["memory_16"], rows)
    assert (memory["against"], memory["found"], memory["reached"]) == ("torch eager", 1.2, False)


# A process each: the rest of them is slow.
BAD_INPUT = [
    (["--work=training"], "--work=training: expected some of train,.*,train_segmentation,"),
    (["--repeats=4"], "--repeats=4: 4 is not integer >= 5"),
    (["--work=loading", "--peer=torch"], "--peer=torch: it has none of --work=loading"),
    (["--peer=torch", "--variants=native"], "--variants=native: give some of eager,"),
    (["--peer=torch", "--variants="], "--variants=: give some of eager,.*, each once"),
    (["--scan_size=8,17,16"], "--scan_size=8,17,16: no tile of 16x16 fits"),
    (["--devices=1,3"], r"--devices=1,3: deepsc\.joint\.batch is 2: give a multiple of 3"),
    (["--devices=1,2", "--peer=torch"], "--devices: scaling tables are of ours alone"),
    (["--variants=eager"], "--variants: they are a peer's"),
    (["--work="], "--work=: give some of train,forward,"),
    (["--json=/proc/none/rows.json"], "--json: /proc/none cannot be written to"),
    (["--first_prediction=a.nii", "--peer=torch"], "--first_prediction: give --checkpoint,"),
    (["--growth=voxels", "--work=forward", "--out=x"], "--work=forward: --growth is of train"),
]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        *BAD_INPUT[:4],
        *(pytest.param(*row, marks=pytest.mark.slow) for row in BAD_INPUT[4:]),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, tmp_path: pathlib.Path):
    done = benchmark(*arguments)
    assert done.returncode in (1, 2)
    (line,) = done.stderr.strip().splitlines()
    assert re.search(said, line), line
    assert not done.stdout


def test_a_batch_that_devices_do_not_divide_is_one_line():
    done = benchmark("--data_devices=4", "--work=forward")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "error: --deepsc.joint.batch=2: the batch is split over"
    )


def test_the_width_of_monais_network_is_the_nearest_in_flops():
    peers = importlib.import_module("deepsc_jax.benchmarking.monai_networks")
    tile = (8, 16, 16)
    one, other = (
        peers.nearest_width(tile, 1, peers._unet_flops(w, tile, True), trains=True) for w in (3, 12)
    )
    assert one[0] == 3
    assert other == (12, peers._unet_flops(12, tile, True))
    below, above = peers._unet_flops(5, tile, False), peers._unet_flops(6, tile, False)
    third = below + (above - below) // 3
    assert peers.nearest_width(tile, 7, 7 * third, trains=False) == (5, 7 * below)


def test_jobs_travel_to_their_process():
    assert pickle.loads(pickle.dumps(job())) == job()
