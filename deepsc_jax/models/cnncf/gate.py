"""CNNCF's control gate: which training steps open the way to stage II, as pure functions.

The paper (Control Gate Block, Fig. 6c) has a classifier of stage I's features, a step function that
is 1 where its sensitivity is at least a threshold, a counter of such judgements in a row, and a
gate that the counter opens. It does not say over which samples the sensitivity is taken, nor
whether an open gate may shut. Here it is judged once a window of training steps, over all their
examples, and by default stays open.

The state is carried from step to step, saved and restored with the network:

    steps        int32     training steps so far
    count        int32     judgements in a row that were good enough
    open         bool      whether stage II answers
    since        int32     the steps that had been taken when it opened; -1 while it is shut
    tp fn tn fp  float32   the running window's examples
    sensitivity, specificity   float32   of the last window that was judged; -1 before the first
"""

import dataclasses

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

COLLECTION = "gate"  # of Flax variables
GateState = dict[str, Array]
SUMS = ("tp", "fn", "tn", "fp")


@dataclasses.dataclass(frozen=True)
class Rule:
    """When a gate opens.

    Attributes:
      window: training steps between two judgements.
      sensitivity: that a judgement needs, at least.
      specificity: likewise; 0 is the paper's, which sensitivity alone decides.
      count: good judgements in a row that open the gate.
      latch: whether it then stays open; else the first bad judgement shuts it.
    """

    window: int
    sensitivity: float
    specificity: float
    count: int
    latch: bool


def shut() -> GateState:
    """The state before the first step."""
    sums = {name: jnp.zeros((), jnp.float32) for name in SUMS}
    unknown = {name: jnp.full((), -1, jnp.float32) for name in ("sensitivity", "specificity")}
    return {
        "steps": jnp.zeros((), jnp.int32),
        "count": jnp.zeros((), jnp.int32),
        "open": jnp.zeros((), bool),
        "since": jnp.full((), -1, jnp.int32),
        **sums,
        **unknown,
    }


def tally(given: Bool[Array, "batch"], truth: Bool[Array, "batch"]) -> Float[Array, "4"]:
    """How many examples are TP, FN, TN and FP, where True is the positive class."""
    cells = (truth & given, truth & ~given, ~truth & ~given, ~truth & given)
    return jnp.stack([cell.sum().astype(jnp.float32) for cell in cells])


def after_step(state: GateState, counts: Float[Array, "4"], rule: Rule) -> GateState:
    """The state after a training step.

    A window without a positive example judges nothing: counter and gate stay as they are.

    Args:
      state: before it.
      counts: `tally` of the step's whole batch, on all devices.
      rule: when it opens.
    """
    steps = state["steps"] + 1
    sums = [state[name] + count for name, count in zip(SUMS, counts, strict=True)]
    tp, fn, tn, fp = sums
    ends = steps % rule.window == 0
    judged = ends & (tp + fn > 0)
    sensitivity = tp / jnp.maximum(tp + fn, 1)
    specificity = tn / jnp.maximum(tn + fp, 1)
    good = (sensitivity >= rule.sensitivity) & (specificity >= rule.specificity)
    count = jnp.where(judged, jnp.where(good, state["count"] + 1, 0), state["count"])
    opens = count >= rule.count
    if rule.latch:
        opens = opens | state["open"]
    is_open = jnp.where(judged, opens, state["open"])
    since = jnp.where(is_open, jnp.where(state["open"], state["since"], steps), -1)
    return {
        "steps": steps,
        "count": count,
        "open": is_open,
        "since": since,
        **{name: jnp.where(ends, 0, x) for name, x in zip(SUMS, sums, strict=True)},
        "sensitivity": jnp.where(judged, sensitivity, state["sensitivity"]),
        "specificity": jnp.where(judged, specificity, state["specificity"]),
    }


def describe(since: ArrayLike) -> str:
    """What a result says of the gate that answered."""
    step = int(jnp.asarray(since))
    return f"gate: open since step {step}" if step >= 0 else "gate: closed, answered by stage I"
