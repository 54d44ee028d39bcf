"""All that lies under infra/ and config/: launcher files are read, scripts are shell, and there are no secrets."""

import re
import shlex
from pathlib import Path

import pytest
from infra_checks import ROOT, complaints_of_bash

from sophia_levanter.cluster.config import read_cluster
from sophia_levanter.commands import launch

FILES = sorted(
    path
    for top in ("infra", "config")
    for path in (ROOT / top).rglob("*")
    if path.is_file() and path.parent.name != "__pycache__"
)
YAML = [path for path in FILES if path.suffix == ".yaml"]
# A launcher's file names its backend at the top level, in a line of its own.
LAUNCHER = [path for path in YAML if re.search(r"^backend:", path.read_text(), re.MULTILINE)]
INFRA = [path for path in FILES if ROOT / "infra" in path.parents]
SETTINGS = re.compile(r"^# For GPT-2 large: (.*)$", re.MULTILINE)
SCRIPTS = [path for path in FILES if path.suffix == ".sh"]

SECRETS = {
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "AWS": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "Google": r"\bAIza[0-9A-Za-z_-]{35}\b|\bya29\.[0-9A-Za-z_-]{20,}",
    "Google, a service account": r"\"private_key(_id)?\"",
    "Hugging Face": r"\bhf_[0-9A-Za-z]{30,}\b",
    "GitHub": r"\bgh[pousr]_[0-9A-Za-z]{30,}\b|\bgithub_pat_\w{30,}",
    "wandb": r"(?<!revision=)\b[0-9a-f]{40}\b",
    "OpenAI": r"\bsk-[0-9A-Za-z_-]{20,}",
    "Slack": r"\bxox[abprs]-[0-9A-Za-z-]{10,}",
    "a value": r"(?i)\b\w*(api_?key|secret|token|password|passwd|credential)s?\b[\"']?[:=] *[\"']?[\w+/-]{16,}",
}


def secrets_in(text):
    return [kind for kind, pattern in SECRETS.items() if re.search(pattern, text)]


def named(path):
    return str(path.relative_to(ROOT))


def test_there_are_files():
    assert len(YAML) > 40
    assert LAUNCHER


@pytest.mark.parametrize("path", FILES, ids=named)
def test_no_secrets(path):
    assert secrets_in(path.read_text()) == []


# Put together here, because scanners of the repository would take them for secrets.
@pytest.mark.parametrize(
    "text",
    [
        "-----BEGIN RSA PRIVATE" + " KEY-----",
        "AKIA" + "0123456789ABCDEF",
        "AIza" + "a" * 35,
        '"private_key' + '": "x"',
        "hf_" + "a" * 34,
        "ghp_" + "a" * 36,
        "wandb login " + "0a" * 20,
        "sk-" + "a" * 40,
        "xoxb-" + "1" * 12,
        "RAY_AUTH_TOKEN=" + "0123456789abcdef" * 2,
        "  password: " + "correcthorsebatterystaple",
    ],
)
def test_a_secret_is_seen(text):
    assert secrets_in(f"first: 1\n{text}\n")


def dry_run(path, tmp_path, capsys, *settings):
    config = ROOT / "config" / "gpt2_large_sophia.yaml"
    words = ["--config", config, "--cluster", path, "--trainer.run_dir", tmp_path / "run", "--dry_run", *settings]
    status = launch.main(list(map(str, words)))
    return status, *capsys.readouterr()


@pytest.mark.parametrize("path", LAUNCHER, ids=named)
def test_a_launcher_file_takes_gpt2_large_with_the_settings_that_it_names(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "none")
    for name in getattr(read_cluster(path), "files", ()):  # `make wheel` builds the wheel
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    found = SETTINGS.search(path.read_text())
    settings = shlex.split(found[1]) if found else []
    status, out, error = dry_run(path, tmp_path, capsys, *settings)
    assert (status, error) == (0, "") and out
    if settings:
        # Without them, all that is missing is said at once.
        status, _, error = dry_run(path, tmp_path, capsys)
        needed = [word.removeprefix("--") for word in settings if word.startswith("--trainer.")]
        assert status == 2 and error.count("\n") == 1
        assert [name for name in needed if f"{name} " not in error] == []


@pytest.mark.parametrize("path", LAUNCHER, ids=named)
def test_a_gpu_driver_that_does_not_work_is_not_passed_over(path):
    cluster = read_cluster(path)
    gpus = getattr(cluster, "gpus_per_worker", 0) or getattr(cluster, "gpus_per_node", 0)
    assert (cluster.env.get("JAX_PLATFORMS") == "cuda,cpu") == (gpus > 0)


@pytest.mark.parametrize("path", [path for path in INFRA if path not in LAUNCHER], ids=named)
def test_what_is_no_launcher_file_is_refused_in_one_line(path, tmp_path, capsys):
    status, out, error = dry_run(path, tmp_path, capsys)
    assert (status, out) == (2, "")
    assert error.startswith("error: ") and error.count("\n") == 1 and path.name in error
    tools = {"kuberay": "kubectl apply -f", "ray_up": "ray up", "docker": "docker build -f"}
    if path.suffix in (".yaml", ".Dockerfile"):
        assert f"is a file for `{tools[path.parent.name]}`; a cluster file for the launcher sets `backend:`" in error


def test_scripts_are_shell():
    assert {named(path): complaints for path in SCRIPTS if (complaints := complaints_of_bash(path.read_text()))} == {}
