"""Measurements: each is a module to run, and prints ratios of things timed side by side."""
