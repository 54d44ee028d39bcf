"""Where a run's metrics go: the console, JSON lines, wandb and TensorBoard."""
