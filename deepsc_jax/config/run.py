"""Everything that decides what a run computes, in memory and on disk."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable

from deepsc_jax.config.data import DataConfig
from deepsc_jax.config.options import ModelOptions, Options, StageOptions, from_document, require
from deepsc_jax.config.platform import PlatformConfig
from deepsc_jax.config.training import TrainConfig
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import write_json
from deepsc_jax.runtime.types import JsonValue

SHARED: dict[str, type] = {"data": DataConfig, "train": TrainConfig, "platform": PlatformConfig}


# Options of training that ask what is lung.
OF_MASKED_SCANS = ("blur_mm", "coarse_mm", "lung_rim_mm")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes.

    Attributes:
      model: the options of the model that is trained, which tell the model.
      data: what a scan becomes before it reaches the network.
      train: how it is trained.
      platform: how the computation is laid out.

    Raises:
      ValueError: they cannot work together.
    """

    model: ModelOptions
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    platform: PlatformConfig = dataclasses.field(default_factory=PlatformConfig)

    def __post_init__(self) -> None:
        self.model.check(self.data, self.platform)
        self._check_augmentation()
        self._check_schedule()

    def _check_augmentation(self) -> None:
        """Refuse what needs a lung mask where there is none, and what needs that there is none."""
        asked = [name for name in OF_MASKED_SCANS if getattr(self.train, name)]
        require(
            self.data.mask == "lungs" or not asked,
            f"mask is {self.data.mask} and {', '.join(asked)} is not 0: these changes are for "
            "scans that are masked by their lungs: give 0",
        )
        low, high = self.train.brightness
        require(
            self.data.mask == "none" or low == high == 1,
            f"mask is {self.data.mask} and brightness is {low:g},{high:g}: it is a factor of "
            "z-scores (--mask=none): give intensity_scale",
        )

    def _check_schedule(self) -> None:
        """Refuse what a rate that falls on a plateau would leave out."""
        train = self.train
        asked = [name for name in ("warmup_steps", "rate_batch") if getattr(train, name)]
        asked += ["schedule"] if train.schedule != "linear" else []
        require(
            getattr(self.model, "plateau", None) is None or not asked,
            f"{', '.join(asked)} is given, and the learning rate of {self.name} falls on a plateau "
            "of its loss alone: leave it out",
        )

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.NAME

    def stage(self, name: str) -> StageOptions:
        """The options of the model's stage of that name."""
        return getattr(self.model, section(name))

    def with_stage(self, stage: str, **changes: object) -> "Config":
        """The same configuration with some options of one stage changed."""
        options, name = self.model, section(stage)
        changed = dataclasses.replace(getattr(options, name), **changes)
        return dataclasses.replace(self, model=dataclasses.replace(options, **{name: changed}))

    def stage_flag(self, stage: str, option: str) -> str:
        """The name of the flag of an option of a stage."""
        return f"{self.name}.{section(stage)}.{option}"


def section(stage: str) -> str:
    """The field that has a stage's options: its name, up to a number.

    So stages that differ in their data alone, `teacher1.fold2`, have one set of options, `teacher`.
    """
    return re.sub(r"\d.*", "", stage)


def save(config: Config, path: pathlib.Path) -> None:
    """Write `config` as JSON to `path`: the shared sections, and its own model's."""
    document = {name: dataclasses.asdict(getattr(config, name)) for name in SHARED}
    write_json(
        {"model": config.name, config.name: dataclasses.asdict(config.model)} | document, path
    )


def load(path: pathlib.Path, options_of: Callable[[str], type]) -> Config:
    """Read what `save` wrote.

    Args:
      path: of the file.
      options_of: gives the class of a model's options; an InputError for an unknown one.

    Raises:
      InputError: it cannot be read, or a field is missing, unknown or impossible.
    """
    try:
        document = json.loads(path.read_text("utf-8"))
        name = _section("model", document)
        if not isinstance(name, str):
            raise KeyError("models without names")
        options = from_document(options_of(name), _section(name, document))
        sections = {k: from_document(kind, _section(k, document)) for k, kind in SHARED.items()}
        return Config(model=options, **sections)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except KeyError as error:
        raise InputError(
            f"{path}: a run of another version of deepsc_jax ({error.args[0]}): use the version "
            "that wrote it, or train anew in another --workdir"
        ) from error
    except (TypeError, ValueError, OSError, RecursionError) as error:
        raise InputError(
            f"{path}: not a run's configuration ({error}): copy the whole folder of the run again"
        ) from error


def _section(name: str, document: JsonValue) -> JsonValue:
    if not isinstance(document, dict):
        raise TypeError(f"{document!r:.40} found, an object expected")
    if name not in document:
        raise KeyError(f"{name} missing")
    return document[name]


def differences(begun: Config, asked: Config) -> dict[str, str]:
    """What is another in `asked`, of the same model, in words by flag, the platform apart."""
    rows: dict[str, str] = {}
    for prefix, one, other in (
        ("", begun.data, asked.data),
        ("", begun.train, asked.train),
        (f"{begun.name}.", begun.model, asked.model),
    ):
        rows |= _changed(prefix, one, other)
    return dict(sorted(rows.items()))


def _changed(prefix: str, one: Options, other: Options) -> dict[str, str]:
    rows: dict[str, str] = {}
    for field in dataclasses.fields(one):
        then, now = getattr(one, field.name), getattr(other, field.name)
        flag = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(then):
            rows |= _changed(f"{flag}.", then, now)
        elif then != now:
            rows[flag] = f"--{flag}: {then} then, {now} now"
    return rows
