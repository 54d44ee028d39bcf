"""Importing weights from transformers, nanoGPT and the Sophia authors' code, and exporting weights."""
