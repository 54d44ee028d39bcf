"""Tables of what sharding does, compiled and not run: `python -m sophia_levanter.benchmarks.scaling TABLE`.

`state`: bytes of parameters, momentum and curvature on each device under FSDP. `refresh`: temporaries of refresh steps
beside plain ones. `weak`: what each TPU sends in a step while devices and rows grow together. `configs`: every
configuration on a target of its size. All but the first need libtpu: pip install 'sophia-levanter[tpu]'.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from sophia_levanter.benchmarks.timing import markdown_table
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.command_line import load_config
from sophia_levanter.config.optimizer import SophiaConfig
from sophia_levanter.config.run import check_mesh
from sophia_levanter.data.tokenizer import vocab_size_of
from sophia_levanter.models.language_model import abstract_model
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.planning.run_plan import SECONDS_PER_DAY, fsdp_minimum, hutchinsons_microbatch
from sophia_levanter.planning.step_plan import plan_step, step_time
from sophia_levanter.planning.target import GIB, Target, pretended_target, tpu_target
from sophia_levanter.run.summary import count_parameters, describe_mesh
from sophia_levanter.training.costs import abstract_state, flops_per_step

VOCAB_SIZE = 50257
FSDP = ("mesh.fsdp", "embed")
# A target for each size of the configurations, over how many devices rows are spread there, and what a run sets.
TARGETS = {
    "nano": ("1 x a100-40", 1, []),
    "small": ("v4:2x2x1", 4, [("trainer.microbatch_size", "48")]),
    "medium": ("v4:2x2x2", 8, [FSDP, ("trainer.microbatch_size", "48")]),
    "large": ("v4:2x2x4", 16, [("trainer.microbatch_size", "48")]),
    "xl": ("v5e:16x16", 32, [("mesh.model", "8"), ("trainer.microbatch_size", "96")]),
    "125m": ("v4:2x2x2", 8, [("trainer.microbatch_size", "64")]),
    "1b": ("v4:2x2x4", 16, [("trainer.microbatch_size", "64")]),
}

Table = tuple[list[str], Iterator[list[object]]]


def state_table(configs: Path) -> Table:
    """What a step is given on each of N devices: parameters, momentum, curvature, and the batch's windows."""

    def rows() -> Iterator[list[object]]:
        single = 0
        for count in (1, 2, 4, 8):
            config = load_config(configs / "gpt2_medium_sophia.yaml", [FSDP])
            partition = partition_of(config.mesh, jax.devices()[:count])
            size = plan_step(config, partition, VOCAB_SIZE, refresh=False).arguments
            single = single or size
            yield [count, f"{size / 1e6:,.1f}", f"{size * count / single:.4f}"]

    return ["devices", "MB on each", "beside one device's share"], rows()


def refresh_table(configs: Path) -> Table:
    """Temporaries of the refresh step of both estimators beside the plain step's, on one TPU's rows."""

    def rows() -> Iterator[list[object]]:
        for target in (tpu_target("v4:2x2x1"), tpu_target("v5e:2x2")):
            for per_device in (4, 12):
                microbatch = ("trainer.microbatch_size", str(per_device * target.num_devices))
                g = load_config(configs / "gpt2_small_sophia.yaml", [microbatch])
                h = load_config(configs / "gpt2_small_sophia_h.yaml", [microbatch])
                partition = partition_of(g.mesh, target.devices())
                plain = plan_step(g, partition, VOCAB_SIZE, refresh=False)
                refresh = plan_step(g, partition, VOCAB_SIZE, refresh=True)
                assert plain.temporaries and refresh.temporaries
                own = hutchinsons_microbatch(
                    h, partition, VOCAB_SIZE, plan_step(h, partition, VOCAB_SIZE, refresh=False)
                )
                yield [
                    target.name,
                    per_device,
                    f"{plain.temporaries / GIB:.2f}",
                    f"{refresh.temporaries / plain.temporaries:.2f}",
                    f"{own[1]:.2f} with {own[0] // target.num_devices}" if own else "none",
                ]

    return ["TPUs", "rows on each", "plain step's GiB", "Sophia-G's refresh", "Sophia-H's, with rows on each"], rows()


def weak_table(configs: Path) -> Table:
    """What each TPU sends while both devices and rows grow, beside the least for FSDP."""

    def rows() -> Iterator[list[object]]:
        for name, replicas in (("v5e:2x4", 1), ("v5e:8x8", 4), ("v5e:8x8", 1), ("v5e:16x16", 16), ("v5e:16x16", 1)):
            target = tpu_target(name)
            batch = ("trainer.batch_size", str(4 * target.num_devices))
            overrides = [FSDP, batch, ("trainer.microbatch_size", "null"), ("mesh.replica", str(replicas))]
            config = load_config(configs / "gpt2_large_sophia.yaml", overrides)
            partition = partition_of(config.mesh, target.devices())
            least = fsdp_minimum(config, partition, abstract_state(config, partition, VOCAB_SIZE))
            for refresh in (False, True):
                sent = plan_step(config, partition, VOCAB_SIZE, refresh=refresh).collectives
                total, minimum = sum(sent.values()), least[refresh]
                assert minimum
                kinds = ", ".join(f"{kind} {n / 1e9:.2f}" for kind, n in sorted(sent.items()) if n > 5e6)
                mesh = f"{replicas} x {target.num_devices // replicas}"
                step = "refresh" if refresh else "plain"
                yield [target.num_devices, mesh, step, f"{total / 1e9:.2f}", f"{total / minimum:.2f}", kinds]

    return ["TPUs", "replica x data", "step", "GB from each", "beside the least", "of which"], rows()


def configs_table(configs: Path) -> Table:
    """Every configuration on a target of its size."""

    def rows() -> Iterator[list[object]]:
        for path in sorted(configs.glob("*.yaml")):
            name, row_shards, overrides = TARGETS[path.stem.split("_")[1]]
            if path.stem.endswith("sophia_h"):  # the files' own is for one accelerator
                overrides = [*overrides, ("optimizer.curvature_microbatch_size", str(row_shards))]
            target = tpu_target(name) if ":" in name else pretended_target(1, name.split()[-1])
            yield _config_row(path, load_config(path, overrides), target)

    header = ["configuration", "on", "mesh", "parameters", "GiB, plain", "refresh", "GB sent, plain", "refresh"]
    return [*header, "FLOPs a step", "days at an MFU of 0.4"], rows()


def _config_row(path: Path, config: TrainConfig, target: Target) -> list[object]:
    partition = partition_of(config.mesh, target.devices() if target.topology else jax.devices()[:1])
    vocab_size = vocab_size_of(config.data.tokenizer)
    check_mesh(config, partition.mesh.size, vocab_size)
    kinds = (False, True) if isinstance(config.optimizer, SophiaConfig) else (False,)
    plans = {refresh: plan_step(config, partition, vocab_size, refresh=refresh) for refresh in kinds}
    none = ["-"] * (2 - len(plans))
    memory = ["-" if p.temporaries is None else f"{(p.arguments + p.temporaries) / GIB:.2f}" for p in plans.values()]
    sent = [f"{sum(p.collectives.values()) / 1e9:.1f}" for p in plans.values()]
    seconds = step_time(config, partition, vocab_size, plans, target, mfu=0.4).overlapped
    return [
        path.stem,
        target.name,
        describe_mesh(partition),
        f"{count_parameters(abstract_state(config, partition, vocab_size).model):,}",
        *memory,
        *none,
        *sent,
        *none,
        f"{flops_per_step(config, abstract_model(config.model, vocab_size).flops_per_token):.2e}",
        f"{seconds * config.trainer.num_train_steps / SECONDS_PER_DAY:.3g}",
    ]


TABLES = {"state": state_table, "refresh": refresh_table, "weak": weak_table, "configs": configs_table}


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--configs", type=Path, default=Path("config"), help="the folder of the configurations")
    arguments = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    header, rows = TABLES[arguments.table](arguments.configs)
    print(markdown_table(header, []), flush=True)
    for row in rows:
        print(markdown_table([str(cell) for cell in row], []).splitlines()[0], flush=True)


if __name__ == "__main__":
    main()
