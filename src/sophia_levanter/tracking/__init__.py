"""Destinations for a run's metrics: the console, JSON lines, wandb and TensorBoard."""
