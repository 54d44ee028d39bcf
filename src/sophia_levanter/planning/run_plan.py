"""Describe the memory, communication and time of a whole run in human-readable lines."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax

from sophia_levanter.accelerators import GIB, QR_SIDE
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.assembly import check_optimizer, describe_transfer
from sophia_levanter.config.run import check_mesh
from sophia_levanter.data.tokenizer import vocab_size_of
from sophia_levanter.errors import InputError, counted
from sophia_levanter.models.language_model import abstract_model, count_parameters
from sophia_levanter.optim._trees import is_named
from sophia_levanter.partition.mesh import Partition, partition_of
from sophia_levanter.planning.step_plan import (
    BETWEEN,
    COMPUTE,
    MEMORY,
    WITHIN,
    StepPlan,
    StepTime,
    activation_bytes,
    gradient_bytes,
    mean_bytes_sent,
    plan_step,
    step_time,
)
from sophia_levanter.planning.target import Target
from sophia_levanter.run.summary import attention_of, describe_layout
from sophia_levanter.training.costs import abstract_state, bytes_by_kind, flops_per_step

# The largest acceptable ratio of the size of temporaries in a Hutchinson refresh step to that in a plain step.
REFRESH_RATIO = 1.25
SECONDS_PER_DAY = 86_400
MIB = 2**20


def describe(config: TrainConfig, name: str, target: Target, mfu: float) -> Iterator[str]:
    """Describe a run on a target, yielding each line as soon as it is computed.

    Args:
        config: the run's configuration.
        name: the configuration's name, for display.
        target: the devices.
        mfu: the expected model FLOPs utilization.

    Raises:
        InputError: if the run does not fit the mesh, the optimizer does not fit the model, or the target's compiler is
            missing.
    """
    vocab_size = vocab_size_of(config.data.tokenizer)
    if target.num_slices > 1 and config.mesh.replica != target.num_slices:
        raise InputError(
            f"mesh.replica is {config.mesh.replica}, but --target has {target.num_slices} slices; set --mesh.replica "
            f"{target.num_slices}, so that only gradients are sent between them"
        )
    check_mesh(config, target.num_devices, vocab_size)
    if config.trainer.batch_size_changes:
        largest_part = max(config.trainer.parts, key=lambda trainer: trainer.batch_size)
        config = dataclasses.replace(config, trainer=largest_part)
        yield f"the batch size changes during the run; all numbers are for batch size {largest_part.batch_size}"
    partition = partition_of(config.mesh, target.devices())
    # This builds an abstract model, which uses jax, so it must follow `target.devices()`.
    check_optimizer(config.optimizer, config.model, vocab_size)
    attention = attention_of(config, partition)
    state = abstract_state(config, partition, vocab_size)
    yield ", ".join([f"{name} on {target.name}, {counted(target.num_devices, 'device')}", *describe_layout(partition)])
    if target.topology is None:
        yield (
            "approximate: compiled for this machine's CPU, whose compiler lays out temporaries differently and uses "
            "all-reduce instead of reduce-scatter"
        )
    if attention is not None:
        yield f"attention         {attention}"
    if transfer := describe_transfer(config):
        yield f"parametrization   {transfer}"
    yield from _size(config, state, vocab_size)
    estimator = config.optimizer.build(config.trainer.num_train_steps).estimator
    kinds = (False,) if estimator is None else (False, True)
    plans = {refresh: plan_step(config, partition, vocab_size, refresh=refresh) for refresh in kinds}
    yield from _memory(config, partition, vocab_size, state, plans, target)
    yield from _collectives(config, partition, state, plans)
    yield from _time(config, step_time(config, partition, vocab_size, plans, target, mfu), target, mfu)
    yield _largest_microbatch(config, partition, vocab_size, target.chip.memory)
    # A plug-in's settings may lack the field.
    if estimator is not None and estimator.forward_mode and hasattr(config.optimizer, "curvature_microbatch_size"):
        yield _hutchinsons_microbatch(config, partition, vocab_size, plans[False])


def _size(config: TrainConfig, state: object, vocab_size: int) -> Iterator[str]:
    per_token, steps = abstract_model(config.model, vocab_size).flops_per_token, config.trainer.num_train_steps
    flops = flops_per_step(config, per_token)
    extra = flops / (per_token * config.trainer.batch_size * config.model.seq_len) - 1
    yield f"parameters        {count_parameters(state.model):,}"  # type: ignore[attr-defined]
    yield (
        f"FLOPs             {flops:.3g} per step, with {extra:.1%} overhead for curvature and matrices; "
        f"{flops * steps:.3g} per run"
    )


def _time(config: TrainConfig, time: StepTime, target: Target, mfu: float) -> Iterator[str]:
    first, last = f"{time.overlapped:.3g}", f"{time.serial:.3g}"
    yield f"time              {first} s per step if everything overlaps, {last} s if nothing does"
    yield f"  {_bound(time, target, mfu)}"
    if time.bound in (WITHIN, BETWEEN):
        yield f"  hint: use {' or '.join(_remedies(config, time, target))}"
    steps, tokens = config.trainer.num_train_steps, config.trainer.batch_size * config.model.seq_len
    first, last = (f"{seconds * steps / SECONDS_PER_DAY:.3g}" for seconds in (time.overlapped, time.serial))
    yield f"  {first if first == last else f'{first} to {last}'} days for {counted(steps, 'step')} of {tokens:,} tokens"
    yield f"  computed from published rates, not measured on these devices: {', '.join(_rates(time, target))}"


def _bound(time: StepTime, target: Target, mfu: float) -> str:
    """Describe the longest part of a step and the time of each part."""
    compute = [f"matrix products {time.products:.3g} s at an MFU of {mfu:g}"]
    compute += [f"QR {time.qr:.3g} s"] * bool(time.qr)
    compute += [f"Newton-Schulz {time.newton_schulz:.3g} s"] * bool(time.newton_schulz)
    details = {COMPUTE: f" ({', '.join(compute)})"}

    def times(*parts: str) -> str:
        return ", ".join(f"{part} {time.parts[part]:.3g} s{details.get(part, '')}" for part in parts)

    if time.within is None:
        return f"{times(COMPUTE, MEMORY)}, communication unknown: the step does not fit"
    parts = [COMPUTE, MEMORY, *[WITHIN] * (target.num_devices > 1), *[BETWEEN] * (target.num_nodes > 1)]
    line = f"bounded by {time.bound}: {times(*parts)}"
    return line.replace("node", "slice") if target.topology else line


def _rates(time: StepTime, target: Target) -> Iterator[str]:
    chip = target.chip
    yield f"memory {chip.memory_bandwidth / 1e9:,.0f} GB/s"
    if target.num_devices > 1:
        yield f"links within a {'slice' if target.topology else 'node'} {chip.bandwidth / 1e9:g} GB/s"
    if target.num_nodes > 1:
        yield f"network between {'slices' if target.topology else 'nodes'} {chip.network / 1e9:g} GB/s"
    if time.qr:
        source = "published" if chip.qr_measured else "assumed"
        yield f"QR {chip.qr_flops / 1e12:g} TFLOP/s for {QR_SIDE} x {QR_SIDE} matrices ({source})"
    if time.newton_schulz:
        yield f"Newton-Schulz {chip.newton_schulz_flops / 1e12:g} TFLOP/s (assumed)"


def _remedies(config: TrainConfig, time: StepTime, target: Target) -> Iterator[str]:
    """Yield settings that reduce the number of bytes sent per token."""
    mesh = config.mesh
    if time.bound == BETWEEN and mesh.fsdp is not None and mesh.replica < target.num_nodes:
        yield f"mesh.replica {target.num_nodes} (only gradients are sent between nodes)"
    for axis in ("sequence", "model"):
        if getattr(mesh, axis) > 1:
            yield f"a smaller mesh.{axis}"
    # Parameters are gathered and gradients are reduced once per microbatch.
    yield "a larger trainer.microbatch_size" if config.trainer.num_microbatches > 1 else "a larger trainer.batch_size"


def _memory(
    config: TrainConfig,
    partition: Partition,
    vocab_size: int,
    state: object,
    plans: dict[bool, StepPlan],
    target: Target,
) -> Iterator[str]:
    known = bytes_by_kind(state)  # type: ignore[arg-type]
    gradients = gradient_bytes(state) * (config.trainer.num_microbatches > 1)  # type: ignore[arg-type]
    activations = activation_bytes(config, partition, vocab_size)
    # XLA may keep fewer bytes than differentiation requests.
    kept = [
        None if p.temporaries is None else min(activations, max(0, p.temporaries - gradients)) for p in plans.values()
    ]
    rest = [
        None if plan.temporaries is None else max(0, plan.temporaries - gradients - (size or 0))
        for plan, size in zip(plans.values(), kept, strict=True)
    ]
    totals = [None if plan.temporaries is None else plan.arguments + plan.temporaries for plan in plans.values()]
    name, unit = ("GiB", GIB) if max(sum(known.values()), *(total or 0 for total in totals)) >= GIB else ("MiB", MIB)
    yield f"{name} per device ({target.chip.memory / unit:,.0f} available):"
    yield _heading(plans)
    for kind, size in {**known, "gradient sum": gradients}.items():
        yield _row(kind, [size] * len(plans), unit)
    # The rest of the arguments is the batch, and the padding that layouts add to arrays in the state.
    yield _row("batch and padding", [plan.arguments - sum(known.values()) for plan in plans.values()], unit)
    yield _row("activations", kept, unit)
    yield _row("other temporaries", rest, unit)
    yield _row("total", totals, unit)
    if True in plans and None not in (plans[True].temporaries, plans[False].temporaries):
        ratio = plans[True].temporaries / plans[False].temporaries  # type: ignore[operator]
        yield f"  a refresh step needs {ratio:.2f} times the temporaries of a plain step"
    if not all(plan.fits(target.chip.memory) for plan in plans.values()):
        yield "  the run does not fit in memory"


def _heading(plans: Iterable[bool]) -> str:
    return _row("", ["refresh step" if refresh else "plain step" for refresh in plans], 1)


def _row(name: str, cells: Iterable[float | str | None], unit: float) -> str:
    shown = ["does not fit" if x is None else x if isinstance(x, str) else f"{x / unit:.2f}" for x in cells]
    return f"  {name:22}" + "".join(f"{cell:>14}" for cell in shown)


def _collectives(
    config: TrainConfig, partition: Partition, state: object, plans: dict[bool, StepPlan]
) -> Iterator[str]:
    if not any(plan.collectives for plan in plans.values()):
        return
    kinds = sorted({kind for plan in plans.values() for kind in plan.collectives})
    totals = {refresh: sum(plan.collectives.values()) for refresh, plan in plans.items()}
    name, unit = ("GB", 1e9) if max(totals.values()) >= 1e9 else ("MB", 1e6)
    yield f"{name} sent by each device per step:"
    yield _heading(plans)
    for kind in kinds:
        yield _row(kind, [plan.collectives.get(kind, 0) for plan in plans.values()], unit)
    yield _row("total", totals.values(), unit)
    if any(plan.between_nodes for plan in plans.values()):
        others = "to other slices" if partition.platform == "tpu" else "to other nodes"
        yield _row(others, [plan.between_nodes for plan in plans.values()], unit)
    if config.mesh.fsdp is not None:
        least = fsdp_minimum(config, partition, state)
        yield _row("FSDP minimum", ["-" if least[r] is None else least[r] for r in plans], unit)
    if True in plans:
        yield f"  {sum(mean_bytes_sent(config, plans)) / unit:.2f} on average over the run"


def fsdp_minimum(config: TrainConfig, partition: Partition, state: object) -> dict[bool, float | None]:
    """Return the minimum number of bytes that a device sends in a plain and in a refresh step, keyed by `refresh`.

    Parameters are gathered in the compute dtype. Each microbatch gathers each sharded parameter twice and scatters its
    gradient once; in a GNB refresh with an extra pass, it also scatters a second gradient. Each of n devices already
    holds 1 / n of each parameter. The value for a Hutchinson refresh, which uses separate microbatches, is None.
    """
    item, devices = 2 if config.trainer.compute_dtype == "bfloat16" else 4, partition.mesh.shape["data"]
    gathered = _gathered_elements(partition, state.model, config.mesh.fsdp)  # type: ignore[attr-defined]
    once = item * gathered * (devices - 1) / devices
    plain = 3.0 * once * config.trainer.num_microbatches
    curvature = config.optimizer.curvature_microbatches(config.trainer)
    estimator = config.optimizer.build(config.trainer.num_train_steps).estimator
    if curvature is None or estimator.forward_mode:
        return {False: plain, True: None}
    return {False: plain, True: plain + once * curvature[0] if estimator.gradients else plain}


def _gathered_elements(partition: Partition, model: object, fsdp: str | None) -> int:
    """Return the number of elements in FSDP-sharded parameters on a device after they have been gathered."""
    named = [leaf for leaf in jax.tree.leaves(model, is_leaf=is_named) if is_named(leaf)]
    parts = [leaf.array for leaf in named if fsdp in {axis.name for axis in leaf.axes}]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * partition.mesh.shape["data"] for x in parts)


def _largest_microbatch(config: TrainConfig, partition: Partition, vocab_size: int, memory: float) -> str:
    """Describe the largest microbatch size for which the step that uses the most memory fits.

    Sizes must divide the batch size and be multiples of the number of devices over which a batch is sharded.
    """
    batch_size = config.trainer.batch_size
    refresh = config.optimizer.curvature_microbatches(config.trainer) is not None
    step = partition.row_shards
    sizes = [n for n in range(step, batch_size + 1, step) if batch_size % n == 0]

    def fits(size: int) -> bool:
        trainer = dataclasses.replace(config.trainer, microbatch_size=size)
        try:
            own = dataclasses.replace(config, trainer=trainer)
        except InputError:  # the refresh would leave no microbatch for the gradient
            return False
        return plan_step(own, partition, vocab_size, refresh=refresh).fits(memory)

    found = largest(sizes, fits)
    if found is None:
        least = f"trainer.microbatch_size {step}, the smallest"
        return f"{least}, does not fit in {memory / GIB:.0f} GiB; use more devices with mesh.fsdp or mesh.model"
    return f"the largest trainer.microbatch_size that fits is {found} (trainer.batch_size {batch_size})"


def largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Return the largest of the ascending `sizes` that fits, or None. Try the last first, because `fits` is slow."""
    if fits(sizes[-1]):
        return sizes[-1]
    # The index of the first size that does not fit; the last one is known not to.
    first_too_large = bisect_left(sizes, True, hi=len(sizes) - 1, key=lambda size: not fits(size))
    return sizes[first_too_large - 1] if first_too_large else None


def _hutchinsons_microbatch(config: TrainConfig, partition: Partition, vocab_size: int, plain: StepPlan) -> str:
    """Describe the largest `curvature_microbatch_size` whose refresh step stays within `REFRESH_RATIO`."""
    trainer, optimizer = config.trainer, config.optimizer
    rows = trainer.gradient_microbatch_size
    sizes = [n for n in range(partition.row_shards, rows + 1, partition.row_shards) if rows % n == 0]
    ratios = {}

    def near_plain(size: int) -> bool:
        own = dataclasses.replace(config, optimizer=dataclasses.replace(optimizer, curvature_microbatch_size=size))  # type: ignore[call-arg]
        found = plan_step(own, partition, vocab_size, refresh=True)
        if found.temporaries is None or plain.temporaries is None:
            return False
        ratios[size] = found.temporaries / plain.temporaries
        return ratios[size] <= REFRESH_RATIO

    size = largest(sizes, near_plain)
    if size is None:
        return (
            f"no optimizer.curvature_microbatch_size keeps a refresh step within {REFRESH_RATIO} times the temporaries "
            "of a plain step"
        )
    return (
        f"the largest optimizer.curvature_microbatch_size that keeps a refresh step within {REFRESH_RATIO} times the "
        f"temporaries of a plain step is {size} ({ratios[size]:.2f} times)"
    )
