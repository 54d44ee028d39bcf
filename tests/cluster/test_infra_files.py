"""All that lies under infra/ and config/: launcher files are read, scripts are shell, and there are no secrets."""

import re

import pytest
import yaml
from infra_checks import ROOT, complaints_of_bash

from sophia_levanter.cluster.config import read_cluster

FILES = sorted(
    path
    for top in ("infra", "config")
    for path in (ROOT / top).rglob("*")
    if path.is_file() and path.parent.name != "__pycache__"
)
YAML = [path for path in FILES if path.suffix == ".yaml"]
# A launcher's file names its backend at the top level, in a line of its own.
LAUNCHER = [path for path in YAML if re.search(r"^backend:", path.read_text(), re.MULTILINE)]
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


@pytest.mark.parametrize("path", LAUNCHER, ids=named)
def test_launcher_files_are_read(path):
    assert read_cluster(path).backend == yaml.safe_load(path.read_text())["backend"]


def test_scripts_are_shell():
    assert {named(path): complaints for path in SCRIPTS if (complaints := complaints_of_bash(path.read_text()))} == {}
