"""The verbs besides training, one module each: `python -m sophia_levanter.commands.VERB`."""
