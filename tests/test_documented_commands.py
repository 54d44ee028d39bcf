"""Commands in the pages: what they name exists, and the parsers take their options."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from pages import PAGES, ROOT, read_page
from sophia_levanter.cli import VERBS
from sophia_levanter.config.arguments import PLUGINS
from sophia_levanter.config.command_line import FLAGS, OPTIONS, help_text, load_config, parse_command_line
from sophia_levanter.optim import SophiaG

STARTS = r"(?:make|python -m sophia_levanter[\w.]*|python tests/[\w/]+\.py|sophia-levanter)(?= |$)"
FIELDS = set(re.findall(r"--[a-z]+\.\w+", help_text()))
TARGETS = set(re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())
# What a reader puts something in place of: FILE, RUN_DIR, N, gs://BUCKET/RUN, ...
PLACEHOLDER = re.compile(r"(?:.*[/:])?[A-Z][A-Z_]*(?:[/.].*)?$|\.\.\.$")


def commands_in(page):
    """The commands of a page, each on one line: of its blocks without a language or of a shell's, and of its prose."""
    for language, block in read_page(page).blocks:
        if language in ("", "sh", "bash", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                command = re.match(rf"(?:\$ )?(?:\w+=\S+ )*(?:\S*bin/)?({STARTS}.*)", line.strip())
                if command:
                    yield command[1]
    for code in re.findall(rf"`(?:\w+=\S+\s)*({STARTS}[^`]*)`", read_page(page).text):
        yield " ".join(code.split())


COMMANDS = sorted({(command, page) for page in PAGES for command in commands_in(page)})


def test_commands_are_found():
    assert len(COMMANDS) > 60
    assert {command.split()[0] for command, _ in COMMANDS} == {"make", "python", "sophia-levanter"}


@pytest.mark.parametrize(("command", "page"), COMMANDS, ids=[f"{page.name}: {command}" for command, page in COMMANDS])
def test_command(command, page, monkeypatch, plugin_folder):
    monkeypatch.chdir(ROOT)
    check(command)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_settings_named_in_prose_are_fields(page):
    of_sections = r"(?:model|optimizer|data|trainer|mesh|tracking)\.[a-z]\w*"
    named = set(re.findall(rf"`(?:--)?({of_sections})[`: =]", read_page(page).text))
    methods = {f"optimizer.{name}" for name in [*dir(SophiaG), *vars(SophiaG())]}
    assert not {name for name in named if f"--{name}" not in FIELDS} - methods - {"model.safetensors", "model.py"}


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("make trian", "trian"),
        ("python -m sophia_levanter.mian --config FILE", "mian"),
        ("sophia-levanter trian --config FILE", "trian"),
        ("python -m sophia_levanter.main --config config/gpt2_nano_sophia.yaml --optimizer.roh 0.3", "roh"),
        ("python -m sophia_levanter.main --config FILE --optimizer.roh 0.3", "roh"),
        ("python -m sophia_levanter.commands.checkpoints list DIR --stpe 3", "stpe"),
        ("python -m sophia_levanter.commands.checkpoints lsit DIR", "lsit"),
        ("python tests/benchmarks/peers.py --ruonds 3", "ruonds"),
        ("python tests/benchmarks/pears.py --rounds 3", "pears"),
    ],
)
def test_a_misspelt_command_is_found(command, complaint, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(Exception, match=complaint):
        check(command)


def check(command):
    """Raises where a command names something that is not there."""
    words = shlex.split(command.replace("[", " ").replace("]", " ").replace("|", " | "), comments=True)
    words = words[: next((i for i, word in enumerate(words) if word in ("|", "&&", "&", ">", "2>&1")), len(words))]
    if words[0] == "make":
        unknown = [word for word in words[1:] if word.islower() and "=" not in word and word not in TARGETS]
        assert not unknown, f"no target of the Makefile: {unknown}"
        return
    if words[0] == "python" and words[1] != "-m":
        assert Path(words[1]).exists(), f"there is no {words[1]}"
        _check_options(words[1], Path(words[1]).read_text(), words[2:])
        return
    module, arguments = (words[2], words[3:]) if words[0] == "python" else (_module_of(words[1:2]), words[2:])
    assert importlib.util.find_spec(module) is not None, f"there is no {module}"
    if module == "sophia_levanter.main":
        _check_training(arguments)
    else:
        _check_options(module, Path(importlib.util.find_spec(module).origin).read_text(), arguments)


def _module_of(verb):
    if not verb or verb[0].startswith("-") or PLACEHOLDER.match(verb[0]):
        return "sophia_levanter.cli"
    assert verb[0] in VERBS, f"no verb {verb[0]}"
    return "sophia_levanter.main" if verb[0] == "train" else f"sophia_levanter.commands.{verb[0]}"


def _check_training(arguments):
    _check_names(arguments, {*OPTIONS, *FLAGS, PLUGINS} | FIELDS)
    sound = _without_placeholders(arguments)
    if "--config" in sound:
        parse_command_line(sound)


def _check_options(command, source, arguments):
    known = set(re.findall(r"--\w+", source)) | {"--help"}
    takes_fields = "overrides=True" in source or "parse_command_line" in source
    _check_names(arguments, known | FIELDS if takes_fields else known)
    verbs = set(re.findall(rf"{re.escape(command)} ([a-z]+)", source))
    if verbs and arguments and arguments[0].islower() and not arguments[0].startswith("-"):
        assert arguments[0] in verbs, f"no verb {arguments[0]} of {command}"
    sound = _without_placeholders(arguments)
    if "--config" not in sound:
        return
    config = Path(sound[sound.index("--config") + 1])
    if config.parent.name == "studies":
        assert config.exists(), f"there is no {config}"
        return
    fields = [(word[2:], sound[i + 1]) for i, word in enumerate(sound) if word in FIELDS]
    load_config(config, fields)


def _check_names(arguments, known):
    unknown = {word.partition("=")[0] for word in arguments if re.match(r"--[a-z]", word)} - known
    assert not {word for word in unknown if not re.fullmatch(r"--\w+\.FIELD", word)}, f"unknown options: {unknown}"


def _without_placeholders(arguments):
    """The command line without the options whose value is for the reader to choose."""
    sound: list[str] = []
    for word in arguments:
        if re.match(r"--(SECTION|\w+\.FIELD)", word):
            continue
        # Files of the project are in config/ and docs/; others are the reader's own.
        own_file = sound[-1:] == ["--config"] and not word.startswith(("config/", "docs/"))
        if not PLACEHOLDER.match(word) and not own_file:
            sound.append(word)
        elif sound and sound[-1].startswith("--"):
            sound.pop()
    return sound
