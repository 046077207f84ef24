"""The flags of the configuration: one for every option, flag files, and models' own."""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from absl import flags
from fresh_flags import CONFIGS, REPOSITORY, fresh, parse

from deepsc_jax.config import Config, DataConfig, PlatformConfig, StageConfig, TrainConfig, option
from deepsc_jax.config import flags as config_flags
from deepsc_jax.config.flags import ConfigFlags
from deepsc_jax.models import registry
from deepsc_jax.models.deepsc.config import JointTraining, Options, PreTraining

SHARED = (DataConfig, TrainConfig, PlatformConfig)
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
        task_aware_scales="single",
        gradient_tiles=3,
        segmentation=PreTraining(steps=7),
        joint=JointTraining(learning_rate=1e-7),
    ),
    train=TrainConfig(seed=5),
    platform=PlatformConfig(data_devices=2, shard_optimizer=True, remat="none"),
)


@dataclasses.dataclass(frozen=True)
class _Fake:
    """A model with one stage and no limits of its own."""

    TILE_STEP: ClassVar[int] = 1

    channels: int = option(8, "assumed: of all layers")
    warm: bool = option(True, "assumed: whether it is warm")
    only: StageConfig = dataclasses.field(default_factory=StageConfig)

    def widened(self, factor: int) -> typing.Self:
        return dataclasses.replace(self, channels=self.channels * factor)

    def check(self, data: DataConfig, platform: PlatformConfig) -> None:
        pass


class Tea(_Fake):
    NAME: ClassVar[str] = "tea"


class Coffee(_Fake):
    NAME: ClassVar[str] = "coffee"


FAKES = ConfigFlags({"tea": lambda: Tea, "coffee": lambda: Coffee}, "tea")


def options_of(section: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """The flag of every option, stages' included, and its field."""
    for field in dataclasses.fields(section):
        if field.default_factory is dataclasses.MISSING:
            yield prefix + field.name, field
        else:
            yield from options_of(type(field.default_factory()), f"{prefix}{field.name}.")


OPTIONS = [
    *(row for section in SHARED for row in options_of(section)),
    *(row for name in registry.MODELS for row in options_of(registry.options(name), f"{name}.")),
]


@pytest.mark.parametrize(("name", "field"), OPTIONS, ids=lambda x: x if isinstance(x, str) else "")
def test_every_option_says_where_its_value_comes_from(name, field):
    assert field.metadata["help"].startswith(("paper: ", "code: ", "assumed: "))


# What a model sees, where that is not the default.
SEEN = {
    "qchc_unet": DataConfig(mask="none"),
    "cnncf": DataConfig(slices=63),
    "cnnrf": DataConfig(
        mask="none", patches="window", indicators=("a", "b"), working_size=(128, 128)
    ),
}


@pytest.mark.parametrize("model", registry.MODELS)
def test_every_option_is_a_flag_with_its_own_default(model):
    data = SEEN.get(model, DataConfig())
    seen = {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}
    given = {
        name: ",".join(map(str, value)) if isinstance(value, tuple) else value
        for name, value in seen.items()
        if value != getattr(DataConfig(), name)
    }
    parsed, values = parse(f"--model={model}", *(f"--{k}={v}" for k, v in given.items()))
    assert parsed == Config(registry.options(model)(), data)
    own = [(n, f) for n, f in OPTIONS if "." not in n or n.startswith(f"{model}.")]
    assert set(values) == {"model", *(name for name, _ in own)}
    assert len(own) == len(dict(own)), "two sections share a name"
    for name, field in own:
        assert field.metadata["help"] in values[name].help


def test_a_stages_flag_carries_the_model_and_the_stage():
    parsed, values = parse("--deepsc.joint.steps=9", "--deepsc.segmentation.batch=3")
    assert [parsed.stage(n).steps for n in ("segmentation", "joint")] == [20000, 9]
    assert [parsed.stage(n).batch for n in ("segmentation", "joint")] == [3, 4]
    # As the model has it, not as stages of all models do.
    assert values["deepsc.joint.batch"].default == 4
    assert values["deepsc.joint.learning_rate"].default == 1e-4


@pytest.mark.parametrize("given", [Config(Options()), ODD], ids=["default", "odd"])
def test_the_flags_of_a_configuration_describe_it(given):
    assert parse(*registry.config_flags().flags(given))[0] == given


def test_flags_serialise_and_parse_back():
    _, values = parse(*registry.config_flags().flags(ODD))
    lines = [values[name].serialize() for name in values]
    assert parse(*lines)[0] == ODD


def test_nested_tuples_read_as_slashes_and_commas():
    parsed, values = parse(
        "--deepsc.inception_branches=1/1,3/5,3,1", "--deepsc.inception_channels=24"
    )
    assert isinstance(parsed.model, Options)
    assert parsed.model.inception_branches == ((1,), (1, 3), (5, 3, 1))
    written = values["deepsc.inception_branches"].serialize()
    assert written == "--deepsc.inception_branches=1/1,3/5,3,1"


@pytest.mark.parametrize("arguments", [["--model=coffee"], ["--model", "coffee"]])
def test_the_chosen_models_flags_are_defined_and_no_others(arguments):
    parsed, values = parse(*arguments, "--coffee.channels=3", "--nocoffee.warm", of=FAKES)
    assert parsed.model == Coffee(channels=3, warm=False)
    assert "tea.channels" not in values
    assert FAKES.flags(parsed)[0] == "--model=coffee"
    assert parse(*FAKES.flags(parsed), of=FAKES)[0] == parsed
    assert parse("--tea.channels=5", of=FAKES)[0].model == Tea(channels=5)


def test_the_model_may_stand_in_a_flag_file_and_the_last_word_counts(tmp_path):
    path = tmp_path / "coffee.flags"
    path.write_text("--model=coffee\n--coffee.only.steps=7\n")
    parsed, _ = parse(f"--flagfile={path}", of=FAKES)
    assert (parsed.name, parsed.stage("only").steps) == ("coffee", 7)
    parsed, _ = parse("--model=tea", f"--flagfile={path}", "--coffee.only.steps=8", of=FAKES)
    assert (parsed.name, parsed.stage("only").steps) == ("coffee", 8)


def test_an_unknown_model_is_refused_with_those_there_are():
    with pytest.raises(flags.Error, match=r"^--model=unknown: expected one of tea, coffee$"):
        parse("--model=unknown", of=FAKES)
    with pytest.raises(flags.Error, match=f"--model=unknown: .*{'.*'.join(registry.MODELS)}"):
        parse("--model=unknown")


@pytest.mark.parametrize("flag", ["coffee.channels=3", "coffee.only.steps=3", "nocoffee.warm"])
def test_another_models_flag_is_refused_naming_the_model_that_has_it(flag):
    with pytest.raises(flags.Error) as error:
        parse("--model=tea", f"--{flag}", of=FAKES)
    assert str(error.value) == (
        f"--{flag.partition('=')[0]}: a flag of --model=coffee, and this is --model=tea: "
        "leave it out, or choose that model"
    )
    with pytest.raises(flags.Error, match=r"Unknown command line flag 'tea\.unheard'"):
        parse("--model=tea", "--tea.unheard=1", of=FAKES)


def test_a_flag_file_of_another_model_is_named_and_one_of_this_model(tmp_path):
    with pytest.raises(flags.Error) as error:
        parse("--flagfile=configs/deepsc.flags", "--model=unet3d")
    assert str(error.value).startswith("--flagfile=configs/deepsc.flags: has --deepsc.")
    assert "take a flag file of unet3d, such as configs/unet3d.flags" in str(error.value)
    path = tmp_path / "mine.flags"
    path.write_text("--slices=5\n--coffee.channels=3\n")
    with pytest.raises(flags.Error) as error:
        parse(f"--flagfile={path}", of=FAKES)
    assert str(error.value) == (
        f"--flagfile={path}: has --coffee.channels, a flag of --model=coffee, and this is "
        "--model=tea: take a flag file of tea, or choose --model=coffee"
    )


def test_a_stage_that_cannot_be_is_named():
    with pytest.raises(ValueError, match=r"^coffee\.only\.batch is 0: it must be at least 1$"):
        parse("--model=coffee", "--coffee.only.batch=0", of=FAKES)
    with pytest.raises(ValueError, match=r"^slices is 0: "):
        parse("--slices=0", of=FAKES)


def test_a_shipped_flag_file_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    at_home, _ = parse("--flagfile=configs/phantom.flags")
    monkeypatch.chdir(tmp_path)
    assert parse("--flagfile=configs/phantom.flags")[0] == at_home
    assert at_home.data.working_size == (40, 56)
    # A file of the user's own of that name comes first.
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "phantom.flags").write_text("--slices=5\n")
    assert parse("--flagfile=configs/phantom.flags")[0].data.slices == 5
    assert parse("--flagfile=configs/tiny.flags")[0].data.slices == 8
    # Only below `configs` is what ships looked for.
    with pytest.raises(flags.Error, match=r"^--flagfile=tiny.flags: No such file"):
        parse("--flagfile=tiny.flags")
    with pytest.raises(flags.Error, match=r"configs/tny.flags: No such file.*, tiny.flags, "):
        parse("--flagfile=configs/tny.flags")


def test_flag_files_name_flag_files_and_later_lines_count(tmp_path):
    inner, outer = tmp_path / "inner.flags", tmp_path / "outer.flags"
    inner.write_text("# a comment\n--slices=5\n\n// another\n--seed=3\n")
    outer.write_text(f"--slices=4\n--flagfile={inner}\n--seed=4\n--flagfile={inner}\n--seed=5\n")
    parsed, _ = parse(f"--flagfile={outer}", "--log_every=2")
    assert (parsed.data.slices, parsed.train.seed, parsed.train.log_every) == (5, 5, 2)
    assert config_flags.expanded(["program", f"-flagfile={inner}", "rest"]) == [
        "program",
        "--slices=5",
        "--seed=3",
        "rest",
    ]


def test_a_flag_file_that_names_itself_is_refused(tmp_path):
    one, other = tmp_path / "one.flags", tmp_path / "other.flags"
    one.write_text(f"--flagfile={other}\n")
    other.write_text(f"--flagfile={one}\n")
    with pytest.raises(flags.Error, match=f"^--flagfile={one}: the file names itself"):
        parse(f"--flagfile={one}")


def test_a_flag_file_that_cannot_be_read_is_refused_in_one_line(tmp_path):
    (tmp_path / "binary.flags").write_bytes(b"\xff\xfe\x00")
    for flag, said in (
        (f"--flagfile={tmp_path}", "Is a directory"),
        (f"--flagfile={tmp_path / 'binary.flags'}", "not a text file"),
        ("--flagfile", "no file is given"),
    ):
        with pytest.raises(flags.Error, match=said) as error:
            parse(flag)
        assert len(str(error.value).splitlines()) == 1


def without_models(*arguments: str, models: tuple[str, ...] = ("tea", "coffee")) -> dict[str, Any]:
    """The shared flags as a command has them that has no use for a network."""
    with pytest.MonkeyPatch.context() as patch:
        values = fresh(patch)
        config_flags.define_shared()
        assert config_flags.without_models(models, ["program", *arguments]) == ["program"]
        return {"data": config_flags.section(DataConfig), **values.flag_values_dict()}


def test_flags_of_models_pass_by_where_no_network_is_needed(tmp_path):
    path = tmp_path / "coffee.flags"
    path.write_text("--model=coffee\n--nocoffee.warm\n--coffee.only.steps=7\n--slices=5\n")
    found = without_models(
        "--model",
        "tea",
        "--seed=3",
        f"--flagfile={path}",
        "--tea.channels",
        "3",
        "--tile=8,64,64",
    )
    assert found["data"] == DataConfig(slices=5, tile=(8, 64, 64))
    assert found["seed"] == 3
    assert "model" not in found
    with pytest.raises(flags.Error, match=r"Unknown command line flag 'milk\.fat'"):
        without_models("--milk.fat=3")
    with pytest.raises(ValueError, match="slices is 0"):
        without_models("--slices=0")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_flag_file_serves_a_command_without_a_network(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = without_models(f"--flagfile={path}", models=tuple(registry.MODELS))
    assert found["data"] == parse(f"--flagfile={path}")[0].data


def test_options_that_were_changed_are_told():
    with pytest.MonkeyPatch.context() as patch:
        fresh(patch)
        of = registry.config_flags()
        of.define()
        flags.DEFINE_string("elsewhere", "", "a flag of no configuration")
        of.parse(["program", "--slices=5", "--deepsc.joint.steps=3", "--seed=0", "--elsewhere=x"])
        assert config_flags.changed() == {"slices": 5, "deepsc.joint.steps": 3}
