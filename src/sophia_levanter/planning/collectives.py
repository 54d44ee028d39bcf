"""What devices send each other in a compiled program, read from its HLO text."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_OPCODE = re.compile(r" (?P<opcode>[a-z][a-z0-9\-]*)\((?P<operands>[^)]*)\)")
_ARRAY = re.compile(r"\b(?P<dtype>pred|bf16|[sfuc]\d+)\[(?P<shape>[\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=\{?([^,}\s]+(?:, ?%[^,}\s]+)*)\}?")


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


def collective_bytes(hlo: str) -> dict[str, float]:
    """Bytes that go through each kind of collective on one device, loops counted as often as they turn.

    An all-gather counts its result, a reduce-scatter its operand, an all-reduce its result twice (it is one of each),
    the others their operand: what a ring of many devices sends.

    Args:
        hlo: the text of a compiled module (`Compiled.as_text()`).

    Raises:
        ValueError: if a loop with collectives inside does not say how often it turns.
    """
    computations, entry = _parse(hlo)
    return {kind: float(count) for kind, count in _count(computations, entry).items() if count}


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    current: _Computation | None = None
    entry = ""
    # TPU's text has indices of long tuples as comments.
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
    """Without the braces of layouts, whose parentheses would be taken for operands."""
    return re.sub(r"\{[^{}]*\}", "", text)


def _array_bytes(text: str) -> int:
    """Of all arrays that a type names."""
    return sum(
        _BYTES.get(dtype, 4) * math.prod(int(n) for n in shape.split(",") if n) for dtype, shape in _ARRAY.findall(text)
    )


def _count(computations: dict[str, _Computation], name: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    computation = computations.get(name, _Computation())
    for instruction_name, instruction in computation.instructions.items():
        kind = instruction.opcode.removesuffix("-start")
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
            # How TPU's text writes a reduce-scatter: the slice that is taken of it is all that arrives.
            counts["reduce-scatter"] += instruction.result_bytes
        elif kind in KINDS:
            counts[kind] += _moved(kind, instruction, computation)
        elif instruction.opcode == "while":
            body = _attribute(instruction.text, "body")
            inside = _count(computations, body)
            if inside:
                turns = _turns(computations, instruction)
                counts.update({kind: turns * count for kind, count in inside.items()})
        elif not _continues(instruction_name, instruction):
            for called in instruction.called:
                counts.update(_count(computations, called))
    return counts


def _continues(name: str, instruction: _Instruction) -> bool:
    """Whether a fusion holds a collective that another one has started, which TPU's text repeats in every part."""
    return name.startswith("async-collective-done") or any(
        called.startswith("async_collective_fusion") for called in instruction.called
    )


def _moved(kind: str, instruction: _Instruction, computation: _Computation) -> int:
    operands = sum(
        computation.instructions[name].result_bytes for name in instruction.operands if name in computation.instructions
    )
    if kind == "all-gather":
        # A started one results in its operands beside its results.
        started = instruction.opcode.endswith("-start")
        return instruction.result_bytes - (operands if started else 0)
    if kind == "all-reduce":
        # TPUs narrow the operand on the way.
        return 2 * instruction.result_bytes
    return operands


def _attribute(text: str, name: str) -> str:
    match = re.search(rf"{name}=%?([\w.\-]+)", text)
    return match[1] if match else ""


def _turns(computations: dict[str, _Computation], loop: _Instruction) -> int:
    """How often a loop turns: as it says, or from the constant its counter is compared with and the counter's step."""
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
        raise ValueError(f"how often the loop {_attribute(loop.text, 'body')} turns cannot be told")
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
