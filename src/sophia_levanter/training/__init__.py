"""The training step, the training loop and their components."""
