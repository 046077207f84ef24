"""A plan for eight H100, compiled by XLA's CUDA compiler on this machine."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import smallest

from deepsc_jax.config import Config, DataConfig, PlatformConfig, TrainConfig
from deepsc_jax.data import augment, pipeline, store, writing
from deepsc_jax.data.datasets import Case
from deepsc_jax.data.preprocess import Prepared, WorkingGrid
from deepsc_jax.models.deepsc.config import Options
from deepsc_jax.planning.compiled import KINDS, batch_shapes, memory
from deepsc_jax.planning.targets import GIB
from deepsc_jax.runtime import device_mesh
from deepsc_jax.systems.building import stages_of
from deepsc_jax.training.state import State

# Two scanned tiles.
TINY = [
    *smallest.FLAGS,
    "--depth_bucket=16",
    "--depth=13",
]
# In which no activation of a tile is as small as the tiles themselves.
EIGHT_CHANNELS = ("--deepsc.inception_channels=8", "--deepsc.lesion_channels=8,8,8")


def plan(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return run(*TINY, *arguments, **environment)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "deepsc_jax.plan", *arguments]
    ours = {"JAX_PLATFORMS", "JAX_DISABLE_MOST_OPTIMIZATIONS"}  # conftest's, the Makefile's
    users = {k: v for k, v in os.environ.items() if k not in ours} | environment
    return subprocess.run(command, capture_output=True, text=True, check=False, env=users)


# Wheels of XLA's CUDA compiler are published for Linux alone.
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="no CUDA compiler for this system")


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """The row and the printed table of the joint stage on eight H100."""
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    assembler = tmp_path_factory.mktemp("cuda") / "ptxas"  # which no plan needs
    assembler.write_text(f'#!/bin/sh\necho "$*" >>"{assembler}-called"\nexit 1\n')
    assembler.chmod(0o700)
    cache = tmp_path_factory.mktemp("cache")
    done = plan(
        *EIGHT_CHANNELS,
        "--platform=h100",
        "--devices=8",
        "--scans_per_device=2",
        "--accumulation=2",
        "--memory_share=0.9",
        f"--json={file}",
        PATH=f"{assembler.parent}{os.pathsep}{os.environ['PATH']}",
        XDG_CACHE_HOME=str(cache),
    )
    assert done.returncode == 0, done.stderr
    assert not assembler.with_name("ptxas-called").exists()
    assert "Traceback" not in done.stderr  # JAX's, where it looks for the rest of CUDA
    assert not any(cache.iterdir())  # only the machine it was compiled for could read it back
    (row,) = json.loads(file.read_text())["rows"]
    return row, done.stdout


@on_linux
def test_the_joint_step_reduces_its_float32_gradient_once_and_nothing_else(eight):
    (reduction,) = eight[0]["collectives"]
    assert (reduction["kind"], reduction["dtype"]) == ("all-reduce", "f32")
    assert (reduction["count"], reduction["trips"], reduction["in_loop"]) == (1, 1, False)
    gradient = round(eight[0]["per_device_gib"]["parameters"] * GIB)
    scalars = {"loss", "dice", "focal", "lesion_free", "cross_entropy", "task_aware"}
    assert reduction["bytes"] == reduction["largest"] == gradient + 4 * len(scalars)


@on_linux
def test_the_row_has_what_one_device_needs(eight):
    row, _ = eight
    assert (row["platform"], row["devices"], row["space"]) == ("h100", 8, 1)
    memory = row["per_device_gib"]
    assert set(memory) == set(KINDS)
    assert memory["carried"] == 0  # it has no batch norm
    assert all(memory[kind] > 0 for kind in KINDS if kind != "carried")
    # Adam keeps two numbers a parameter, and two counts of steps.
    assert memory["optimizer"] * GIB == pytest.approx(2 * memory["parameters"] * GIB, abs=8)
    # Two scans of 16 bits a voxel, with lesions of 8; origins of two tiles, a depth, a label, and
    # how the scan is changed.
    voxels, numbers = 2 * 8 * 16 * 16, 2 * 3 + 2 + augment.SIZE
    assert round(memory["inputs"] * GIB) == 2 * (3 * voxels + 4 * numbers)
    assert memory["peak"] >= sum(memory[kind] for kind in KINDS[:-1])
    assert row["fits"]
    assert row["flops"] == sum(row["flops_by_kind"].values()) > 0
    assert row["bytes"] > 0
    assert row["step_seconds_bound"] == max(row["seconds_by_reason"].values())
    assert 0.5 < row["scaling_efficiency"] < 1


@on_linux
def test_every_convolution_stays_channel_last(eight):
    layouts = eight[0]["convolution_layouts"]
    assert sum(layouts.values()) > 50
    assert set(layouts) == {"b012f_o012i->b012f"}


@on_linux
def test_every_convolution_is_cudnns_and_in_bfloat16(eight):
    found = eight[0]["program"]
    by, layouts = found["convolutions"], eight[0]["convolution_layouts"]
    total = sum(by.values())
    assert total == sum(layouts.values()) > 50
    assert by["xla"] == 0
    assert min(by[kind] for kind in ("forward", "backward_input", "backward_filter")) > 10
    assert found["channel_last"] == found["bfloat16"] == total
    assert found["dilated"] == found["colliding_scatters"] == 0
    assert found["all_reduces"] == 1


@on_linux
def test_no_activation_is_laid_anew_or_copied_in_the_loop_over_tiles(eight):
    found = eight[0]["program"]
    activation = 8 * 16 * 16 * 8 * 2  # a tile's features in bfloat16; kernels are smaller
    assert 0 < found["relaid"]["largest"] < activation
    # What accumulation takes of the batch, a part's two tiles in float32, is smaller too.
    assert 0 < found["copied"]["largest"] <= 2 * 8 * 16 * 16 * 4 < activation


def table_of_kernels() -> dict[str, dict[str, str]]:
    """A chip's column of the table of kernels in docs/planning.md, by the chip's name."""
    document = (pathlib.Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    section = document.split("\n## Which kernels a step compiles to\n")[1].split("\n## ")[0]
    head, *rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", section, re.MULTILINE)
    return {
        chip: {row[0]: row[column] for row in rows} for column, chip in enumerate(head[1:], start=1)
    }


@on_linux
@pytest.mark.slow
@pytest.mark.scale
@pytest.mark.parametrize(
    ("platform", "column"),
    [
        ("h100", "one H100"),
        pytest.param(
            "v5p",
            "one TPU v5p",
            marks=pytest.mark.skipif(
                not importlib.util.find_spec("libtpu"), reason="needs the extra tpu"
            ),
        ),
    ],
)
def test_the_table_of_kernels_is_what_plan_finds(tmp_path, platform, column):
    file = tmp_path / "plan.json"
    done = run("--flagfile=configs/deepsc.flags", f"--platform={platform}", f"--json={file}")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(file.read_text())["rows"]
    found, by = row["program"], row["program"]["convolutions"]
    total = sum(by.values())

    def moved(kind: str) -> str:
        return f"{found[kind]['bytes'] / 2**20:.0f} ({found[kind]['largest'] / 2**20:.1f})"

    assert table_of_kernels()[column] == {
        "convolutions by cuDNN: forward, of inputs, of kernels": "{}, {}, {}".format(
            *(by[kind] for kind in ("forward", "backward_input", "backward_filter"))
        ),
        "convolutions by XLA: loops on GPU, the matrix unit on TPU": str(by["xla"]),
        "... not channel-last": str(total - found["channel_last"]),
        "... not in bfloat16": str(total - found["bfloat16"]),
        "... with channels not a multiple of 8": str(total - found["channels_multiple_of_8"]),
        "... with holes (dilated)": str(found["dilated"]),
        "scatters that may collide, as of a max-pool's gradient": str(found["colliding_scatters"]),
        "transposed or laid anew, MiB a step (the largest)": moved("relaid"),
        "copied, MiB a step (the largest)": moved("copied"),
    }


@on_linux
def test_the_table_says_the_same_and_what_it_does_not_know(eight):
    row, text = eight
    assert re.search(r"devices \(data x space\) +8 \(8 x 1\)\n", text)
    assert re.search(r"scans in a global batch +16\n", text)
    assert re.search(r"fits +yes, of 71\.2\n", text)
    convolutions = sum(row["convolution_layouts"].values())
    assert re.search(rf"convolutions +{convolutions}\n +left to XLA +0\n", text)
    size = row["collectives"][0]["bytes"]
    assert f"  1 all-reduce of f32: {size} bytes" in text
    assert "cuDNN" in text
    assert "Source: NVIDIA H100 datasheet" in text


@on_linux
@pytest.mark.slow
@pytest.mark.scale
def test_depth_over_space_moves_borders_gradients_and_the_slice_grid_alone(tmp_path):
    file = tmp_path / "plan.json"
    split = ["--tile=16,16,16", "--space=2", "--devices=4", f"--json={file}"]
    done = plan(*split)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["devices"], row["space"]) == (4, 2)
    # Features at full resolution, bfloat16: what must never be whole on a device.
    full = 16 * 16 * 16 * 4 * 2
    # F_c with a border, 8 slices of half the resolution, float32 on the way back.
    slice_grid = 8 * (8 + 2) * (8 + 2) * 4 * 4
    assert slice_grid < full / 2
    gradient = round(row["per_device_gib"]["parameters"] * GIB)
    kinds = {"all-reduce", "all-gather", "reduce-scatter", "collective-permute"}
    for moved in row["collectives"]:
        assert moved["kind"] in kinds
        if moved["kind"] == "all-reduce":
            # Kernels' gradients over space and then over data, statistics of norms and losses.
            assert moved["dtype"] in ("f32", "s32", "pred")
            assert moved["largest"] <= gradient + 4 * 6
            assert moved["bytes"] < 3 * gradient
        elif moved["kind"] == "collective-permute":
            assert moved["largest"] < full  # two slices of 16: a convolution's borders
        else:
            assert moved["largest"] <= slice_grid


@on_linux
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--devices=8,many"], "--devices=many: give whole numbers above 0"),
        (["--devices=9"], "--devices=9: not a whole number of GPUs on each of 2 nodes"),
        (["--data_devices=4"], "--data_devices=4: the data axis is --devices over --space here"),
        (["--platform=v4"], "--platform=v4"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(arguments, said):
    done = plan(*arguments)
    assert done.returncode in (1, 2)
    assert re.fullmatch(f"error: {said}.*\n", done.stderr)


def test_memory_is_one_devices_share_and_leaves_out_what_is_not_read():
    mesh = device_mesh.make_mesh(PlatformConfig(data_devices=4))
    whole, split = device_mesh.replicated(mesh), device_mesh.batch_sharding(mesh)

    def step(state, batch):
        moved = state.carried["batch_stats"]["mean"] + 1
        return state.params["w"] + state.opt_state["mean"], moved, batch["x"] * 2

    ones = np.ones(3, np.float32)
    carried = {"batch_stats": {"mean": np.ones(2, np.float32)}}
    state = State(np.int32(0), {"w": ones}, carried, {"mean": ones}, {})  # type: ignore[arg-type]
    batch = {"x": np.ones((8, 5), np.float32), "label": np.ones(8, np.int32)}
    traced = jax.jit(step, in_shardings=(whole, split)).trace(state, batch)
    found = memory(traced, traced.lower().compile())
    assert (found["parameters"], found["optimizer"], found["inputs"]) == (12, 12, 4 * 2 * 5)
    assert found["carried"] == 8
    assert found["peak"] >= 12 + 12 + 8 + 40


@pytest.fixture(scope="module")
def config_and_store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, store.Store]:
    """One case of 32 slices, all of them lung."""
    config = Config(
        Options(),
        data=DataConfig(working_size=(32, 48), tile=(8, 16, 24), slices=12, depth_bucket=16),
        train=TrainConfig(tiles_per_scan=5),
    )
    folder, shape = tmp_path_factory.mktemp("store"), (32, 32, 48)
    lesion = np.zeros(shape, bool)
    lesion[10, 20, 20] = True
    grid = WorkingGrid(shape, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), shape)
    prepared = Prepared(np.full(shape, 0.5, np.float32), np.ones(shape, bool), lesion, grid)
    case = Case("a", "a", "train", 0, folder / "a.nii.gz", folder / "m.nii.gz")
    records = [writing.write_case(folder, case, prepared)]
    store.write_index(folder, config.data, records, folder)
    return config, store.Store(folder, cache_mib=16)


@pytest.mark.parametrize("stage", stages_of(Config(Options())), ids=lambda stage: stage.name)
def test_the_planned_batch_is_the_one_that_training_reads(config_and_store, stage):
    config, opened = config_and_store
    read = pipeline.batches(
        opened, "train", stage.reads, config, seed=0, batch_size=2, read_threads=0
    )
    batch = next(iter(read))
    planned = batch_shapes(config, stage, scans=2, depth=32)
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        name: (a.shape, a.dtype) for name, a in planned.items()
    }
