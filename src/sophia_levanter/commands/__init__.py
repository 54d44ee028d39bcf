"""The verbs other than `train`, one module each: `python -m sophia_levanter.commands.VERB`."""
