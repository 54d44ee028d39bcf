"""Haliax language models: GPT-2 and Llama."""
