"""The step by hand computes what the trainer's step computes, or timing them side by side would mean nothing."""

from sophia_levanter.benchmarks.nano_step import _hand_step, _our_step
from sophia_levanter.command_line import load_config


def test_both_steps_give_the_same_losses(config_file):
    overrides = [("trainer.microbatch_size", "16"), ("model.scale_attn_by_inverse_layer_idx", "true")]
    config = load_config(config_file, overrides)
    ours, by_hand = _our_step(config), _hand_step(config)
    for _ in range(4):
        assert abs(ours() - by_hand()) < 1e-4
