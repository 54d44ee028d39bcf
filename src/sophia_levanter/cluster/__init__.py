"""Runs on many hosts: start their processes, detect lost processes, and restart the run."""
