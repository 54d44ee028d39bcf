"""Launch a run on multiple hosts: start its processes, detect lost processes and restart the run."""
