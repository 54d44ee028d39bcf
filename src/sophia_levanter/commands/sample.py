"""`python -m sophia_levanter.commands.sample MODEL`: generate text with a trained model."""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sophia_levanter.commands.on_models import run_on_model, tell
from sophia_levanter.config.arguments import Arguments, parse_arguments, whole_number
from sophia_levanter.config.trainer import Sampling
from sophia_levanter.errors import InputError, counted
from sophia_levanter.files import read_regular
from sophia_levanter.status import DONE

if TYPE_CHECKING:
    import jax

    from sophia_levanter.data.tokenizer import Tokenizer
    from sophia_levanter.run.loading import LoadedModel

OPTIONS = ("--prompt_file", "--tokens", "--temperature", "--top_k", "--top_p", "--seed", "--samples", "--step")
TOKENS = 200
MOST_PROMPT_BYTES = 1 << 26
USAGE = f"""\
usage: python -m sophia_levanter.commands.sample MODEL [--prompt TEXT ...] [--prompt_file FILE] [--tokens N]
       [--temperature T] [--top_k K] [--top_p P] [--seed S] [--samples N] [--step N] [--averaged]
       [--SECTION.FIELD VALUE ...] [--help]

Generate text with a trained model, and print each prompt with its continuation up to the end of the document. A single
text is printed token by token; several texts are printed at the end, each under a heading. All other output goes to
standard error.

  MODEL                  a run directory, a folder saved by transformers, or nanoGPT's ckpt.pt
  --prompt TEXT          beginning of the text; can be repeated. Without a prompt, the model begins a new document
  --prompt_file FILE     read a prompt from a UTF-8 file, unchanged
  --tokens N             maximum number of tokens to generate (default: {TOKENS}); may exceed the model's context
  --temperature T        sampling temperature (default: {Sampling.temperature}); 0 picks the most likely token
  --top_k K              sample only from the K most likely tokens
  --top_p P              sample from the smallest set of most likely tokens with total probability P, after applying
                         the temperature and --top_k
  --seed S               random seed (default: 0)
  --samples N            number of texts per prompt (default: 1)
  --step N               load the run's checkpoint at step N (default: the newest)
  --averaged             use the averaged weights of a run with trainer.ema_decay or trainer.lawa_every
  --SECTION.FIELD VALUE  override a field of the run: --trainer.compute_dtype float32, --mesh.fsdp embed
  --help                 show this help message and exit"""


@dataclass(frozen=True)
class Command:
    """The parsed command line. Without prompts, the model begins a new document."""

    model: str
    prompts: Sequence[str]
    tokens: int
    sampling: Sampling
    seed: int
    samples: int
    step: int | None
    averaged: bool
    overrides: Sequence[tuple[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0 on success, 1 on failure or a corrupt checkpoint, 2 on bad input, or 130 on Ctrl-C."""
    return run_on_model(argv, parse, _run, usage=USAGE)


def parse(words: Sequence[str]) -> Command:
    """Parse the command line, and read the prompt file.

    Raises:
        InputError: if an argument is unknown or missing, a value is missing or invalid, or the file is not valid UTF-8.
    """
    arguments = parse_arguments(
        words, options=OPTIONS, repeatable=("--prompt",), flags=("--averaged",), overrides=True, words=True
    )
    if len(arguments.words) != 1:
        raise InputError(
            f"expected one MODEL, found {len(arguments.words)}; pass each prompt with --prompt; "
            "--help shows the options"
        )
    names = ("--tokens", "--top_k", "--seed", "--samples", "--step")
    numbers = {name: whole_number(name, arguments.options[name]) for name in names if name in arguments.options}
    for name in ("--tokens", "--samples"):
        if numbers.get(name) == 0:
            raise InputError(f"{name} is 0; it must be at least 1")
    for prompt in arguments.repeated["--prompt"]:
        # In command-line arguments, Python decodes bytes that are not valid UTF-8 to lone surrogates.
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise InputError(f"--prompt {prompt!a} is not valid UTF-8")
    temperature = _number(arguments, "--temperature")
    return Command(
        arguments.words[0],
        prompts=[*arguments.repeated["--prompt"], *_prompt_of_file(arguments)],
        tokens=numbers.get("--tokens", TOKENS),
        sampling=Sampling(
            Sampling.temperature if temperature is None else temperature,
            numbers.get("--top_k"),
            _number(arguments, "--top_p"),
        ),
        seed=numbers.get("--seed", 0),
        samples=numbers.get("--samples", 1),
        step=numbers.get("--step"),
        averaged="--averaged" in arguments.flags,
        overrides=arguments.overrides,
    )


def _number(arguments: Arguments, name: str) -> float | None:
    text = arguments.options.get(name)
    try:
        return None if text is None else float(text)
    except ValueError:
        raise InputError(f"{name} is {text!r}; it must be a number") from None


def _prompt_of_file(arguments: Arguments) -> list[str]:
    name = arguments.options.get("--prompt_file")
    if name is None:
        return []
    path = Path(name).expanduser()
    try:
        text = read_regular(path, MOST_PROMPT_BYTES).decode()
    except OSError as error:
        raise InputError(f"--prompt_file {name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt_file {name} is not valid UTF-8: invalid byte at offset {error.start:,}") from None
    if not text:
        raise InputError(f"--prompt_file {name} is empty; omit it to let the model begin a new document")
    return [text]


def _run(command: Command) -> int:
    # Import slow modules after the checks.
    from sophia_levanter.run.loading import load_model

    loaded = load_model(
        command.model, step=command.step, averaged=command.averaged, overrides=command.overrides, report=tell
    )
    tell(f"model: {loaded.source}")
    prompts = _encoded(command.prompts, loaded)
    if not command.prompts:
        tell("no prompt: the model begins a new document")
    _sample(command, prompts, loaded)
    return DONE


def _encoded(prompts: Sequence[str], loaded: LoadedModel) -> list[list[int]]:
    """Encode the prompts. Without prompts, return a single end-of-text token, after which a new document begins."""
    encoded = [loaded.tokenizer.encode(prompt).tolist() for prompt in prompts]
    context = loaded.config.model.seq_len
    for number, tokens in enumerate(encoded, 1):
        if len(tokens) > context:
            raise InputError(
                f"prompt {number} has {len(tokens):,} tokens, but the model's context length is {context:,}; "
                "shorten the prompt"
            )
    return encoded or [[loaded.tokenizer.end_of_text]]


def _sample(command: Command, prompts: Sequence[Sequence[int]], loaded: LoadedModel) -> None:
    rows = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(command.samples)]
    written: list[list[str]] = [[] for _ in rows]
    alone = len(rows) == 1
    texts = [
        _Text(loaded.tokenizer, prompts[prompt], _print_at_once if alone else characters.append)
        for (prompt, _), characters in zip(rows, written, strict=True)
    ]
    started = time.monotonic()
    times, drawn = [started], 0
    with loaded.partition.active():
        for tokens in _drawn(command, prompts, rows, loaded):
            times.append(time.monotonic())
            for text, token in zip(texts, tokens, strict=True):
                if token is not None:
                    text.add(token)
                    drawn += 1
    for (prompt, sample), text, characters in zip(rows, texts, written, strict=True):
        text.end()
        heading = "" if alone else f"--- prompt {prompt + 1}, sample {sample + 1}\n"
        print(heading + "".join(characters), flush=True)
    speed = f", then {(drawn - len(rows)) / (times[-1] - times[1]):,.0f} tokens/s" if len(times) > 2 else ""
    tell(f"{counted(drawn, 'token')}: first token after {times[1] - started:.1f} s, including compilation{speed}")


def _print_at_once(text: str) -> None:
    print(text, end="", flush=True)


def _drawn(
    command: Command, prompts: Sequence[Sequence[int]], rows: Sequence[tuple[int, int]], loaded: LoadedModel
) -> Iterator[list[int | None]]:
    """At each step, yield the next token of every (prompt, sample) row, with None for rows whose document has ended."""
    import jax

    from sophia_levanter.models.sampling import generate

    end = loaded.tokenizer.end_of_text
    return generate(
        jax.jit(loaded.policy.cast_to_compute)(loaded.model),
        [prompts[prompt] for prompt, _ in rows],
        command.tokens,
        keys=_keys(command.seed, rows),
        sampling=command.sampling,
        end_of_text=end,
        document_end=end if loaded.config.data.mask_documents else None,
    )


def _keys(seed: int, rows: Sequence[tuple[int, int]]) -> jax.Array:
    """Create a random key for each row. A row's key does not depend on the number of rows."""
    import jax
    import jax.numpy as jnp

    def key(row: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row[0]), row[1])

    return jax.vmap(key)(jnp.array(rows))


class _Text:
    """Streams a prompt and its continuation as printable text. A character may span several tokens."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], give: Callable[[str], None]) -> None:
        from sophia_levanter.data.tokenizer import printable

        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._give = lambda text: give(printable(text))
        self._give(tokenizer.decode(prompt))

    def add(self, token: int) -> None:
        """Output the characters that are completed by this token."""
        self._give(self._decoder.decode(self._tokenizer.decode_bytes([token])))

    def end(self) -> None:
        """Output a replacement character if the last character is incomplete."""
        self._give(self._decoder.decode(b"", final=True))


if __name__ == "__main__":
    sys.exit(main())
