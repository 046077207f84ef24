"""What is said of a flag that is wrong."""

import pytest
from absl import flags

from deepsc_jax.runtime import usage

KNOWN = ("seed", "tile", "deepsc.joint.steps", "deepsc.joint.learning_rate", "workdir")


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("sead", ["seed"]),
        ("joint.steps", ["deepsc.joint.steps"]),
        ("lerning_rate", ["deepsc.joint.learning_rate"]),
        ("work_dir", ["workdir"]),
        ("unheard_of", []),
    ],
)
def test_flags_that_may_have_been_meant_are_named(given: str, near: list[str]) -> None:
    assert usage.nearest(given, KNOWN) == near


def test_no_more_flags_are_named_than_help() -> None:
    known = [f"model.{stage}.steps" for stage in "abcdefgh"]
    assert len(usage.nearest("step", known)) == 3


def test_values_that_a_flag_takes_are_listed() -> None:
    error = flags.IllegalFlagValueError("flag --split=x: value should be one of <train|test>")
    assert usage.explained(error) == "--split=x: expected one of train, test"
