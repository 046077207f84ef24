"""The largest batch that fits, under every choice of recomputation."""

import dataclasses
import typing
from collections.abc import Callable

from deepsc_jax.config import Config, PlatformConfig

MOST = 1024  # scans for one device: further than this nobody asks


def largest_batch(peak: Callable[[int], int], limit: int) -> int:
    """The largest batch whose peak memory is within `limit`; 0 where not even 1 is.

    `peak` is a compilation of minutes, and grows about linearly: the next guess is where the line
    through the smallest and the last one meets the limit.
    """
    first = last = peak(1)
    if first > limit:
        return 0
    low, high = 1, MOST + 1
    while high - low > 1:
        at = low if last <= limit else high
        slope = max((last - first) / (at - 1), 1) if at > 1 else max(first, 1)
        guess = 2 if low == 1 == at else int(1 + (limit - first) / slope)
        guess = min(max(guess, low + 1), high - 1)
        last = peak(guess)
        low, high = (guess, high) if last <= limit else (low, guess)
    return low


def remat_choices(config: Config) -> list[Config]:
    """The configuration under every value of its `remat` option."""
    kind = typing.get_type_hints(PlatformConfig)["remat"]
    values = (False, True) if kind is bool else typing.get_args(kind)
    return [
        dataclasses.replace(config, platform=dataclasses.replace(config.platform, remat=value))
        for value in values
    ]
