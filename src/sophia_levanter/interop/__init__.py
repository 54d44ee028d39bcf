"""Weights of transformers, nanoGPT and the Sophia authors, in and out."""
