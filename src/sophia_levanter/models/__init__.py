"""Haliax GPT-2 models."""
