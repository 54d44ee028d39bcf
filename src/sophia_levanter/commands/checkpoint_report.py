"""Text reports on checkpoints: lists, descriptions and differences."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sophia_levanter.checkpoint.manifest import CheckpointError, Manifest, SavedArray
from sophia_levanter.checkpoint.restoring import damage, read_arrays, read_step
from sophia_levanter.errors import InputError, counted
from sophia_levanter.tracking.console import show_age


def list_steps(location: str, steps: Sequence[int]) -> Iterator[str]:
    """Yield the lines of a table of the checkpoints in a folder, given its path or URL."""
    best = best_step(location, steps)
    yield f"{'step':>10}  {'saved':<16}  {'size':>9}  {'loss':>8}  {'validation':>10}"
    for step in steps:
        try:
            manifest = read_step(location, step)
        except (CheckpointError, InputError) as error:
            yield f"{step:>10}  damaged: {error}"
            continue
        metrics = _mapping(manifest.metadata, "metrics")
        yield (
            f"{step:>10}  {show_age(manifest.saved_at):<16}  {_size(_num_bytes(manifest.arrays)):>9}  "
            f"{_number(metrics.get('train/loss')):>8}  {_number(metrics.get('validation/loss')):>10}"
            + ("  best" if step == best else "")
        )


def verify(location: str, step: int) -> tuple[list[str], str]:
    """Read every byte of a checkpoint. Return a line for each damaged file, and a one-line summary."""
    started = time.perf_counter()
    try:
        wrong = damage(location, step)
    except InputError as error:  # a checkpoint in a different format must not prevent checking the others
        wrong = [str(error)]
    if wrong:
        return wrong, f"damaged, {counted(len(wrong), 'file')}"
    arrays = read_step(location, step).arrays
    files = 1 + sum(1 + len(array.chunks) for array in arrays)
    return [], f"intact, {counted(files, 'file')}, {_size(_num_bytes(arrays))}, {time.perf_counter() - started:.1f} s"


def describe(location: str, step: int) -> Iterator[str]:
    """Yield lines that describe a checkpoint: its metadata, and a tree of arrays with shapes, chunks, sizes and norms.

    Raises:
        CheckpointError: if the checkpoint is damaged.
    """
    manifest = read_step(location, step)
    saved_at = datetime.datetime.fromtimestamp(manifest.saved_at, datetime.UTC)
    when = f"{saved_at:%Y-%m-%d %H:%M:%S} UTC ({show_age(manifest.saved_at)})"
    yield f"step {manifest.step} of run {manifest.run_id}, saved {when}"
    for name in ("metrics", "best", "code", "environment", "data", "validation"):
        values = manifest.metadata.get(name)
        if values:
            yield f"{name}: {_in_line(values)}"
    for section, fields in _mapping(manifest.metadata, "config").items():
        yield f"config.{section}: {_in_line(fields)}"
    yield ""
    yield from _tree(location, manifest)
    yield ""
    for branch in dict.fromkeys(array.path.split(".")[0] for array in manifest.arrays):
        arrays = [array for array in manifest.arrays if array.path.split(".")[0] == branch]
        if len(arrays) == 1:
            continue
        numbers = sum(int(np.prod(array.shape, dtype=np.int64)) for array in arrays)
        yield f"{branch}: {counted(len(arrays), 'array')}, {numbers:,} elements, {_size(_num_bytes(arrays))}"


def compare(location: str, first: int, second: int) -> Iterator[str]:
    """Yield lines that compare two checkpoints: configuration, missing or reshaped arrays, and changed arrays.

    Raises:
        CheckpointError: if one of the checkpoints is damaged.
    """
    a, b = read_step(location, first), read_step(location, second)
    before, after = (_flat(_mapping(m.metadata, "config")) for m in (a, b))
    for name in dict.fromkeys([*before, *after]):
        if before.get(name) != after.get(name):
            yield f"config.{name}: {before.get(name)} at step {first}, {after.get(name)} at step {second}"
    mine, other = ({array.path: array for array in m.arrays} for m in (a, b))
    for path in dict.fromkeys([*mine, *other]):
        if _shape(mine.get(path)) != _shape(other.get(path)):
            yield f"{path}: {_shape(mine.get(path))} at step {first}, {_shape(other.get(path))} at step {second}"
    common = [path for path in mine if path in other and mine[path].shape == other[path].shape]
    pairs = zip(
        read_arrays(location, replace(a, arrays=[mine[path] for path in common])),
        read_arrays(location, replace(b, arrays=[other[path] for path in common])),
        strict=True,
    )
    width, same = max(map(len, common), default=0), 0
    for (path, x), (_, y) in pairs:
        if x.dtype == y.dtype and x.tobytes() == y.tobytes():
            same += 1
            continue
        change = np.abs(y.astype(np.float64) - x.astype(np.float64))
        norm = _norm(x)
        relative = f"relative change {_norm(change) / norm:.3e}" if norm else "changed from zero"
        yield f"{path:<{width}}  {relative}, largest change {change.max():.3e}"
    yield f"{same} of {len(common)} arrays are identical"


def best_step(location: str, steps: Sequence[int]) -> int | None:
    """Return the step with the lowest validation loss, as recorded in the newest readable checkpoint."""
    for step in reversed(steps):
        try:
            best = _mapping(read_step(location, step).metadata, "best").get("step")
        except (CheckpointError, InputError):
            continue
        return best if isinstance(best, int) else None
    return None


def size_of_step(location: str, step: int) -> str:
    """Format the total size of the arrays in a checkpoint."""
    try:
        return _size(_num_bytes(read_step(location, step).arrays))
    except (CheckpointError, InputError):
        return "damaged"


def _tree(location: str, manifest: Manifest) -> Iterator[str]:
    saved = {array.path: array for array in manifest.arrays}
    width = max((2 * path.count(".") + len(path.split(".")[-1]) for path in saved), default=0)
    above: list[str] = []
    for path, array in read_arrays(location, manifest):
        *branches, name = path.split(".")
        shared = 0
        while shared < min(len(above), len(branches)) and above[shared] == branches[shared]:
            shared += 1
        for depth in range(shared, len(branches)):
            yield "  " * depth + branches[depth]
        above = branches
        yield (
            f"{'  ' * len(branches) + name:<{width}}  {_shape(saved[path])}, "
            f"{counted(len(saved[path].chunks), 'chunk')}, {_size(saved[path].num_bytes)}, {_contents(array)}"
        )


def _contents(array: np.ndarray) -> str:
    if array.ndim == 0:
        return f"= {array.item()}"
    numbers = array.astype(np.float64)
    bad = numbers.size - int(np.isfinite(numbers).sum())
    return f"norm {_norm(numbers[np.isfinite(numbers)]):.4g}" + (f", {bad:,} NON-FINITE" if bad else "")


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array.astype(np.float64).reshape(-1)))


def _shape(array: SavedArray | None) -> str:
    return "missing" if array is None else f"{array.dtype}{list(array.shape)}"


def _num_bytes(arrays: Sequence[SavedArray]) -> int:
    return sum(array.num_bytes for array in arrays)


def _mapping(metadata: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a metadata section, or {} if it is not a mapping, as in checkpoints from other programs."""
    value = metadata.get(name)
    return value if isinstance(value, Mapping) else {}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _in_line(values: Any) -> str:
    if not isinstance(values, Mapping):
        return str(values)
    shown = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in values.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) and abs(value) < 1e9 else "-"


def _size(num_bytes: int) -> str:
    if num_bytes < 1000:
        return f"{num_bytes} B"
    power = min(4, (len(str(num_bytes)) - 1) // 3)
    return f"{num_bytes / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"
