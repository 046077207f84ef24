"""One absl flag for every option, and the configuration that they describe.

Shared options are flat, `--tile`; a model's carry its name, `--deepsc.joint.steps`. The model's
own are defined once `--model` is known, which may stand in a flag file.
"""

import dataclasses
import pathlib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, TypeVar

from absl import flags

from deepsc_jax.config.options import Annotation, Options
from deepsc_jax.config.run import SHARED, Config
from deepsc_jax.runtime import usage
from deepsc_jax.runtime.types import Untyped

# Of a checkout, and of an installed package: both have them beside or below `deepsc_jax`.
_PACKAGE = pathlib.Path(__file__).parents[1]
SHIPPED = (_PACKAGE.parent / "configs", _PACKAGE / "configs")

Section = TypeVar("Section")
MOST = 2**31 - 1  # of an option that is a whole number: what devices count with


def define_shared() -> None:
    """Define a flag for every option that is no model's."""
    for section in SHARED.values():
        _define(section, "")


def section(kind: type[Section]) -> Section:
    """The options of a shared section, `DataConfig` and the like, as the flags have them."""
    return _read(kind, "")


class ConfigFlags:
    """The flags of the configuration of a run of one of several models.

    Args:
      models: the class of each model's options, by name; called where it is needed.
      default: the model where `--model` is not given.
    """

    def __init__(self, models: Mapping[str, Callable[[], type]], default: str):
        self._models, self._default = models, default

    def define(self) -> None:
        """Define the shared flags, and `--model`."""
        define_shared()
        flags.DEFINE_enum("model", self._default, list(self._models), "The network to train.")

    def parse(self, argv: Sequence[str]) -> list[str]:
        """Define the flags of the model that `argv` names, parse all, and check them together.

        Returns:
          What is no flag.

        Raises:
          flags.Error, ValueError: in one line, what is wrong with which flag.
        """
        given, argv = argv, expanded(argv)
        name = last_value(argv, "model") or self._default
        wants_help = any(text in usage.HELP for text in argv[1:])
        if name not in self._models:
            raise flags.Error(f"--model={name}: expected one of {', '.join(self._models)}")
        for model in self._models if wants_help else [name]:
            _define(self._models[model](), f"{model}.")
        if wants_help:
            flags.FLAGS["model"].help = self._described()
        try:
            rest = flags.FLAGS(argv)
        except flags.UnrecognizedFlagError as error:
            owner = error.flagname.removeprefix("no").partition(".")[0]
            if owner in self._models and owner != name:
                raise flags.Error(_of_another(error.flagname, owner, name, given)) from error
            raise
        self.config()
        return rest

    def _described(self) -> str:
        """What `--model` is, with every model's stages in their order."""
        stages = {
            name: [field.name for field in dataclasses.fields(options()) if _is_stage(field)]
            for name, options in self._models.items()
        }
        return "The network to train, and its stages: " + "; ".join(
            f"{name}: {', '.join(names)}" for name, names in stages.items()
        )

    def config(self) -> Config:
        """The configuration that the parsed flags describe.

        Raises:
          ValueError: its options cannot work together.
        """
        name = flags.FLAGS.model
        sections = {key: _read(section, "") for key, section in SHARED.items()}
        return Config(model=_read(self._models[name](), f"{name}."), **sections)

    def flags(self, config: Config) -> list[str]:
        """The flags that describe `config`, as a command takes them."""
        given = [f"--model={config.name}"]
        for section, prefix in (
            *((getattr(config, key), "") for key in SHARED),
            (config.model, f"{config.name}."),
        ):
            for name, kind, value in _options(section, prefix):
                given.append(f"--{name}={_text(kind, value)}")
        return given


def changed() -> dict[str, object]:
    """The options that have another value than their default, by flag."""
    return {
        flag.name: flag.value
        for module, defined in flags.FLAGS.flags_by_module_dict().items()
        if module.startswith(("deepsc_jax.config.", "deepsc_jax.models."))
        for flag in defined
        if flag.value != flag.default
    }


def without_models(models: Sequence[str], argv: Sequence[str]) -> list[str]:
    """Parse flags as a command does that has no use for a network; those of models pass by.

    Raises:
      flags.Error, ValueError: in one line, what is wrong with which flag.
    """
    kept, passed = [], False
    for text in expanded(argv):
        name = text.lstrip("-").removeprefix("no") if text.startswith("-") else ""
        if passed and not text.startswith("-"):  # the value of `--model x`
            passed = False
            continue
        of_model = name.partition("=")[0].partition(".")[0] in ("model", *models)
        passed = of_model and "=" not in text
        if not of_model:
            kept.append(text)
    rest = flags.FLAGS(kept)
    for kind in SHARED.values():
        section(kind)  # refuses what is impossible
    return rest


def expanded(argv: Sequence[str]) -> list[str]:
    """`argv` with the lines of `--flagfile=FILE` in its place, and of those that it names.

    `configs/NAME` that is not there names the file of that name that comes with the package.

    Raises:
      flags.Error: a file cannot be read, or names itself.
    """
    return [argv[0], *_expanded(argv[1:], ())]


def _expanded(texts: Sequence[str], within: tuple[pathlib.Path, ...]) -> Iterator[str]:
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in ("--flagfile", "-flagfile"):
            yield text
            continue
        if not equals:
            raise flags.Error("--flagfile: no file is given, expected --flagfile=FILE")
        path = _found(pathlib.Path(value).expanduser())
        if path in within:
            raise flags.Error(f"--flagfile={value}: the file names itself: take that line out")
        try:
            lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise flags.Error(f"--flagfile={value}: {reason}: {_shipped(value)}") from error
        lines = [line for line in lines if line and not line.startswith(("#", "//"))]
        yield from _expanded(lines, (*within, path))


def _of_another(flag: str, owner: str, name: str, argv: Sequence[str]) -> str:
    """What is wrong with a flag of model `owner` where `name` is chosen, and where it stands."""
    named = [text.lstrip("-").partition("=") for text in argv[1:]]
    for file in [value for option, _, value in named if option == "flagfile"]:
        lines = _expanded([f"--flagfile={file}"], ())
        if any(line.lstrip("-").partition("=")[0] == flag for line in lines):
            right = f"configs/{name}.flags"
            instead = f", such as {right}" if _found(pathlib.Path(right)).exists() else ""
            return (
                f"--flagfile={file}: has --{flag}, a flag of --model={owner}, and this is "
                f"--model={name}: take a flag file of {name}{instead}, or choose --model={owner}"
            )
    return (
        f"--{flag}: a flag of --model={owner}, and this is --model={name}: leave it out, or choose "
        "that model"
    )


def _shipped(value: str) -> str:
    """For a file below `configs` that is not there: those that come with the package."""
    if pathlib.Path(value).parts[:1] != ("configs",):
        return "check the path"
    names = sorted({path.name for folder in SHIPPED for path in folder.glob("*.flags")})
    return f"expected one of {', '.join(names)} in configs"


def _found(path: pathlib.Path) -> pathlib.Path:
    if not path.exists() and path.parts[:1] == ("configs",):
        shipped = [folder.joinpath(*path.parts[1:]) for folder in SHIPPED]
        path = next((file for file in shipped if file.is_file()), path)
    return path


def last_value(argv: Sequence[str], flag: str) -> str | None:
    """What `argv`, expanded, gives a flag last; None where it does not."""
    last = None
    for text, after in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = text.partition("=")
        if name in (f"--{flag}", f"-{flag}"):
            last = value if equals else after
    return last


def _fields(section: type, prefix: str) -> Iterator[tuple[str, Annotation, dataclasses.Field]]:
    """The name of the flag, the type, and the field of every option; stages' included."""
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            stage = typing.cast(type, kind)
            default = _default(field)
            for name, inner, option in _fields(stage, f"{prefix}{field.name}."):
                changed = dataclasses.field(
                    default=getattr(default, option.name), metadata=option.metadata
                )
                changed.name = option.name
                yield name, inner, changed
        else:
            yield f"{prefix}{field.name}", kind, field


def _is_stage(field: dataclasses.Field) -> bool:
    return field.default_factory is not dataclasses.MISSING


def _default(field: dataclasses.Field) -> Options:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _options(section: Options, prefix: str) -> Iterator[tuple[str, Annotation, object]]:
    """The name of the flag, the type and the value of every option."""
    hints = typing.get_type_hints(type(section))
    for field in dataclasses.fields(section):
        value, kind = getattr(section, field.name), hints[field.name]
        if dataclasses.is_dataclass(value):
            yield from _options(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", kind, value


def _read(section: type, prefix: str) -> Options:
    """The options of `section` as the flags have them."""
    hints = typing.get_type_hints(section)
    values = {}
    for field in dataclasses.fields(section):
        kind, name = hints[field.name], f"{prefix}{field.name}"
        if dataclasses.is_dataclass(kind):
            values[field.name] = _read(typing.cast(type, kind), f"{name}.")
        else:
            values[field.name] = flags.FLAGS[name].value
    try:
        return section(**values)
    except ValueError as error:  # which names a field, not whose
        raise ValueError(f"{prefix}{error}") from error


def _define(section: type, prefix: str) -> None:
    where: dict[str, Untyped] = {"module_name": section.__module__}  # as --helpfull groups them
    for name, kind, field in _fields(section, prefix):
        if name in flags.FLAGS:
            continue
        default: Untyped = field.default
        text = field.metadata["help"]
        if kind is bool:
            flags.DEFINE_bool(name, default, text, **where)
        elif kind is int:
            flags.DEFINE_integer(name, default, text, upper_bound=MOST, **where)
        elif kind is str:
            flags.DEFINE_string(name, default, text, **where)
        elif kind is float:
            flags.DEFINE_float(name, default, text, **where)
        elif typing.get_origin(kind) is Literal:
            flags.DEFINE_enum(name, default, list(typing.get_args(kind)), text, **where)
        else:
            parser, serializer = _TupleParser(kind), _TupleSerializer()
            flags.DEFINE(parser, name, default, text, flags.FLAGS, serializer, **where)


def _text(kind: Annotation, value: object) -> str:
    if kind is bool:
        return "true" if value else "false"
    return _TupleSerializer().serialize(value) if isinstance(value, tuple) else str(value)


class _TupleParser(flags.ArgumentParser):
    """Values with commas between them, a fixed count or any; nested tuples have slashes."""

    def __init__(self, kind: Annotation):
        super().__init__()
        self.items = typing.get_args(kind)
        self.nested = typing.get_origin(self.items[0]) is tuple
        self.item = typing.get_args(self.items[0])[0] if self.nested else self.items[0]
        self.syntactic_help = "values with commas between them"

    def parse(self, argument: str | tuple) -> tuple:
        if isinstance(argument, tuple):
            return argument
        if self.nested:
            return tuple(self._values(part) for part in argument.split("/"))
        if not argument and (self.item is str or typing.get_origin(self.item) is Literal):
            return ()
        values = self._values(argument)
        if self.items[-1] is not Ellipsis and len(values) != len(self.items):
            raise ValueError(f"{len(values)} values found, {len(self.items)} expected")
        return values

    def _values(self, text: str) -> tuple:
        return tuple(self._value(part) for part in text.split(","))

    def _value(self, text: str) -> object:
        if typing.get_origin(self.item) is not Literal:
            return self.item(text)
        if text not in typing.get_args(self.item):
            raise ValueError(
                f"{text!r} found, some of {','.join(typing.get_args(self.item))} expected"
            )
        return text

    def flag_type(self) -> str:
        return "tuple"


class _TupleSerializer(flags.ArgumentSerializer):
    def serialize(self, value: tuple) -> str:
        nested = value and isinstance(value[0], tuple)
        parts = ["/".join(",".join(map(str, v)) for v in value)] if nested else map(str, value)
        return ",".join(parts)
