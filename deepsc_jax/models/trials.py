"""Runs of several settings on the same phantoms: each is kept as a file and never made twice."""

import json
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Collection, Sequence

from deepsc_jax.config.flags import expanded
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.names import shown
from deepsc_jax.runtime.types import JsonObject


def require_known(arms: Collection[str], only: Sequence[str], seeds: Sequence[str]) -> None:
    """Refuse arms that there are none of, and seeds that are no numbers.

    Raises:
      InputError: naming the flag, `--only` or `--seeds`.
    """
    unknown = [name for name in only if name not in arms]
    if unknown:
        raise InputError(f"--only={unknown[0]}: expected some of {','.join(arms)}")
    wrong = [seed for seed in seeds if not seed.isdecimal()]
    if wrong or not seeds:
        raise InputError(f"--seeds={','.join(wrong)}: expected whole numbers with commas between")


def settings(data: Sequence[str], train: Sequence[str], phantoms: str) -> JsonObject:
    """What a run is known by: its flags, with those of flag files as they are now.

    Args:
      data: flags of preprocessing and of the network.
      train: flags of training.
      phantoms: how many of each split.
    """
    given = expanded(["", *data, *train])[1:]
    return {"data": list(data), "train": list(train), "phantoms": phantoms, "flags": given}


def kept(file: pathlib.Path, asked: JsonObject, names: Sequence[str]) -> JsonObject:
    """The result in a file, of these `settings` and with these entries.

    Raises:
      InputError: it is damaged, or of other settings.
    """
    try:
        result = json.loads(file.read_text("utf-8"))
        same = result["settings"] == asked and result.keys() >= set(names)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file}: not a run's result ({error!r}): remove it") from error
    if not same:
        raise InputError(f"{file}: made with other settings: name another --out, or remove it")
    return result


def program(module: str, *arguments: str) -> None:
    """Run one of the commands.

    Raises:
      InputError: it failed.
    """
    print(f"\ndeepsc {module} {shown(shlex.join(arguments))}", flush=True)
    command = [sys.executable, "-m", f"deepsc_jax.{module}", *arguments]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise InputError(f"deepsc {module} ended with {code}: its own line says why")
