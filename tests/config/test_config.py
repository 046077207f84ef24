"""The configuration: its flags, what it refuses, and its way to JSON and back."""

import dataclasses
import functools
import json
import math
import pathlib
import subprocess
import sys
import typing
from typing import Any

import jax
import pytest
from absl import flags

from deepsc_jax import config
from deepsc_jax.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    PlatformConfig,
    TrainConfig,
)
from deepsc_jax.planning.compiled import trace
from deepsc_jax.runtime import device_mesh, entry

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.flags"))
FIELDS = [field for section in config.SECTIONS.values() for field in dataclasses.fields(section)]
ODD = Config(
    data=DataConfig(hu_window=(-1000.5, 400.0), working_size=(96, 64), tile=(8, 32, 64)),
    model=ModelConfig(
        inception_branches=((1,), (3, 3), (1, 5, 3)),
        inception_channels=24,
        cross_stitch=False,
        scale_weights=(0.1, 0.2, 0.3, 0.4),
    ),
    loss=LossConfig(task_aware_weight=0.0, task_aware_scales="single"),
    train=TrainConfig(learning_rate=1e-7, gradient_tiles=3),
    platform=PlatformConfig(data_devices=2, conv_form="native", remat="none"),
)


@pytest.fixture
def parse(monkeypatch):
    """Parse arguments with a fresh set of flags."""

    def run(*arguments: str) -> tuple[Config, flags.FlagValues]:
        values = flags.FlagValues()
        flags.DEFINE_string("flagfile", "", "", flag_values=values)
        monkeypatch.setattr(flags, "FLAGS", values)
        for kind in ("bool", "integer", "float", "enum"):
            define = getattr(flags, f"DEFINE_{kind}")
            bound = _bound(define, values)
            monkeypatch.setattr(flags, f"DEFINE_{kind}", bound)
        monkeypatch.setattr(flags, "DEFINE", _bound(flags.DEFINE, values))
        entry.define_config_flags()
        values(["program", *arguments])
        parsed = entry.config_from_flags()
        monkeypatch.undo()
        return parsed, values

    return run


def _bound(define, values):
    return lambda *arguments, **options: define(*arguments, flag_values=values, **options)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_option_says_where_its_value_comes_from(field):
    assert field.metadata["help"].startswith(("paper: ", "assumed: "))


def test_every_field_is_a_flag_with_its_own_default(parse):
    parsed, values = parse()
    assert parsed == Config()
    assert set(entry.flag_names()) == {field.name for field in FIELDS}
    assert len(FIELDS) == len({field.name for field in FIELDS}), "two sections share a name"
    for field in FIELDS:
        assert field.metadata["help"] in values[field.name].help


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_flag_file_parses(parse, path, monkeypatch):
    monkeypatch.chdir(path.parents[1])
    parsed, _ = parse(f"--flagfile={path}")
    assert isinstance(parsed, Config)


@functools.cache  # configurations of one stage are the full-size one
def traced_step(given: Config, stage: config.Stage) -> Any:
    """The train step on the deepest scans of the full-size plan, by shapes alone."""
    scans = given.train.batch(stage)
    shares = math.gcd(8 // given.platform.space, scans)
    mesh = device_mesh.make_mesh(dataclasses.replace(given.platform, data=shares))
    return trace(given, stage, mesh, scans, depth=304)


QUICK = ("deepsc.flags", "whole_scan.flags")  # tiny.flags are trained with
STEPS = [
    pytest.param(path, id=path.name, marks=() if path.name in QUICK else pytest.mark.slow)
    for path in CONFIGS
]


@pytest.mark.parametrize("stage", config.STAGES)
@pytest.mark.parametrize("path", STEPS)
def test_every_flag_file_makes_a_train_step(parse, path, stage, monkeypatch):
    monkeypatch.chdir(path.parents[1])
    step = traced_step(parse(f"--flagfile={path}")[0], stage)
    ((state, _), _), (after, scalars) = step.in_avals, step.out_info
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, after)]
    assert shapes[0] == shapes[1]
    assert {(x.shape, str(x.dtype)) for x in scalars.values()} == {((), "float32")}


def test_the_full_size_setting_is_the_papers(parse, monkeypatch):
    monkeypatch.chdir(CONFIGS[0].parents[1])
    parsed, _ = parse("--flagfile=configs/deepsc.flags")
    assert parsed.data.hu_window == (-1400, 200)
    assert parsed.data.working_size == (512, 512)
    assert parsed.data.working_spacing_mm == (0, 0, 0)
    assert parsed.model.encoder_channels[0] == 64
    assert parsed.loss.task_aware_weight == 10
    assert (parsed.train.learning_rate, parsed.train.joint_learning_rate) == (1e-3, 1e-4)
    assert (parsed.train.adam_b1, parsed.train.adam_b2) == (0.9, 0.999)


@pytest.mark.parametrize("given", [Config(), ODD], ids=["default", "odd"])
def test_flags_serialise_and_parse_back(parse, given):
    _, values = parse()
    for name in config.SECTIONS:
        for key, value in dataclasses.asdict(getattr(given, name)).items():
            values[key].value = value
    lines = [values[name].serialize() for name in entry.flag_names()]
    assert parse(*lines)[0] == given


def test_nested_tuples_read_as_slashes_and_commas(parse):
    _, values = parse("--deepsc.inception_branches=1/1,3/5,3,1", "--deepsc.inception_channels=24")
    assert values["inception_branches"].value == ((1,), (1, 3), (5, 3, 1))
    assert values["inception_branches"].serialize() == "--deepsc.inception_branches=1/1,3/5,3,1"


@pytest.mark.parametrize("given", [Config(), ODD], ids=["default", "odd"])
def test_json_round_trip(tmp_path, given):
    config.save(given, tmp_path / "config.json")
    assert config.load(tmp_path / "config.json") == given
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_damaged_document_is_refused_by_name(tmp_path):
    path = tmp_path / "config.json"
    config.save(Config(), path)
    whole = json.loads(path.read_text())
    damaged = [
        "{",
        "[]",
        json.dumps({k: v for k, v in whole.items() if k != "loss"}),
        json.dumps(whole | {"data": whole["data"] | {"unheard_of": 1}}),
        json.dumps(
            whole | {"model": {k: v for k, v in whole["model"].items() if k != "inception"}}
        ),
    ]
    for text in damaged:
        path.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            config.load(path)
    path.write_text(json.dumps(whole | {"data": whole["data"] | {"tile": [7, 8, 8]}}))
    with pytest.raises(ValueError, match="multiple of 8"):
        config.load(path)


# Each flag that cannot be, and the words of its reason.
IMPOSSIBLE = [
    (["--hu_window=200,-1400"], "lower bound first"),
    (["--hu_window=5,5"], "lower bound first"),
    (["--working_spacing_mm=0,-1,0"], "working_spacing_mm"),
    (["--tile=60,128,128"], "tile is .*multiple of 8"),
    (["--tile=64,128,100"], "tile is .*multiple of 8"),
    (["--tile=0,128,128"], "tile is .*positive"),
    (["--tile=64,192,128"], "no tile of 192x128 fits .*512x512"),
    (["--working_size=64,64"], "no tile of 128x128 fits .*64x64"),
    (["--working_size=0,0"], "working_size"),
    (["--working_size=-512,-512"], "working_size"),
    (["--slices=0"], "slices is 0"),
    (["--depth_bucket=0"], "depth_bucket is 0"),
    (["--depth_bucket=96"], "depth_bucket is 96.*tile depth 64"),
    (["--deepsc.inception_branches=1/1,2"], "must be odd"),
    (["--deepsc.inception_branches=1/-1"], "must be odd"),
    (["--deepsc.inception_channels=30"], "inception_channels is 30.*4 branches"),
    (["--deepsc.inception_channels=36"], "inception_channels.*norm_groups = 8"),
    (["--deepsc.inception_channels=0"], "inception_channels"),
    (["--deepsc.lesion_channels=8,12,16"], "lesion_channels.*norm_groups = 8"),
    (["--deepsc.classifier_stem_channels=4"], "classifier_stem_channels.*norm_groups = 8"),
    (["--deepsc.encoder_channels=64,128,250"], "encoder_channels.*norm_groups = 8"),
    (["--deepsc.intensity_sd=0"], "intensity_sd is 0.*above 0"),
    (["--deepsc.norm_groups=0"], "norm_groups"),
    (["--deepsc.norm_groups=-8"], "norm_groups"),
    (["--deepsc.task_aware_weight=-1"], "task_aware_weight is -1"),
    (["--deepsc.dice_weight=-0.5"], "dice_weight"),
    (["--deepsc.focal_alpha=1.5"], "focal_alpha is 1.5"),
    (
        ["--deepsc.tversky_alpha=0", "--deepsc.tversky_beta=0"],
        "tversky_alpha and tversky_beta are 0",
    ),
    (["--deepsc.segmentation.steps=0"], "segmentation_steps is 0.*at least 1"),
    (["--deepsc.joint.batch=0"], "joint_batch is 0.*at least 1"),
    (["--log_every=0"], "log_every is 0.*at least 1"),
    (["--seed=-1"], "seed is -1"),
    (["--adam_b1=1"], "adam_b1"),
    (["--adam_b2=1.5"], "adam_b2"),
    (["--learning_rate=nan"], "learning_rate is nan"),
    (["--learning_rate=-0.001"], "learning_rate is -0.001"),
    (["--foreground=1.5"], "foreground is 1.5.*share"),
    (["--flip_probability=2"], "flip_probability is 2.*share"),
    (["--deepsc.gradient_tiles=17"], "gradient_tiles is 17.*16 tiles"),
    (["--data_devices=-1"], "data is -1"),
    (["--space=0"], "space is 0"),
    (["--space=3"], "tile depth is 64: with space = 3 it must be a multiple of 24"),
    (["--space=2", "--slices=33"], "slices is 33: give a multiple of space = 2"),
    (
        ["--space=8", "--slices=8", "--deepsc.inception_branches=1/5"],
        "kernels reach 2.*at least 16",
    ),
    (["--space=2", "--conv_form=folded"], "conv_form is folded and space is 2"),
    (["--space=2", "--conv_form=sliced"], "conv_form is sliced and space is 2"),
    (["--space=2", "--conv_form=direct"], "conv_form is direct and space is 2"),
    (["--accumulation=0"], "accumulation is 0"),
]
MALFORMED = [
    (["--tile=64,128"], "tile.*2 values found, 3 expected"),
    (["--tile=a,b,c"], "tile"),
    (["--deepsc.inception_branches=1//3"], "inception_branches"),
    (["--deepsc.inception_branches="], "inception_branches"),
    (["--intensity=ct"], "intensity.*hu"),
    (["--inception=resnet"], "inception.*plain"),
    (["--compute_dtype=float16"], "compute_dtype"),
    (["--slices=many"], "slices"),
    (["--no_such_option=1"], "no_such_option"),
]


@pytest.mark.parametrize(("arguments", "reason"), IMPOSSIBLE, ids=lambda x: str(x)[:40])
def test_impossible_settings_are_refused_with_the_reason(parse, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        parse(*arguments)


@pytest.mark.parametrize(("arguments", "reason"), MALFORMED, ids=lambda x: str(x)[:40])
def test_malformed_flags_are_refused_by_name(parse, arguments, reason):
    with pytest.raises(flags.Error, match=reason):
        parse(*arguments)


def test_depth_buckets_and_tile_counts():
    data = DataConfig(working_size=(256, 384), tile=(16, 128, 128), depth_bucket=32)
    assert [data.bucket(depth) for depth in (1, 32, 33, 300)] == [32, 32, 64, 320]
    assert data.tile_counts(33) == (3, 2, 3)
    assert data.tile_counts(32) == (2, 2, 3)


def test_stages_read_their_own_steps_and_batch():
    train = TrainConfig(segmentation_steps=1, classification_steps=2, joint_steps=3, joint_batch=5)
    assert [train.steps(stage) for stage in config.STAGES] == [1, 2, 3]
    assert train.batch("joint") == 5
    assert typing.get_args(config.Stage) == config.STAGES


PROGRAM = """
from deepsc_jax import config
from deepsc_jax.runtime import entry
from deepsc_jax.runtime.errors import InputError
entry.define_config_flags()
def main():
    settings = entry.config_from_flags()
    if settings.train.seed == 13:
        raise InputError("case_013: no luck: give another seed")
    print(settings.data.slices)
    return 3 if settings.train.seed == 3 else None
entry.run(main)
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--tile=60,128,128"], 2, "error: tile is (60, 128, 128): each side"),
        (["--slices=many"], 2, "error: flag --slices=many"),
        (["--unheard_of=1"], 2, "error: Unknown command line flag 'unheard_of'"),
        (["slices=3"], 2, "error: unexpected argument 'slices=3'"),
        (["--flagfile=missing.flags"], 2, "error: "),
        (["--seed=13"], 1, "error: case_013: no luck: give another seed"),
    ],
)
def test_a_program_says_in_one_line_what_is_wrong(arguments, code, line):
    result = run(*arguments)
    assert result.returncode == code
    assert result.stdout == ""
    (said,) = result.stderr.splitlines()
    assert said.startswith(line)


def test_a_program_exits_with_what_its_main_returns():
    results = [run("--slices=5"), run("--seed=3", "--slices=6")]
    assert [(r.returncode, r.stdout, r.stderr) for r in results] == [(0, "5\n", ""), (3, "6\n", "")]
