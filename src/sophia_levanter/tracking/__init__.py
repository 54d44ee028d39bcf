"""The outputs for a run's numbers: console, JSON lines, wandb and TensorBoard."""
