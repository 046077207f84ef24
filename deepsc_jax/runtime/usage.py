"""How a command is called: its help, and one line about a flag that is wrong."""

import difflib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator

from absl import flags

_MISSING = re.compile(r"Flag --(\S+) must have a value other than None\.?")
_ENUM = re.compile(r"value should be one of <(.*)>")
_FLAGFILE = (
    "--flagfile: Read flags from a file; configs/NAME is one that comes with the package. Later "
    "flags count."
)
HELP = ("--help", "-help", "--helpshort", "--helpfull", "-helpfull", "-h")


def command() -> str:
    """The command that runs, as it is typed: `deepsc train`."""
    spec = sys.modules["__main__"].__spec__
    module = spec.name if spec else ""
    package, _, name = module.partition(".")
    if package != "deepsc_jax" or not name:
        return "deepsc"
    return f"python -m {module}" if "." in name else f"deepsc {name}"


def explained(error: Exception) -> str:
    """In one line: which flag is wrong, and what was expected."""
    if isinstance(error, flags.UnrecognizedFlagError):
        near = [f"--{name}" for name in nearest(error.flagname, list(flags.FLAGS))]
        perhaps = f"perhaps {' or '.join(near)}: " if near else ""
        return f"--{error.flagname}: no such flag: {perhaps}`{command()} --helpfull` lists all"
    lines = str(error).splitlines()
    missing = [match[1] for line in lines if (match := _MISSING.search(line))]
    said = [line for line in lines if not _MISSING.search(line)]
    if missing:
        said += [f"--{name} is missing: {_short(flags.FLAGS[name])}" for name in missing]
        said.append(f"`{command()} --help` shows how it is called")
    text = "; ".join(line.strip() for line in said).removeprefix("flag ").removeprefix("flags ")
    return _ENUM.sub(lambda match: f"expected one of {', '.join(match[1].split('|'))}", text)


def nearest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Up to `most` of the `known` flags that `name` may have been meant for.

    A flag of a stage, `deepsc.joint.steps`, is near to `step` as well.
    """
    ends = {flag: [flag, *_ends(flag)] for flag in known}
    alike = {
        flag: max(difflib.SequenceMatcher(None, name, end).ratio() for end in spelled)
        for flag, spelled in ends.items()
    }
    best = sorted(alike, key=lambda flag: -alike[flag])[:most]
    return [flag for flag in best if alike[flag] >= max(0.75, alike[best[0]] - 0.1)]


def _ends(flag: str) -> list[str]:
    parts = flag.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]


def define_help() -> None:
    """Put our help in the place of absl's, which ends with 1 and lists libraries' flags first."""
    flags.DEFINE_flag(_Help("help", "show this help", short="h"))
    flags.DEFINE_flag(_Help("helpshort", "show this help"))
    flags.DEFINE_flag(_Help("helpfull", "show every flag", full=True))


class _Help(flags.BooleanFlag):
    """Prints the help and ends the program with 0."""

    def __init__(self, name: str, text: str, *, short: str | None = None, full: bool = False):
        super().__init__(name, False, text, short_name=short, allow_override=True)
        self._full = full

    def parse(self, arg: str | bool) -> None:
        if self._parse(arg):
            print(text(full=self._full), flush=True)
            sys.exit(0)


def text(*, full: bool) -> str:
    """The help of the command that runs: its own flags or, in full, those of a run as well."""
    own, shared, models = _groups()
    parts = [inspect.cleandoc(sys.modules["__main__"].__doc__ or "")]
    parts.append("\n".join(["flags:", _filled(_FLAGFILE), *_lines(own)]))
    if full:
        for title, group in [*shared.items(), *models.items()]:
            parts.append("\n".join([f"{title}:", *_lines(group)]))
    else:
        parts.append(f"`{command()} --helpfull` lists every flag.")
    return "\n\n".join(parts)


def _groups() -> tuple[list[flags.Flag], dict[str, list[flags.Flag]], dict[str, list[flags.Flag]]]:
    """The command's own flags, those that all models share, and models' own, by title."""
    own: list[flags.Flag] = []
    shared: dict[str, list[flags.Flag]] = {}
    models: dict[str, list[flags.Flag]] = {}
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith("deepsc_jax.models."):
            for flag in defined:
                models.setdefault(f"--model={flag.name.partition('.')[0]}", []).append(flag)
        elif module.startswith("deepsc_jax.config.") and module != "deepsc_jax.config.flags":
            shared.setdefault(f"of the {module.rpartition('.')[2]}", []).extend(defined)
        elif module == sys.argv[0] or module.startswith("deepsc_jax."):
            own += [flag for flag in defined if not isinstance(flag, _Help)]
    return own, shared, models


def _lines(of: Iterable[flags.Flag]) -> Iterator[str]:
    for flag in of:
        name = f"[no]{flag.name}" if flag.boolean else flag.name
        values = getattr(flag.parser, "enum_values", None)
        choice = f" <{'|'.join(values)}>" if values else ""
        default = flag.default_as_str
        end = "" if default is None else f" (default: {default})"
        yield _filled(f"--{name}:{choice} {flag.help}{end}")


def _filled(line: str) -> str:
    return textwrap.fill(
        line, 96, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False
    )


def _short(flag: flags.Flag) -> str:
    """The first sentence of a flag's help, as a part of a sentence."""
    sentence = (flag.help or "").partition(". ")[0].partition("; ")[0].rstrip(".")
    return sentence[:1].lower() + sentence[1:]
