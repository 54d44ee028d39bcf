"""What a launcher does with a backend, without its policy: one attempt, told to stop as the backend says.

python launcher_stub.py CLUSTER.yaml RUN_DIR
"""

import signal
import subprocess
import sys
from pathlib import Path

from sophia_levanter.cluster.backend import Job
from sophia_levanter.cluster.config import read_cluster
from sophia_levanter.cluster.slurm import SlurmBackend


def main(cluster_file: str, run_dir: str) -> int:
    job = Job(Path(run_dir), Path(run_dir) / "launch")
    backend = SlurmBackend(read_cluster(Path(cluster_file)))
    backend.prepare(job, 1, lambda line: print(line, flush=True), lambda: False)
    (command,) = backend.commands(job, 1)
    process = subprocess.Popen(command.words, stdin=subprocess.PIPE)
    signal.signal(signal.SIGTERM, lambda *_: process.stdin.close())
    return process.wait()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
