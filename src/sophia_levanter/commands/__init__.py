"""The commands other than `train`, each in its own module: `python -m sophia_levanter.commands.VERB`."""
