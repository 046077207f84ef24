"""Whether a compiled program suits its chip: who computes its convolutions, and what is laid anew.

Read, like its transfers (`hlo`), from the optimised HLO.
"""

import dataclasses
import re
from collections.abc import Sequence

from deepsc_jax.models.layers.bands import TENSOR_CHANNELS
from deepsc_jax.planning.hlo import Computation, Instruction, Module, called, instructions

# Who computes a convolution: a cuDNN call, or XLA itself. That is slow loops on GPU; on TPU it is
# the matrix unit.
CALLS = {
    "__cudnn$convForward": "forward",
    "__cudnn$convForwardGraph": "fused",
    "__cudnn$convBiasActivationForward": "fused",
    "__cudnn$convBackwardInput": "backward_input",
    "__cudnn$convBackwardFilter": "backward_filter",
}
COMPUTED_BY = ("forward", "backward_input", "backward_filter", "fused", "xla")

INTO = ("call", "conditional", "fusion", "async-start")
# Instructions that leave values as they are, apart from their order and their type.
_KEEPING = {"parameter", "bitcast", "reshape", "convert", "tuple", "transpose", "copy"}


@dataclasses.dataclass(frozen=True)
class Convolution:
    """One convolution, however often it runs.

    Attributes:
      by: one of `COMPUTED_BY`.
      labels: `dim_labels`, such as b012f_o012i->b012f: batch, space, features.
      channel_last: whether channels vary fastest in the memory of what it reads. (A kernel's
        gradient exchanges the names: its labels begin with f, and b are the channels.)
      dtype: of what it reads.
      channels: input and output channels of its kernel.
      dilated: whether its input or its kernel has holes.
    """

    by: str
    labels: str
    channel_last: bool
    dtype: str
    channels: tuple[int, int]
    dilated: bool


@dataclasses.dataclass(frozen=True)
class Move:
    """A kernel that only moves an array.

    Attributes:
      relaid: whether into another order of axes; else it is a plain copy.
      bytes: of its result.
      trips: how often it runs; None in a loop of unknown length.
    """

    relaid: bool
    bytes: int
    trips: int | None


def convolutions(module: Module) -> list[Convolution]:
    """Every convolution of a program."""
    listed = []
    for instruction, computation, _, _ in instructions(module, INTO):
        call = re.search(r'custom_call_target="(__cudnn\$conv\w+)"', instruction.rest)
        if instruction.opcode == "convolution" or (call and call[1] in CALLS):
            by = CALLS[call[1]] if call else "xla"
            listed.append(_convolution(by, instruction, computation))
    return listed


def _convolution(by: str, instruction: Instruction, computation: Computation) -> Convolution:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->\w+", instruction.rest)
    assert labels is not None, instruction.name
    read = [computation[name] for name in instruction.operands]
    kernel = (instruction if by == "backward_filter" else read[1]).shapes[0]
    fastest = int(read[0].orders[0].split(",")[0])
    return Convolution(
        by=by,
        labels=labels[0].removeprefix("dim_labels="),
        channel_last=labels[1][fastest] == max("bf", key=labels[1].index),
        dtype=read[0].dtypes[0],
        channels=(kernel[labels[2].index("i")], kernel[labels[2].index("o")]),
        dilated="hs_dilate=" in instruction.rest,  # lhs or rhs
    )


def aligned(convolution: Convolution) -> bool:
    """Whether tensor cores can take its channels as they are."""
    return not any(channels % TENSOR_CHANNELS for channels in convolution.channels)


def moves(module: Module) -> list[Move]:
    """Every transpose and copy that is a kernel of its own, or a fusion that does nothing else."""
    kernels = []
    for instruction, computation, trips, _ in instructions(module, ("call", "conditional")):
        relaid = _relaid(module, instruction, computation)
        if relaid or instruction.opcode == "copy":
            kernels.append(Move(relaid, int(instruction.bytes), trips))
    return kernels


def _relaid(module: Module, instruction: Instruction, computation: Computation) -> bool:
    if instruction.opcode == "fusion":
        body = module.computations[called(instruction)[0]]
        return {i.opcode for i in body.values()} <= _KEEPING and any(
            _relaid(module, inner, body) for inner in body.values()
        )
    if instruction.opcode == "copy":
        return instruction.orders != computation[instruction.operands[0]].orders
    return instruction.opcode == "transpose"


def moved(moves: Sequence[Move], relaid: bool) -> dict[str, int]:
    """`count`, `bytes` of all of them in a step, and those of the `largest`, of one kind."""
    chosen = [move for move in moves if move.relaid == relaid]
    return {
        "count": len(chosen),
        "bytes": sum(move.bytes * (move.trips or 1) for move in chosen),
        "largest": max((move.bytes for move in chosen), default=0),
    }


def colliding_scatters(module: Module) -> int:
    """Select-and-scatter, as of a max-pool's gradient, or the scatter XLA makes of it for GPUs.

    Scatters to places that the program knows to differ are not counted.
    """
    return sum(
        instruction.opcode == "select-and-scatter"
        or (instruction.opcode == "scatter" and "unique_indices=true" not in instruction.rest)
        for instruction, _, _, _ in instructions(module, INTO)
    )
