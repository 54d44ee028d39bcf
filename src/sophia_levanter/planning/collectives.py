"""Count the bytes that devices send to each other in a compiled program, using its HLO text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_OPCODE = re.compile(r" (?P<opcode>[a-z][a-z0-9\-]*)\((?P<operands>[^)]*)\)")
_ARRAY = re.compile(r"\b(?P<dtype>pred|bf16|[sfuc]\d+)\[(?P<shape>[\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|[a-z]+_computations?)=\{?([^,}\s]+(?:, ?%[^,}\s]+)*)\}?")
# A collective specifies groups of devices in one of three forms: lists such as {{0,1},{2,3}}; parts of a range, which
# may be reshaped and transposed, such as [2,2]<=[4]; or axes of a device mesh, such as mesh['a'=2,'b'=2] {'b'}.
_LISTS = re.compile(r"\b(?:replica_groups|source_target_pairs)=\{(?P<lists>(?:\{[\d,]+\},?)*)\}")
# Between TPU slices, hosts transfer the data sent by devices: {1,2}x{0:3} means devices 0 to 3 in slices 1 and 2.
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(?P<kind>\w+)"')
_SLICES = re.compile(r'_xla_megascale_target="\{(?P<slices>[^}]*)\}')
_PARTS = re.compile(r"\breplica_groups=\[\d+,(?P<size>\d+)\]<=(?P<range>\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(
    r"\breplica_groups=mesh\[(?P<axes>[^]]*)\](?:, device_ids=\((?P<ids>[^ ]*)\))? \{(?P<grouped>[^}]*)\}"
)


@dataclass
class _Computation:
    instructions: dict[str, _Instruction] = field(default_factory=dict)
    root: str = ""


@dataclass(frozen=True)
class _Instruction:
    opcode: str
    result_bytes: int
    operands: tuple[str, ...]
    called: tuple[str, ...]
    text: str


def collective_bytes(hlo: str, nodes: Sequence[int] | None = None) -> dict[str, float]:
    """Count the bytes that a device sends in each kind of collective, including every iteration of each loop.

    Of a conditional, the branch that sends the most is counted, such as SOAP's rotation, which few steps perform.

    In a ring of n devices on k nodes, a device sends these shares to other devices and to other nodes, respectively:

        all-gather, reduce-scatter    (n - 1) / n and (k - 1) / n of the whole array
        all-reduce                    twice as much, because it is a reduce-scatter followed by an all-gather
        all-to-all                    (n - 1) / n and (k - 1) / k of the array on the device
        collective-permute            the array on the device, if any device sends to another device or node

    Args:
        hlo: the text of a compiled module (`Compiled.as_text()`).
        nodes: the node of each device, in the order of the program's devices. If given, only bytes sent to other nodes
            are counted; otherwise, all bytes are counted.

    Raises:
        ValueError: if the text does not specify a collective's devices or the iterations of a loop with collectives.
    """
    computations, entry = _parse(hlo)
    partitions = re.search(r"\bnum_partitions=(\d+)", hlo.split("\n", 1)[0])
    devices = range(int(partitions[1]) if partitions else 1)
    place = devices if nodes is None else nodes

    def share(kind: str, instruction: _Instruction) -> float:
        groups = _groups(instruction.text, devices)
        return max(_share(kind, len(group), len({place[i] for i in group})) for group in groups)

    counts: dict[str, float] = {}
    for kind, count in _sent(computations, entry, share):
        counts[kind] = counts.get(kind, 0.0) + count
    return {kind: count for kind, count in counts.items() if count}


def _share(kind: str, size: int, nodes: int) -> float:
    """Return the share of the array that a device sends to other nodes, given `size` devices on `nodes` nodes."""
    if kind == "collective-permute":
        return float(nodes > 1)
    if kind == "all-to-all":
        return 1 - 1 / nodes
    return (2 if kind == "all-reduce" else 1) * (nodes - 1) / size


def _groups(text: str, devices: Sequence[int]) -> list[list[int]]:
    """Return the groups of devices that exchange data in a collective. By default, all devices are in one group."""
    if match := _LISTS.search(text):
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", match["lists"])] or [list(devices)]
    if match := _PARTS.search(text):
        return _range(match["range"]).reshape(-1, int(match["size"])).tolist()
    if match := _MESH.search(text):
        return _mesh_groups(match["axes"], match["ids"], match["grouped"])
    if "replica_groups=" in text:
        raise ValueError(f"cannot determine which devices participate in a collective: {text[:200]}")
    return [list(devices)]


def _mesh_groups(axes: str, ids: str | None, grouped: str) -> list[list[int]]:
    """Return the groups along mesh axes or parts of axes: 'a':(2)4 is the part of size 4 after a part of size 2."""
    parts: dict[str, list[tuple[int, int]]] = {}
    for axis in grouped.split(","):
        name, _, part = axis.partition(":")
        before, size = _numbers(part) if part else (1, 0)
        parts.setdefault(name, []).append((before, before * size))
    sizes, within = [], []
    for axis in axes.split(","):
        name, _, length = axis.partition("=")
        spans = [(start, end or int(length)) for start, end in parts.get(name, [])]
        for start, end in pairwise(sorted({1, int(length)}.union(*spans))):
            sizes.append(end // start)
            within.append(any(first <= start and end <= last for first, last in spans))
    devices = np.arange(math.prod(sizes)) if ids is None else _range(ids) if "[" in ids else np.array(_numbers(ids))
    order = sorted(range(len(sizes)), key=lambda axis: within[axis])
    group = math.prod(size for size, inside in zip(sizes, within, strict=True) if inside)
    return devices.reshape(sizes).transpose(order).reshape(-1, group).tolist()


def _range(text: str) -> np.ndarray:
    """Return the numbers in a range: [2,4]T(1,0) is 0 to 7 as a 2 x 4 array, transposed and flattened."""
    sizes, _, order = text.partition("T")
    shape = _numbers(sizes)
    return np.arange(math.prod(shape)).reshape(shape).transpose(_numbers(order) or None).ravel()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    current: _Computation | None = None
    entry = ""
    # In HLO text for TPUs, long tuples contain comments with indices.
    for line in re.sub(r"/\*index=\d+\*/", "", hlo).splitlines():
        if line.endswith("{") and "->" in line and not line.startswith(" "):
            name = line.removeprefix("ENTRY ").lstrip("%").split(" ", 1)[0].split("(", 1)[0]
            current = computations.setdefault(name, _Computation())
            if line.startswith("ENTRY "):
                entry = name
        elif current is not None and (match := _INSTRUCTION.match(line)):
            opcode = _OPCODE.search(" " + _without_layouts(match["rest"]))
            if opcode is None:
                continue
            result = " " + _without_layouts(match["rest"])
            operands = tuple(word.split(" ")[-1].lstrip("%") for word in opcode["operands"].split(", ") if word)
            called = tuple(
                name.strip().lstrip("%") for group in _CALLED.findall(match["rest"]) for name in group.split(",")
            )
            current.instructions[match["name"]] = _Instruction(
                opcode["opcode"], _array_bytes(result[: opcode.start()]), operands, called, match["rest"]
            )
            if line.lstrip().startswith("ROOT "):
                current.root = match["name"]
    return computations, entry


def _without_layouts(text: str) -> str:
    """Remove layouts in braces, because their parentheses would be mistaken for operands."""
    return re.sub(r"\{[^{}]*\}", "", text)


def _array_bytes(text: str) -> int:
    """Return the total size in bytes of all arrays in an HLO type, given as text."""
    return sum(
        _BYTES.get(dtype, 4) * math.prod(int(n) for n in shape.split(",") if n) for dtype, shape in _ARRAY.findall(text)
    )


def _sent(
    computations: dict[str, _Computation], name: str, share: Callable[[str, _Instruction], float]
) -> Iterator[tuple[str, float]]:
    """Yield `(kind, bytes)` for each collective in a computation, counting the bytes that one device sends."""
    computation = computations.get(name, _Computation())
    for instruction_name, instruction in computation.instructions.items():
        kind = instruction.opcode.removesuffix("-start")
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
            # HLO text for TPUs expresses a reduce-scatter as an all-reduce and a slice; only the slice is received.
            yield "reduce-scatter", instruction.result_bytes * share("reduce-scatter", instruction)
        elif kind in KINDS:
            yield kind, _array_sent(kind, instruction, computation) * share(kind, instruction)
        elif instruction.opcode == "send" and (transfer := _TRANSFER.search(instruction.text)):
            yield _sent_to_slices(transfer["kind"], instruction, computation)
        elif instruction.opcode == "while":
            inside = list(_sent(computations, _attribute(instruction.text, "body"), share))
            if inside:
                turns = _turns(computations, instruction)
                yield from ((kind, turns * count) for kind, count in inside)
        elif instruction.opcode == "conditional":
            branches = [list(_sent(computations, called, share)) for called in instruction.called]
            yield from max(branches, key=lambda branch: sum(count for _, count in branch))
        elif not _continues(instruction_name, instruction):
            for called in instruction.called:
                yield from _sent(computations, called, share)


def _sent_to_slices(kind: str, instruction: _Instruction, computation: _Computation) -> tuple[str, float]:
    """Return `(kind, bytes)` for a collective between slices, counting the bytes that one device sends."""
    if kind == "ONE_TO_ONE":
        return "collective-permute", _array_sent("", instruction, computation)
    kind = kind.lower().replace("_", "-")
    target = _SLICES.search(instruction.text)
    if kind not in KINDS or target is None:
        raise ValueError(f"cannot determine which slices participate in a collective: {instruction.text[:200]}")
    spans = re.findall(r"(\d+)(?::(\d+))?", target["slices"])
    slices = sum(int(last or first) - int(first) + 1 for first, last in spans)
    # An all-gather's operand is the device's part of the array.
    parts = slices if kind == "all-gather" else 1
    return kind, parts * _array_sent("", instruction, computation) * _share(kind, slices, slices)


def _continues(name: str, instruction: _Instruction) -> bool:
    """Return whether a fusion continues another fusion's collective, which HLO text for TPUs repeats in both."""
    return name.startswith("async-collective-done") or any(
        called.startswith("async_collective_fusion") for called in instruction.called
    )


def _array_sent(kind: str, instruction: _Instruction, computation: _Computation) -> int:
    """Return the size in bytes of the array to which the share in `_share` applies."""
    operands = sum(
        computation.instructions[name].result_bytes for name in instruction.operands if name in computation.instructions
    )
    if kind == "all-gather":
        # The result of an all-gather-start also contains its operands.
        started = instruction.opcode.endswith("-start")
        return instruction.result_bytes - (operands if started else 0)
    if kind == "all-reduce":
        # Do not count the operands, because TPUs first convert them to a narrower type.
        return instruction.result_bytes
    return operands


def _attribute(text: str, name: str) -> str:
    match = re.search(rf"{name}=%?([\w.\-]+)", text)
    return match[1] if match else ""


def _turns(computations: dict[str, _Computation], loop: _Instruction) -> int:
    """Return a loop's number of iterations: its known trip count, or the limit of its counter divided by the step."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text)
    if known:
        return int(known[1])
    condition = computations[_attribute(loop.text, "condition")]
    body = computations[_attribute(loop.text, "body")]
    compared = condition.instructions[condition.root]
    limits = [_constant(condition, name) for name in compared.operands]
    indices = [_tuple_index(condition, name) for name in compared.operands]
    limit = next((value for value in limits if value is not None), None)
    index = next((value for value in indices if value is not None), None)
    if compared.opcode != "compare" or "direction=LT" not in compared.text or limit is None or index is None:
        raise ValueError(f"cannot determine the number of iterations of the loop {_attribute(loop.text, 'body')}")
    following = body.instructions.get(body.instructions[body.root].operands[index])
    steps = [_constant(body, name) for name in following.operands] if following else []
    step = next((value for value in steps if value is not None), 1)
    return -(-limit // step)


def _constant(computation: _Computation, name: str) -> int | None:
    instruction = computation.instructions.get(name)
    match = re.search(r"constant\((\d+)\)", instruction.text) if instruction else None
    return int(match[1]) if match else None


def _tuple_index(computation: _Computation, name: str) -> int | None:
    instruction = computation.instructions.get(name)
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    match = re.search(r"index=(\d+)", instruction.text)
    return int(match[1]) if match else None
