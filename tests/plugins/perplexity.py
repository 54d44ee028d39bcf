"""A callback: the perplexity of the validation text."""

import math

from sophia_levanter.config.registries import register_callback
from sophia_levanter.training.callbacks import Callback


@register_callback("perplexity")
class Perplexity(Callback):
    def on_evaluation(self, pause, evaluation):
        return {"validation": math.exp(evaluation.loss)}
