"""Placement of arrays on devices, and communication between the processes of a run."""
