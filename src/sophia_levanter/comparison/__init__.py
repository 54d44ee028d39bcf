"""Comparing optimizers: studies of many training runs, what they gave, and what follows from it."""
