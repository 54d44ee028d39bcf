"""Runs on many hosts: starts their processes, detects lost ones, and starts the run again."""
