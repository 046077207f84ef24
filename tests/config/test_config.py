"""The configuration: its flags, what it refuses, and its way to JSON and back."""

import dataclasses
import functools
import json
import math
import subprocess
import sys
from typing import Any

import jax
import pytest
from absl import flags
from fresh_flags import CONFIGS, REPOSITORY, parse

from deepsc_jax.config import Config, DataConfig, PlatformConfig, TrainConfig
from deepsc_jax.config.run import OF_MASKED_SCANS, differences, load, save
from deepsc_jax.models import registry
from deepsc_jax.models.deepsc.config import JointTraining, Options, PreTraining
from deepsc_jax.models.qchc_unet import config as qchc_unet
from deepsc_jax.planning.compiled import trace
from deepsc_jax.runtime import device_mesh
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.systems.building import build, stages_of

STAGES = ("segmentation", "classification", "joint")
DEFAULT = Config(Options())
ODD = Config(
    data=DataConfig(
        hu_window=(-1000.5, 400.0),
        working_size=(96, 64),
        tile=(8, 32, 64),
        classes=("healthy", "cap"),
        lesion_free="healthy",
    ),
    model=Options(
        inception_branches=((1,), (3, 3), (1, 5, 3)),
        inception_channels=24,
        cross_stitch=False,
        scale_weights=(0.1, 0.2, 0.3, 0.4),
        task_aware_weight=0.0,
        task_aware_scales="single",
        gradient_tiles=3,
        segmentation=PreTraining(steps=7),
        joint=JointTraining(learning_rate=1e-7),
    ),
    train=TrainConfig(seed=5),
    platform=PlatformConfig(data_devices=2, conv_form="native", remat="none"),
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_flag_file_parses(path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    parsed, _ = parse(f"--flagfile={path}")
    assert isinstance(parsed, Config)


@functools.cache  # configurations of one stage are the full-size one
def traced_step(given: Config, stage: str) -> Any:
    """The train step on the deepest scans of the full-size plan, by shapes alone."""
    scans = given.stage(stage).batch
    shares = math.gcd(8 // given.platform.space, scans)
    mesh = device_mesh.make_mesh(dataclasses.replace(given.platform, data_devices=shares))
    return trace(build(given, "cpu"), stage, mesh, scans, depth=304)


QUICK = ("deepsc.flags", "whole_scan.flags")  # tiny.flags are trained with
STEPS = [
    pytest.param(path, id=path.name, marks=() if path.name in QUICK else pytest.mark.slow)
    for path in CONFIGS
]


@pytest.mark.parametrize("path", STEPS)
def test_every_flag_file_makes_a_train_step(path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    given, _ = parse(f"--flagfile={path}")
    for stage in stages_of(given):
        step = traced_step(given, stage.name)
        ((state, _, _), _), (after, scalars) = step.in_avals, step.out_info
        shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, after)]
        assert shapes[0] == shapes[1]
        assert {(x.shape, str(x.dtype)) for x in scalars.values()} == {((), "float32")}


def test_the_full_size_setting_is_the_papers(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    parsed, _ = parse("--flagfile=configs/deepsc.flags")
    assert parsed.data.hu_window == (-1400, 200)
    assert parsed.data.working_size == (512, 512)
    assert parsed.data.working_spacing_mm == (0, 0, 0)
    assert isinstance(parsed.model, Options)
    assert parsed.model.encoder_channels[0] == 64
    assert parsed.model.task_aware_weight == 10
    assert [parsed.stage(name).learning_rate for name in STAGES] == [1e-3, 1e-3, 1e-4]
    assert (parsed.train.adam_b1, parsed.train.adam_b2) == (0.9, 0.999)


@pytest.mark.parametrize("given", [DEFAULT, ODD], ids=["default", "odd"])
def test_json_round_trip(tmp_path, given):
    save(given, tmp_path / "config.json")
    assert load(tmp_path / "config.json", registry.options) == given
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def without(document: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name != key}


@pytest.fixture
def refused(tmp_path):
    """The line that refuses a config.json that holds this text."""

    def load_text(text: str) -> str:
        path = tmp_path / "config.json"
        path.write_text(text)
        with pytest.raises(InputError) as error:
            load(path, registry.options)
        (line,) = str(error.value).splitlines()
        assert line.startswith(f"{path}: ")
        return line.removeprefix(f"{path}: ")

    return load_text


@pytest.fixture
def document(tmp_path):
    """What `save` writes of the default configuration."""
    save(DEFAULT, tmp_path / "default.json")
    return json.loads((tmp_path / "default.json").read_text())


def test_a_damaged_document_is_refused_by_name(refused, document):
    model, data = document["deepsc"], document["data"]
    assert "not a run's configuration" in refused("{")
    assert "not a run's configuration" in refused("[]")
    assert "train missing" in refused(json.dumps(without(document, "train")))
    assert "unheard_of is no option" in refused(
        json.dumps(document | {"data": data | {"unheard_of": 1}})
    )
    assert "inception missing" in refused(
        json.dumps(document | {"deepsc": without(model, "inception")})
    )
    assert "steps missing" in refused(
        json.dumps(document | {"deepsc": model | {"joint": without(model["joint"], "steps")}})
    )
    assert "multiple of 8" in refused(
        json.dumps(document | {"data": data | {"tile": [4, 128, 128]}})
    )


def test_a_document_of_a_version_before_is_refused_in_one_line(refused, document):
    # As it was written before models had names: their options and the losses' as sections.
    before = without(document, "deepsc") | {"model": document["deepsc"], "loss": {}}
    fewer = document | {"train": without(document["train"], "batch_norm")}
    reasons = [
        (before, "models without names"),
        (without(document, "model"), "model missing"),
        (fewer, "batch_norm missing"),
    ]
    for written, reason in reasons:
        assert refused(json.dumps(written)) == (
            f"a run of another version of deepsc_jax ({reason}): use the version that wrote it, or "
            "train anew in another --workdir"
        )


def test_a_document_of_an_unknown_model_lists_those_there_are(refused, document):
    line = refused(json.dumps(document | {"model": "resnet9"}))
    assert line == f"model 'resnet9' is unknown: expected one of {', '.join(registry.MODELS)}"


def test_differences_are_named_by_flag():
    other = dataclasses.replace(DEFAULT.with_stage("joint", batch=2), train=TrainConfig(seed=1))
    assert differences(DEFAULT, other) == {
        "deepsc.joint.batch": "--deepsc.joint.batch: 4 then, 2 now",
        "seed": "--seed: 0 then, 1 now",
    }
    elsewhere = dataclasses.replace(DEFAULT, platform=PlatformConfig(data_devices=2))
    assert differences(DEFAULT, elsewhere) == {}


# Each flag that cannot be, and the words of its reason.
IMPOSSIBLE = [
    (["--hu_window=200,-1400"], "lower bound first"),
    (["--hu_window=5,5"], "lower bound first"),
    (["--lung_level_hu=300"], "lung_level_hu is 300, outside of hu_window"),
    (["--lung_level_hu=-860", "--intensity=unit"], "intensity is unit: give 0, or --mask=lungs"),
    (["--working_spacing_mm=0,-1,0"], "working_spacing_mm"),
    (["--tile=60,128,128"], "depth_bucket is 64.*tile depth 60"),
    (["--tile=60,128,128", "--depth_bucket=60"], "tile is .*multiple of 8"),
    (["--tile=64,128,100"], "no tile of 128x100 fits .*512x512"),
    (["--tile=64,128,100", "--working_size=512,500"], "tile is .*multiple of 8"),
    (["--tile=0,128,128"], "tile is .*above 0"),
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
    (["--intensity_sd=0"], "intensity_sd is 0.*above 0"),
    (["--deepsc.norm_groups=0"], "norm_groups"),
    (["--deepsc.norm_groups=-8"], "norm_groups"),
    (["--deepsc.task_aware_weight=-1"], "task_aware_weight is -1"),
    (["--deepsc.dice_weight=-0.5"], "dice_weight"),
    (["--deepsc.focal_alpha=1.5"], "focal_alpha is 1.5"),
    (
        ["--deepsc.tversky_alpha=0", "--deepsc.tversky_beta=0"],
        "tversky_alpha and tversky_beta are 0",
    ),
    (["--deepsc.segmentation.steps=0"], r"deepsc\.segmentation\.steps is 0.*at least 1"),
    (["--deepsc.joint.batch=0"], r"deepsc\.joint\.batch is 0.*at least 1"),
    (["--log_every=0"], "log_every is 0.*at least 1"),
    (["--seed=-1"], "seed is -1"),
    (["--adam_b1=1"], "adam_b1"),
    (["--adam_b2=1.5"], "adam_b2"),
    (["--deepsc.segmentation.learning_rate=nan"], r"segmentation\.learning_rate is nan"),
    (["--deepsc.joint.learning_rate=-0.001"], r"joint\.learning_rate is -0.001"),
    (["--foreground=1.5"], "foreground is 1.5.*share"),
    (["--flip_probability=2"], "flip_probability is 2.*share"),
    (["--deepsc.gradient_tiles=17"], "gradient_tiles is 17.*16 tiles"),
    (["--data_devices=-1"], "data_devices is -1"),
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
    (["--deepsc.inception=resnet"], "inception.*plain"),
    (["--compute_dtype=float16"], "compute_dtype"),
    (["--slices=many"], "slices"),
    (["--no_such_option=1"], "no_such_option"),
]


@pytest.mark.parametrize(("arguments", "reason"), IMPOSSIBLE, ids=lambda x: str(x)[:40])
def test_impossible_settings_are_refused_with_the_reason(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        parse(*arguments)


@pytest.mark.parametrize(("arguments", "reason"), MALFORMED, ids=lambda x: str(x)[:40])
def test_malformed_flags_are_refused_by_name(arguments, reason):
    with pytest.raises(flags.Error, match=reason):
        parse(*arguments)


def test_depth_buckets_and_tile_counts():
    data = DataConfig(working_size=(256, 384), tile=(16, 128, 128), depth_bucket=32)
    assert [data.bucket(depth) for depth in (1, 32, 33, 300)] == [32, 32, 64, 320]
    assert data.tile_counts(33) == (3, 2, 3)
    assert data.tile_counts(32) == (2, 2, 3)


def test_stages_read_their_own_steps_and_batch():
    options = Options(
        segmentation=PreTraining(steps=1),
        classification=PreTraining(steps=2),
        joint=JointTraining(steps=3, batch=5),
    )
    given = Config(options)
    assert [stage.name for stage in stages_of(given)] == list(STAGES)
    assert [stage.steps for stage in stages_of(given)] == [1, 2, 3]
    assert [given.stage(name).steps for name in STAGES] == [1, 2, 3]
    assert stages_of(given, "joint")[0].batch == given.stage("joint").batch == 5
    changed = given.with_stage("joint", batch=6)
    assert [changed.stage(name).batch for name in STAGES] == [8, 8, 6]


PROGRAM = """
from deepsc_jax.models import registry
from deepsc_jax.runtime import entry
from deepsc_jax.runtime.errors import InputError
CONFIG = registry.config_flags()
def main():
    settings = CONFIG.config()
    if settings.train.seed == 13:
        raise InputError("case_013: no luck: give another seed")
    print(settings.data.slices)
    return 3 if settings.train.seed == 3 else None
entry.run(main, CONFIG.define, CONFIG.parse, computes=False)
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--tile=4,128,128"], 2, "error: tile is (4, 128, 128): each side"),
        (["--slices=many"], 2, "error: --slices=many"),
        (["--unheard_of=1"], 2, "error: --unheard_of: no such flag"),
        (["--model=unheard_of"], 2, "error: --model=unheard_of: expected one of deepsc, "),
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


@pytest.mark.parametrize("name", OF_MASKED_SCANS)
def test_changes_of_masked_scans_are_refused_for_others(name):
    options = qchc_unet.Options()
    data = DataConfig(mask="none", tile=(80, 160, 160), working_size=(160, 160), depth_bucket=80)
    Config(options, data)
    with pytest.raises(ValueError, match=f"mask is none and {name} is not 0"):
        Config(options, data, dataclasses.replace(TrainConfig(), **{name: 0.5}))


def test_a_factor_of_z_scores_is_refused_for_masked_scans():
    with pytest.raises(ValueError, match=r"mask is lungs and brightness is 0\.5,2"):
        Config(Options(), train=TrainConfig(brightness=(0.5, 2.0)))


@pytest.mark.parametrize("asked", [{"warmup_steps": 3}, {"rate_batch": 4}, {"schedule": "cosine"}])
def test_what_a_plateau_would_leave_out_is_refused(asked):
    data = DataConfig(mask="none", tile=(80, 160, 160), working_size=(160, 160), depth_bucket=80)
    with pytest.raises(ValueError, match=f"{next(iter(asked))} is given, and the learning rate of"):
        Config(qchc_unet.Options(), data, dataclasses.replace(TrainConfig(), **asked))
