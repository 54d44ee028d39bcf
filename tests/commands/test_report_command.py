"""The command that puts runs on one page."""

import base64
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from sophia_levanter.commands.report import main
from sophia_levanter.config.baselines import AdamWConfig
from sophia_levanter.studies.plots import MOST_STYLES
from tiny_runs import FACTS, TEXT, run_config, step_lines, write_manifest, write_run

CHROMIUM = shutil.which("chromium")
ADAMW = run_config(optimizer=AdamWConfig(warmup=0))


def command(capfd, *words: object) -> tuple[int, str, str]:
    capfd.readouterr()
    status = main([str(word) for word in words])
    out, error = capfd.readouterr()
    return status, out, error


class Page(HTMLParser):
    """What is in a page: its text, and the attributes of each element."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def images(self) -> dict[str, str]:
        """SVG by what it shows."""
        named = {e["alt"]: e["src"] for tag, e in self.elements if tag == "img" and e["alt"]}
        return {alt: base64.b64decode(src.partition("base64,")[2]).decode() for alt, src in named.items()}


@pytest.fixture
def runs(tmp_path) -> Path:
    """A folder with a finished run of Sophia-G with a checkpoint, and one of AdamW that goes on."""
    write_run(tmp_path / "sophia")
    write_manifest(tmp_path / "sophia" / "checkpoints", 10)
    lines = [{k: v for k, v in line.items() if not k.startswith("optim/")} for line in step_lines(7, 3.5)]
    write_run(tmp_path / "adamw", ADAMW, lines)
    return tmp_path


@pytest.fixture
def no_pngs(monkeypatch) -> None:
    """The page's pictures are drawn alike."""
    monkeypatch.setattr("sophia_levanter.studies.page.png", lambda *_: b"")


@pytest.fixture
def no_svgs(monkeypatch) -> None:
    """For tests that read the text of a page, or the pictures beside it."""
    monkeypatch.setattr("sophia_levanter.studies.page.svg", lambda *_: "data:image/svg+xml;base64,")


def test_a_report_of_two_runs(runs, capfd):
    page = runs / "two.html"
    status, out, error = command(capfd, runs / "sophia", f"Adam W={runs / 'adamw'}", "-o", page)
    assert (status, error) == (0, "")
    table = [re.split(r"  +", line) for line in out.splitlines()]
    assert table[0] == [
        "run", "steps", "last validation loss", "bits per byte", "win rate", "tokens/s", "status"
    ]  # fmt: skip
    assert table[1] == ["sophia", "10 / 10", "4.1000", "5.9151", "0.30", "500", "finished"]
    assert table[2][:-1] == ["Adam W", "7 / 10", "3.7000 *", "5.3380 *", "–", "500"]
    assert re.fullmatch(r"at step 7, \d+ s ago", table[2][-1])
    pictures = sorted(path.name for path in runs.glob("two-*.png"))
    assert out.splitlines()[-1] == f"wrote {page} and {len(pictures)} images: two-*.png"
    assert {"two-loss.png", "two-loss-tokens.png", "two-loss-flops.png", "two-loss-time.png"} < set(pictures)
    assert "two-win_rate.png" in pictures and "two-skipped_steps.png" not in pictures
    for name in pictures:
        assert matplotlib.image.imread(runs / name)[..., :3].std() > 0.02, name

    found = Page(page)
    for text in ("2 training runs", "Adam W", "sophia_g", "optimizer.rho", "0.10.2", "1 × cpu, 2 threads", "abc"):
        assert text in found.text
    assert "--secret" not in found.text
    images = found.images()
    assert "Validation loss against training tokens: sophia, Adam W" in images
    assert "Win rate against steps: sophia" in images
    assert all("<svg" in image for image in images.values())
    # A run has one colour everywhere.
    assert [c in images["Training loss against steps: sophia, Adam W"] for c in ("#0072b2", "#d55e00")] == [True, True]
    # The page loads nothing.
    named = ("src", "href", "srcset", "action")
    links = [value for _, e in found.elements for name, value in e.items() if name in named]
    assert links and all(link.startswith("data:") for link in links)
    assert not {tag for tag, _ in found.elements} & {"script", "iframe", "object", "embed"}
    assert "url(" not in page.read_text() and "@import" not in page.read_text()


@pytest.mark.usefixtures("no_pngs")
@pytest.mark.parametrize(
    "lines",
    [
        step_lines(1),
        step_lines(4),  # not evaluated yet
        [{"step": 0, "train/loss": None, "train/grad_norm": None}],
        [{"step": 9, "validation/loss": 4.0}],
    ],
)
def test_runs_of_little(lines, runs, capfd):
    write_run(runs / "little", lines=lines)
    status, out, error = command(capfd, runs / "little", "-o", runs / "r.html")
    assert (status, error) == (0, "") and out.splitlines()[1].startswith("little")
    assert ("Not measured yet." in Page(runs / "r.html").text) == (lines[0]["step"] == 0 or len(lines) == 1)


@pytest.mark.usefixtures("no_pngs", "no_svgs")
def test_runs_of_different_tokenizers_are_compared_in_bits_per_byte(runs, capfd):
    write_run(runs / "gpt2", run_config(data={"tokenizer": "gpt2"}))
    other = FACTS | {"validation": TEXT | {"tokenizer": "gpt2'", "tokens": 300, "digest": "xyz"}}
    write_manifest(runs / "gpt2" / "checkpoints", 10, other, vocab_size=50304)
    status, out, _ = command(capfd, runs / "sophia", runs / "gpt2", "-o", runs / "r.html")
    assert status == 0 and "NOTE: The runs use different tokenizers" in out
    found = Page(runs / "r.html")
    assert "Losses per token cannot be compared" in found.text
    assert "Validation, bits per byte against steps: sophia, gpt2" in found.images()
    assert "Validation loss" not in found.text and "cannot be compared between tokenizers" in found.text


@pytest.mark.usefixtures("no_pngs", "no_svgs")
def test_as_many_runs_as_there_are_styles(runs, capfd):
    words = [write_run(runs / f"run{i}", lines=step_lines(5, 3 + i / 10)) for i in range(MOST_STYLES)]
    assert command(capfd, *words[:12], "-o", runs / "r.html")[0] == 0
    swatches = {e["src"] for tag, e in Page(runs / "r.html").elements if tag == "img" and not e["alt"]}
    assert len(swatches) == 12
    one_more = write_run(runs / "more")
    status, _, error = command(capfd, *words, one_more, "-o", runs / "many.html")
    assert (status, error) == (2, "error: 29 runs are too many to tell their curves apart; specify at most 28\n")


@pytest.mark.usefixtures("no_pngs", "no_svgs")
def test_a_name_or_a_directory_with_an_equals_sign(runs, capfd):
    write_run(runs / "lr=0.1")
    status, out, _ = command(capfd, runs / "lr=0.1", f"a=b={runs / 'sophia'}", "-o", runs / "r.html")
    assert status == 2  # a directory b=/...
    status, out, _ = command(capfd, runs / "lr=0.1", f"a={runs / 'lr=0.1'}/../sophia", "-o", runs / "r.html")
    assert status == 0 and [line.split()[0] for line in out.splitlines()[1:3]] == ["lr=0.1", "a"]


BAD = {
    "": "specify at least one run directory",
    "sophia -o out.htm": "--output out.htm must end in .html",
    "sophia -o nowhere/r.html": "--output nowhere/r.html: the directory nowhere does not exist; create it first",
    "sophia -o folder.html": "--output folder.html is a directory; specify a file",
    "sophia -o a.html --output b.html": "-o and --output are the same option",
    "nowhere": "nowhere does not exist; specify a run directory",
    "sophia sophia": "sophia is given twice",
    "sophia adamw/../sophia/": "adamw/../sophia/ is given twice",
    "sophia x=sophia": "x=sophia is the same run as sophia",
    "sophia sophia=adamw": "two runs are named sophia: sophia and adamw; rename one of them with NAME=RUN_DIR",
    "=sophia": "'=sophia' is missing a name or a directory",
    "x=": "'x=' is missing a name or a directory",
    "empty": "empty contains no config.yaml; specify a run directory",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line(words, runs, capfd, monkeypatch):
    monkeypatch.chdir(runs)
    for name in ("empty", "folder.html"):
        (runs / name).mkdir()
    before = sorted(runs.rglob("*"))
    status, out, error = command(capfd, *words.split())
    assert (status, out) == (2, "")
    assert error.startswith("error: ") and error.count("\n") == 1 and BAD[words] in error
    assert sorted(runs.rglob("*")) == before


def test_without_matplotlib_it_says_what_to_install(runs, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "sophia_levanter.studies.page", None)
    status, _, error = command(capfd, runs / "sophia", "-o", runs / "r.html")
    assert (status, error) == (2, "error: report requires matplotlib and jinja2; install sophia-levanter[compare]\n")


@pytest.mark.slow
def test_two_hundred_thousand_lines(runs, capfd):
    path = write_run(runs / "long", run_config(trainer={"num_train_steps": 400_000}), [])
    lines = [json.dumps(line) for line in step_lines(100_000, validate_every=1)]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    status, out, _ = command(capfd, path, "-o", runs / "r.html")
    assert status == 0 and "100,000 / 400,000" in out
    assert (runs / "r.html").stat().st_size < 3_000_000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs the browser chromium")
@pytest.mark.parametrize(("width", "height"), [(1300, 1800), (400, 1800)])
@pytest.mark.usefixtures("no_pngs")
def test_a_browser_shows_it(width, height, runs, capfd):
    assert command(capfd, runs / "sophia", runs / "adamw", "-o", runs / "r.html")[0] == 0
    options = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
    options += ("disable-component-update", "disable-sync", "hide-scrollbars", "enable-logging=stderr")
    options += (f"user-data-dir={runs / 'profile'}", f"window-size={width},{height}", f"screenshot={runs / 'shot.png'}")
    words = [str(CHROMIUM), *(f"--{option}" for option in options), "--host-resolver-rules=MAP * ~NOTFOUND"]
    done = subprocess.run([*words, (runs / "r.html").as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # Among them what the page's own policy would forbid: to load anything.
    assert "CONSOLE" not in done.stderr
    pixels = matplotlib.image.imread(runs / "shot.png")[..., :3]
    assert pixels.shape == (height, width, 3)
    for part in np.array_split(pixels, 6):
        assert part.std() > 0.01
    blue, red = np.array([0, 0x72, 0xB2]) / 255, np.array([0xD5, 0x5E, 0]) / 255
    for colour in (blue, red):
        assert (np.abs(pixels - colour).max(axis=-1) < 0.02).sum() > 100


@pytest.mark.usefixtures("no_pngs", "no_svgs")
@pytest.mark.parametrize(("number", "expected"), [(errno.ENOSPC, 1), (errno.EROFS, 2)])
def test_a_page_that_cannot_be_written(number, expected, runs, capfd, monkeypatch):
    def fail(path, content):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("sophia_levanter.studies.page.write_atomically", fail)
    status, _, error = command(capfd, runs / "sophia", "-o", runs / "page.html")
    assert status == expected
    assert error.count("\n") == 1 and "page.html" in error and os.strerror(number) in error
