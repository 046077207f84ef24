"""What a compiled program does: its collectives and the bytes it moves.

Read from the text of the optimised HLO (`jax.stages.Compiled.as_text()`), the same for CPU, CUDA
and TPU. A loop's body counts as often as the loop runs, where the compiler knows that.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0, "opaque": 0}  # others carry theirs in the name
KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Instructions that name values and move none, or whose bytes are counted where they begin.
FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all")
FREE += ("while", "conditional", "call", "partition-id", "replica-id", "optimization-barrier")

_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_TRIPS = re.compile(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)')
_CALLED = re.compile(
    r"(?:calls|body|to_apply|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]+)\] \{([^}]+)\}")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}\s]*\})\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
      bytes: of the result.
      moved: those of them that lie in device memory, not in a TPU's VMEM.
      dtypes: of the result's arrays.
      shapes: of them.
      orders: of their axes in memory, the fastest first.
      operands: names of the instructions it reads.
      rest: its attributes, as text; of a parameter or constant, its number or value.
      root: whether it is its computation's result.
    """

    name: str
    opcode: str
    bytes: float
    moved: float
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    orders: tuple[str, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      computations: by name.
      entry: the name of the first to run.
      devices: for which it is compiled.
    """

    computations: Mapping[str, Computation]
    entry: str
    devices: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """A transfer between devices; an asynchronous pair is one.

    Attributes:
      kind: one of `KINDS`.
      dtype: of its values; several are joined by +.
      bytes: of the whole array on one device: what is reduced, what is gathered, what is sent.
      trips: how often it runs; None in a loop of unknown length.
      in_loop: whether it is inside a loop.
      groups: the devices that take part together.
    """

    kind: str
    dtype: str
    bytes: int
    trips: int | None
    in_loop: bool
    groups: tuple[tuple[int, ...], ...]


def parse(text: str) -> Module:
    """The computations of HLO text.

    Raises:
      ValueError: it has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        begun = _COMPUTATION.match(line)
        if begun:
            current = computations.setdefault(begun[2], {})
            entry = begun[2] if begun[1] else entry
        elif current is not None and (written := _INSTRUCTION.match(line)):
            instruction = _instruction(written[2], line[written.end() :], bool(written[1]))
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("no entry computation in the HLO text")
    head = text.partition("\n")[0]
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", head)
    return Module(computations, entry, math.prod(map(int, counts)))


def _instruction(name: str, text: str, root: bool) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    kind, text = text[:end], text[end:].lstrip()
    start = text.index("(")
    end = _closing(text, start)
    opcode, operands, rest = text[:start], text[start + 1 : end - 1], text[end:]
    arrays = [
        (dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n), layout)
        for dtype, dims, layout in _ARRAY.findall(kind)
    ]
    sizes = [_bytes(dtype, shape) for dtype, shape, _ in arrays]
    names = tuple(_NAME.findall(operands))
    if opcode in ("constant", "parameter"):
        names, rest = (), operands
    return Instruction(
        name=name,
        opcode=opcode,
        bytes=sum(sizes),
        moved=sum(n for n, array in zip(sizes, arrays, strict=True) if "S(1)" not in array[2]),
        dtypes=tuple(array[0] for array in arrays),
        shapes=tuple(array[1] for array in arrays),
        orders=tuple(array[2].split(":")[0] for array in arrays),
        operands=names,
        rest=rest,
        root=root,
    )


def _closing(text: str, start: int) -> int:
    """Just past the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def _bytes(dtype: str, shape: tuple[int, ...]) -> float:
    digits = re.search(r"\d+", dtype)
    bits = BITS[dtype] if dtype in BITS else int(digits[0]) if digits else 0
    return math.prod(shape) * bits / 8


Step = tuple[Instruction, Computation, int | None, bool]


def instructions(module: Module, into: tuple[str, ...]) -> Iterator[Step]:
    """Every instruction that runs, how often, and whether it is in a loop.

    `into` are the instructions, beside loops, whose computations are looked into.
    """

    def steps(name: str, trips: int | None, looped: bool) -> Iterator[Step]:
        computation = module.computations[name]
        for instruction in computation.values():
            yield instruction, computation, trips, looped
            inner, inside = trips, looped
            if instruction.opcode == "while":
                length = _length(module, instruction)
                inner = None if length is None or trips is None else trips * length
                inside = True
            elif instruction.opcode not in into:
                continue
            for callee in called(instruction):
                yield from steps(callee, inner, inside)

    return steps(module.entry, 1, False)


def _length(module: Module, loop: Instruction) -> int | None:
    """How often a loop runs; libtpu leaves that to be read from the condition i < n."""
    known = _TRIPS.search(loop.rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    body = module.computations[condition[1]] if condition else {}
    for root in body.values():
        if root.root and root.opcode == "compare" and "direction=LT" in root.rest:
            limit = body[root.operands[1]]
            if limit.opcode == "constant" and limit.rest.isdigit():
                return int(limit.rest)
    return None


def called(instruction: Instruction) -> list[str]:
    """Names of the computations that an instruction runs."""
    listed = _CALLED.findall(instruction.rest)
    return [name for text in listed for name in re.findall(r"[\w.\-]+", text)]


def collectives(module: Module) -> list[Collective]:
    """Every transfer between devices, in the program's order."""
    transfers = []
    into = ("call", "conditional", "async-start", "fusion")
    for instruction, computation, trips, looped in instructions(module, into):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        read = [computation[name] for name in instruction.operands]
        size = sum(operand.bytes for operand in read)
        groups = _groups(instruction.rest, module.devices)
        if kind == "all-gather":
            size *= len(groups[0])
        dtypes = sorted({dtype for operand in read for dtype in operand.dtypes})
        transfers.append(Collective(kind, "+".join(dtypes), int(size), trips, looped, groups))
    return transfers


def _groups(rest: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The devices that take part together; where none are named, all.

    Raises:
      ValueError: groups that are written in a form unknown here.
    """
    if listed := _LISTED.search(rest):
        groups = re.findall(r"\{([\d,]+)\}", listed[1])
        return tuple(tuple(int(n) for n in group.split(",")) for group in groups)
    if iota := _IOTA.search(rest):
        rows, columns = int(iota[1]), int(iota[2])
        shape = [int(n) for n in iota[3].split(",")]
        order = [int(n) for n in iota[4].split(",")] if iota[4] else range(len(shape))
        ids = np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(rows, columns)
        return tuple(map(tuple, ids.tolist()))
    if mesh := _MESH.search(rest):
        return _mesh_groups(mesh[1], mesh[2])
    if "replica_groups=" in rest and "replica_groups={}" not in rest:
        raise ValueError(f"groups of devices in no known form: {rest}")
    return (tuple(range(devices)),)


def _mesh_groups(mesh: str, together: str) -> tuple[tuple[int, ...], ...]:
    """Groups by the axes of a mesh, as XLA writes them now: `'a'=8,'b'=2` and `'a':(2)4,'b'`.

    `'a':(2)4` is the part of size 4 that is left of axis `a` after its first part of size 2. The
    members of a group are in the order of the axes as written.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'?([^',=]+)'?=(\d+)", mesh)}
    named = re.findall(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?(?:,|$)", together)
    if not {name for name, _, _ in named} <= sizes.keys():
        raise ValueError(f"groups of devices over other axes than the mesh's: {mesh} {together}")
    parts = [(name, int(before or 1), int(size or sizes[name])) for name, before, size in named]
    shape, place = [], {}
    for name, size in sizes.items():
        ends = [n for axis, before, part in parts if axis == name for n in (before, before * part)]
        for low, high in itertools.pairwise(sorted({1, size, *ends})):
            place[name, low] = len(shape)
            shape.append(high // low)
    picked = [place[name, before] for name, before, size in parts if size > 1]
    rest = [axis for axis in range(len(shape)) if axis not in picked]
    members = math.prod(shape[axis] for axis in picked)
    ids = np.arange(math.prod(shape)).reshape(shape).transpose(*rest, *picked)
    return tuple(map(tuple, ids.reshape(-1, members).tolist()))


def bytes_moved(module: Module) -> int:
    """Bytes that kernels read from and write to device memory, each operand of a kernel once.

    Of an operand of which a kernel reads a slice only the slice counts, and of a result written in
    place only what is written. What a cache would spare is not known.
    """
    total = 0.0
    for instruction, computation, trips, _ in instructions(module, ("call", "conditional")):
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith("-done") or opcode == "async-update":
            continue
        total += (trips or 1) * _traffic(module, instruction, computation)
    return int(total)


def _traffic(module: Module, instruction: Instruction, computation: Computation) -> float:
    operands = [computation[name] for name in instruction.operands]
    if instruction.opcode == "fusion":
        body = module.computations[called(instruction)[0]]
        parameters = [i for i in body.values() if i.opcode == "parameter"]
        read = sum(_read(parameter, body) for parameter in parameters)
        return read + sum(_written(root, body) for root in body.values() if root.root)
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * instruction.moved
    if instruction.opcode == "dynamic-update-slice":
        return 2 * operands[1].moved
    if instruction.opcode.endswith("-start"):
        return 2 * sum(operand.moved for operand in operands)
    return instruction.moved + sum(operand.moved for operand in operands)


def _read(value: Instruction, body: Computation) -> float:
    """What a fusion reads of a parameter."""
    users = [i for i in body.values() if value.name in i.operands]
    read = 0.0
    for user in users:
        first = user.operands[0] == value.name
        if user.opcode == "bitcast":
            read += _read(user, body)
        elif user.opcode in ("dynamic-slice", "slice", "gather") and first:
            read += user.moved
        elif user.opcode != "dynamic-update-slice" or not first:
            return value.moved
    return min(read, value.moved)


def _written(value: Instruction, body: Computation) -> float:
    """What a fusion writes of its result."""
    if value.opcode in ("tuple", "bitcast"):
        return sum(_written(body[name], body) for name in value.operands)
    if value.opcode == "dynamic-update-slice":
        return body[value.operands[1]].moved
    return value.moved
