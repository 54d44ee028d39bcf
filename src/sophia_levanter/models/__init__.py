"""Language models in Haliax: GPT-2 and Llama."""
