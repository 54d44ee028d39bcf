"""Estimates what a run would take on given devices, by compiling its steps without data and without parameters."""
