"""The largest batch that fits, under every choice of recomputation."""

import dataclasses
import typing
from collections.abc import Callable

from deepsc_jax.config import Config, PlatformConfig

MOST = 1024  # scans for one device: further than this nobody asks


def largest_batch(peak: Callable[[int], int], limit: int) -> int:
    """The largest batch whose peak memory is within `limit`; 0 where not even 1 is.

    `peak` is a compilation of minutes, and grows about linearly: the next guess is where the line
    through two batches meets the limit, between one that fits and one that does not if there is.
    """
    known = {1: peak(1)}
    if known[1] > limit:
        return 0
    low, high = 1, MOST + 1
    while high - low > 1:
        ends = [1, low] if high not in known else [low, high]
        guess = 2
        if len(known) > 1:
            slope = max((known[ends[1]] - known[ends[0]]) / (ends[1] - ends[0]), 1)
            guess = int(ends[0] + (limit - known[ends[0]]) / slope)
        guess = min(max(guess, low + 1), high - 1)
        known[guess] = peak(guess)
        low, high = (guess, high) if known[guess] <= limit else (low, guess)
    return low


def remat_choices(config: Config) -> list[Config]:
    """The configuration under every value of its `remat` option."""
    return [
        dataclasses.replace(config, platform=dataclasses.replace(config.platform, remat=value))
        for value in typing.get_args(typing.get_type_hints(PlatformConfig)["remat"])
    ]
