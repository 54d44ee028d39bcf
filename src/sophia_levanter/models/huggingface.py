"""Convert GPT-2 models to and from Hugging Face transformers and nanoGPT state dicts; see `interop.state_dict`."""

from sophia_levanter.interop.state_dict import gpt2_from_state_dict, gpt2_to_state_dict

__all__ = ["gpt2_from_state_dict", "gpt2_to_state_dict"]
