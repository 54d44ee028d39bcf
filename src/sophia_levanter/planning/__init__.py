"""Estimate a run's memory, traffic and time on given devices by compiling its steps without data or parameters."""
