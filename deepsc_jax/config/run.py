"""Everything that decides what a run computes, in memory and on disk."""

import dataclasses
import json
import pathlib
from collections.abc import Callable

from deepsc_jax.config.data import DataConfig
from deepsc_jax.config.options import ModelOptions, Options, StageOptions, from_document
from deepsc_jax.config.platform import PlatformConfig
from deepsc_jax.config.training import TrainConfig
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import write_json

SHARED: dict[str, type] = {"data": DataConfig, "train": TrainConfig, "platform": PlatformConfig}


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

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.NAME

    def stage(self, name: str) -> StageOptions:
        """The options of the model's stage of that name."""
        return getattr(self.model, name)

    def with_stage(self, stage: str, **changes: object) -> "Config":
        """The same configuration with some options of one stage changed."""
        options = self.model
        changed = dataclasses.replace(getattr(options, stage), **changes)
        return dataclasses.replace(self, model=dataclasses.replace(options, **{stage: changed}))


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
        name = document["model"]
        if not isinstance(name, str):
            raise TypeError("it is of a version before models had names")
        sections = {key: from_document(section, document[key]) for key, section in SHARED.items()}
        return Config(model=from_document(options_of(name), document[name]), **sections)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, OSError, RecursionError) as error:
        raise InputError(
            f"{path}: not a configuration of this version ({error}): give the --workdir of a run "
            "of this version"
        ) from error


def differences(begun: Config, asked: Config) -> list[str]:
    """What is another in `asked`, by flag, the platform apart."""
    if begun.name != asked.name:
        return [f"--model: {begun.name} then, {asked.name} now"]
    rows = []
    for prefix, one, other in (
        ("", begun.data, asked.data),
        ("", begun.train, asked.train),
        (f"{begun.name}.", begun.model, asked.model),
    ):
        rows += _changed(prefix, one, other)
    return sorted(rows)


def _changed(prefix: str, one: Options, other: Options) -> list[str]:
    rows = []
    for field in dataclasses.fields(one):
        then, now = getattr(one, field.name), getattr(other, field.name)
        if dataclasses.is_dataclass(then):
            rows += _changed(f"{prefix}{field.name}.", then, now)
        elif then != now:
            rows.append(f"--{prefix}{field.name}: {then} then, {now} now")
    return rows
