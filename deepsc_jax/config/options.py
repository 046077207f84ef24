"""What an option is, what a model's options must offer, and options from JSON."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self

if typing.TYPE_CHECKING:
    from deepsc_jax.config.data import DataConfig
    from deepsc_jax.config.platform import PlatformConfig

Ints3 = tuple[int, int, int]


def option(default: Any, text: str) -> Any:
    """A dataclass field with its default and the help text of its flag."""
    return dataclasses.field(default=default, metadata={"help": text})


def require(condition: bool, reason: str) -> None:
    """Raise ValueError with `reason` unless `condition` holds."""
    if not condition:
        raise ValueError(reason)


class StageOptions(Protocol):
    """The options that every training stage of every model has."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        ...

    @property
    def batch(self) -> int:
        """Scans in a global batch."""
        ...

    @property
    def learning_rate(self) -> float:
        """The initial learning rate."""
        ...


class ModelOptions(Protocol):
    """A model's own options: a frozen dataclass.

    A field that is a dataclass itself holds the options of the training stage of that name. The
    flag of a field is `--NAME.FIELD`, of a stage's `--NAME.STAGE.FIELD`.
    """

    NAME: ClassVar[str]
    TILE_STEP: ClassVar[int]
    """Of which the sides of a tile must be multiples."""

    def widened(self, factor: int) -> Self:
        """The same network with `factor` times its channels."""
        ...

    def check(self, data: "DataConfig", platform: "PlatformConfig") -> None:
        """Refuse what cannot work together.

        Raises:
          ValueError: naming the option.
        """
        ...


def from_document(section: type, document: Mapping[str, Any]) -> Any:
    """A dataclass of options from its JSON object: lists become tuples again.

    Raises:
      KeyError, TypeError, ValueError: a field is missing, unknown or impossible.
    """

    def value(kind: Any, given: Any) -> Any:
        if dataclasses.is_dataclass(kind):
            return from_document(typing.cast(type, kind), given)
        return tuple(value(None, item) for item in given) if isinstance(given, list) else given

    hints = typing.get_type_hints(section)
    missing = sorted({field.name for field in dataclasses.fields(section)} - document.keys())
    if missing:
        raise KeyError(f"{', '.join(missing)} missing")
    return section(**{name: value(hints.get(name), given) for name, given in document.items()})
