"""What an option is, what a model's options must offer, and options from JSON."""

import dataclasses
import sys
import typing
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar

from deepsc_jax.runtime.types import JsonValue

if typing.TYPE_CHECKING:
    from deepsc_jax.config.data import DataConfig
    from deepsc_jax.config.platform import PlatformConfig

Ints3 = tuple[int, int, int]
Value = TypeVar("Value")
Annotation = Any  # of a field: a class, a `Literal`, a tuple of them
Options = Any  # an object of a dataclass of options


def option(default: Value, text: str) -> Value:
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

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]
    NAME: ClassVar[str]

    @property
    def tile_step(self) -> int:
        """Of which the sides of a tile must be multiples."""
        ...

    def widened(self, factor: int) -> Self:
        """The same network with `factor` times its channels."""
        ...

    def check(self, data: "DataConfig", platform: "PlatformConfig") -> None:
        """Refuse what cannot work together.

        Raises:
          ValueError: naming the option.
        """
        ...


def from_document(section: type, document: JsonValue) -> Options:
    """A dataclass of options from its JSON object: lists become tuples again.

    Raises:
      KeyError, TypeError, ValueError: a field is missing, unknown, impossible, or not of its type.
    """
    if not isinstance(document, dict):
        raise TypeError(f"{document!r:.40} found, the options of {section.__name__} expected")
    hints = typing.get_type_hints(section)
    names = {field.name for field in dataclasses.fields(section)}
    for name in sorted(names ^ document.keys()):
        raise KeyError(f"{name} missing" if name in names else f"{name} is no option of this one")
    return section(**{name: _value(name, hints[name], document[name]) for name in names})


def _value(name: str, kind: Annotation, given: JsonValue) -> object:
    """What JSON has for an option of that type."""
    if dataclasses.is_dataclass(kind):
        return from_document(typing.cast(type, kind), given)
    items = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and isinstance(given, list):
        kinds = items[:1] * len(given) if items[1:] == (...,) else items
        if len(kinds) == len(given):
            return tuple(_value(name, k, item) for k, item in zip(kinds, given, strict=True))
    elif typing.get_origin(kind) is Literal:
        if isinstance(given, str) and given in items:
            return given
    elif kind is float:
        if type(given) in (int, float) and abs(given) <= sys.float_info.max:
            return given
    elif type(given) is kind and (kind is not int or abs(given) < 2**63):
        return given
    raise TypeError(f"{name}: {given!r:.40} found, {getattr(kind, '__name__', kind)} expected")
