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
    The search ends when that line, at first through 0, has the next larger batch beyond the limit.
    """
    batch, needed = 1, peak(1)
    if needed > limit:
        return 0
    other, others = 0, 0
    while batch < MOST:
        slope = max((others - needed) / (other - batch), 1)
        guess = min(batch + int((limit - needed) / slope), MOST)
        if guess == batch:
            break
        guessed = peak(guess)
        if guessed > limit:
            other, others = guess, guessed
            continue
        if other < batch:
            other, others = batch, needed
        batch, needed = guess, guessed
    return batch


def remat_choices(config: Config) -> list[Config]:
    """The configuration under every value of its `remat` option."""
    return [
        dataclasses.replace(config, platform=dataclasses.replace(config.platform, remat=value))
        for value in typing.get_args(typing.get_type_hints(PlatformConfig)["remat"])
    ]
