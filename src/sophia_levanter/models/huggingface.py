"""Conversion of GPT-2 weights to and from the names in transformers and nanoGPT; see `interop.state_dict`."""

from sophia_levanter.interop.state_dict import gpt2_from_state_dict, gpt2_to_state_dict

__all__ = ["gpt2_from_state_dict", "gpt2_to_state_dict"]
