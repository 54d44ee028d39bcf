"""`python -m sophia_levanter.commands.prepare_data --config FILE`: create a run's token stores in advance."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from sophia_levanter.config.arguments import parse_arguments
from sophia_levanter.config.command_line import load_config
from sophia_levanter.errors import one_line
from sophia_levanter.run.directory import with_absolute_paths
from sophia_levanter.status import DONE, PREEMPTED, run_command

USAGE = """\
usage: python -m sophia_levanter.commands.prepare_data --config FILE [--ray ADDRESS] [--data.FIELD VALUE ...] [--help]

Create the token stores for a configuration's data section in data.cache_dir; existing stores are left unchanged. The
command can be killed at any time; run it again to continue. Training does the same when a store is missing.

  --config FILE          a run's configuration, or only its data section, such as config/data/openwebtext.yaml
  --ray ADDRESS          tokenize on the cores of this Ray cluster (auto: the cluster on this machine) instead of in
                         data.num_workers processes
  --data.FIELD VALUE     override a field in the file: --data.train 'texts/*.jsonl.zst'
  --help                 show this help message and exit"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0 on success, 1 on failure, 2 on bad input, 75 on SIGTERM, or 130 on Ctrl-C."""
    return run_command(argv, _prepare, usage=USAGE)


def _prepare(words: Sequence[str]) -> int:
    arguments = parse_arguments(words, options=("--config", "--ray"), overrides=True)
    path = Path(arguments.needed("--config", "FILE", "for example, --config config/data/openwebtext.yaml"))
    ray = arguments.options.get("--ray")
    config = with_absolute_paths(load_config(path, arguments.overrides))

    def stop(number: int, frame: FrameType | None) -> None:
        print("SIGTERM: stopped; run the same command again to continue", file=sys.stderr)
        sys.exit(PREEMPTED)

    signal.signal(signal.SIGTERM, stop)
    # Import slow modules after the checks, so that mistakes are reported immediately.
    from sophia_levanter.data.batches import sequence_counts
    from sophia_levanter.data.corpora import prepare

    data = prepare(config.data, lambda line: print(one_line(line), flush=True), ray=ray)
    sets = {f"validation {name}".rstrip(): corpus for name, corpus in data.validation_sets.items()}
    for name, corpus in {"training": data.train, **sets}.items():
        print(f"{corpus.num_tokens:,} {name} tokens ({data.tokenizer.name})")
    sequence_counts(data.train, config.model.seq_len)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
