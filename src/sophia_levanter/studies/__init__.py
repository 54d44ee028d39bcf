"""Studies that compare optimizers over many training runs, and reports on individual runs."""
