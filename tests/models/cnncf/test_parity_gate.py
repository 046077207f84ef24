"""The control gate against the reference's, step by step."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference.cnncf.gate import Gate

from deepsc_jax.models.cnncf import gate

# Of every window of two steps of five examples: whether each is positive, and is called so.
# Sensitivities by hand: 1, 1/2, 1 (twice), no positive, 1, 3/4, 0, 1 (thrice).
POSITIVE = [
    "11000 00000",
    "11000 00000",
    "10000 10000",
    "11100 00011",
    "00000 00000",
    "11111 00000",
    "11000 11000",
    "10000 00000",
    "11000 00000",
    "10000 00001",
    "00001 00000",
]
GIVEN = [
    "11000 00000",
    "10000 00011",
    "10000 10000",
    "11111 11111",
    "11111 00000",
    "11111 00000",
    "11000 10000",
    "01111 11111",
    "11000 00000",
    "10000 00001",
    "00001 00000",
]


def steps(rows: list[str]) -> list[np.ndarray]:
    words = itertools.chain.from_iterable(row.split() for row in rows)
    return [np.array([letter == "1" for letter in word]) for word in words]


@pytest.mark.parametrize(
    ("latch", "sensitivity", "specificity", "since"),
    [
        # Good windows 1; 3, 4, (5 judges nothing,) 6: the third of a row at step 12.
        (True, 1.0, 0.0, [-1] * 11 + [12] * 11),
        # Shut by window 7, open again after 9, 10 and 11.
        (False, 1.0, 0.0, [-1] * 11 + [12, 12] + [-1] * 8 + [22]),
        # At least three quarters: window 7 is good too.
        (True, 0.75, 0.0, [-1] * 11 + [12] * 11),
        # Window 4 calls all positive: the row begins anew.
        (True, 1.0, 0.5, [-1] * 21 + [22]),
        (True, 1.01, 0.0, [-1] * 22),
    ],
)
def test_a_scripted_sequence(
    latch: bool, sensitivity: float, specificity: float, since: list[int]
) -> None:
    rule = gate.Rule(2, sensitivity, specificity, 3, latch)
    theirs = Gate(2, sensitivity, specificity, 3, latch)
    ours, advance = gate.shut(), jax.jit(gate.after_step, static_argnums=2)
    for i, (truth, given) in enumerate(zip(steps(POSITIVE), steps(GIVEN), strict=True)):
        ours = advance(ours, gate.tally(jnp.asarray(given), jnp.asarray(truth)), rule)
        theirs.judge(torch.from_numpy(given), torch.from_numpy(truth))
        for name, x in theirs.named_buffers():
            assert ours[name] == x.numpy(), (i, name)
            assert ours[name].dtype == x.numpy().dtype
        assert ours["since"] == since[i], i
    assert ours.keys() == dict(theirs.named_buffers()).keys()


def test_what_it_says() -> None:
    assert gate.describe(gate.shut()["since"]) == "gate: closed, answered by stage I"
    assert gate.describe(12) == "gate: open since step 12"
