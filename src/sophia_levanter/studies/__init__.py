"""Studies that compare optimizers over many training runs, and reports of any runs."""
