"""Hyper-parameters of a smaller model for a larger one, `model.parametrization: mup`. Imports jax lazily.

Let n be the width and L the depth, both relative to the base model. Heads, key/value heads and the MLP grow with the
width. The rules for the depth are those of CompleteP with alpha 1 (Dey et al. 2025, arXiv 2505.01618).

    forward        Matrices have an initial variance / n. Scores are q k / head_size. Blocks add 1 / L of their output.
                   Logits are divided by n, with a tied head too.
    gradients      Logits / n give hidden states gradients of 1 / n. Each coordinate of an array's gradient is therefore
                   1 / n as large, and 1 / (n L) in the blocks. The gains that heads share in `qk_norm` are larger.

A step dW of a matrix must change its outputs dW x by as much as at the base, where x has 1 / n as many coordinates of
the same size: the spectral norm of dW must not depend on n (Yang et al. 2023, arXiv 2310.17813). All other arrays
(embeddings, the head behind logits / n, norms, biases) keep the base's learning rate. The learning rate of a matrix is
multiplied by n^e, where e is the optimizer's `width_exponent`:

    -1             AdamW, AdEMAMix, Lion and Sophia (which is clipped) step by about lr in each coordinate. Gradients
                   are sums of products d x^T, so the signs of dW and x agree, and dW x grows with n (Yang et al. 2022,
                   arXiv 2203.03466, table 8).
    0              SOAP and Sophia in a Kronecker basis step by about lr in each coordinate of the basis. The gradient
                   of r targets has a rank of at most r at any width, and the basis holds its singular directions: it
                   fills r x r coordinates, and |dW x| / |x| is lr times the norm of that block. With one side rotated
                   it fills r n coordinates, and e is -1/2. Qiu et al. 2025 (arXiv 2512.05620, table 1) derive both for
                   SOAP, and report that realistic widths and batches fill more coordinates, so activations change by
                   more in wider models. Treat these rates as a starting point.
    -1/2           Muon steps by 0.2 lr sqrt(max(in, out)) times an orthogonal matrix.

With a hyperball the learning rate is an angle: a step is lr |W| long, and |W| goes with sqrt(n). A step of lr in each
coordinate would be lr n long, and Muon's 0.2 lr n, so e is larger by 1/2. The length of a step in a basis depends on
the number of coordinates that are filled, so the two are not combined.

Bounded steps depend on the size of gradients through eps, and Sophia's also through rho. Gradients are therefore
multiplied by s = n, or n L, before the optimizer sees them. Squared gradients (the estimates of GNB and of the
empirical Fisher) are multiplied by s^2. A product with one random probe u, as Hutchinson's u * (H u), is mostly noise
from the other coordinates, the root of a sum of n^2 squares of 1 / n^2; it is multiplied by s. Then Sophia's win rate
is that of the base at the same batch size. Gradients are clipped (`trainer.max_grad_norm`) before that: the norm of
matrices does not depend on n, that of embeddings falls with sqrt(n).

Weight decay takes lr wd of an array in each step, at any width, since this sets how many steps weights remember
(Wang and Aitchison 2024, arXiv 2405.13698). CompleteP does the same. Both assume the base's number of steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sophia_levanter.config.groups import GroupConfig, check_groups
from sophia_levanter.errors import InputError

if TYPE_CHECKING:
    from sophia_levanter.config.model import Growth, ModelConfig
    from sophia_levanter.config.optimizer import OptimizerConfig


def width_exponents(config: OptimizerConfig, model: ModelConfig, optimizer: Any) -> dict[str, float]:
    """The exponent e of each matrix, keyed by path: its learning rate is multiplied by n^e for a width of n.

    Args:
        config: the optimizer's settings.
        model: the model's settings.
        optimizer: the optimizer built from `config`.

    Raises:
        InputError: if the optimizer has no `width_exponent`, rotates different sides than in the base model, or
            combines a basis with a hyperball.
    """
    import jax

    from sophia_levanter.models.language_model import abstract_model, matrix_axes
    from sophia_levanter.optim._matrices import matrix_views
    from sophia_levanter.optim._trees import is_named

    exponent = getattr(optimizer, "width_exponent", lambda inputs, outputs: None)
    if exponent(1, 1) is None:
        raise InputError(
            f"model.parametrization is 'mup', but optimizer.type {config.get_choice_name(type(config))} does not "
            "define how its learning rate scales with width; define width_exponent() in "
            f"{type(optimizer).__qualname__}, or set model.parametrization to standard"
        )
    if config.hyperball and getattr(optimizer, "basis", None) is not None:
        raise InputError(
            "model.parametrization is 'mup', which does not support optimizer.hyperball with a Kronecker basis; "
            "set optimizer.hyperball to false or model.parametrization to standard"
        )
    abstract, width = abstract_model(model, 1), model.growth.width
    exponents: dict[str, float] = {}
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(abstract, is_leaf=is_named)]
    for path, view in zip(paths, matrix_views(matrix_axes, abstract), strict=True):
        if view is not None:
            _, inputs, outputs = view.sizes
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            exponents[name] = exponent(inputs, outputs) + 0.5 * config.hyperball
            if exponent(inputs, outputs) != exponent(round(inputs / width), round(outputs / width)):
                raise InputError(
                    f"optimizer.basis_max_size rotates different sides of {name} ({inputs} x {outputs}) than in the "
                    f"base model; with model.parametrization mup, set it to at least {max(inputs, outputs)}"
                )
    return exponents


def scale_matrix_rates(config: OptimizerConfig, model: ModelConfig, exponents: dict[str, float]) -> OptimizerConfig:
    """The optimizer's settings with the learning rates of matrices scaled and their weight decay unchanged.

    Matrices move from the configured groups to groups of their own.

    Raises:
        InputError: if a configured group matches no parameter.
    """
    from sophia_levanter.models.language_model import abstract_model

    given = check_groups(config.parameter_groups, abstract_model(model, 1))
    members: dict[tuple[int | None, float], list[str]] = {}
    for path, exponent in exponents.items():
        members.setdefault((given.get(path), exponent), []).append(re.escape(path))

    def scaled(index: int | None, exponent: float, paths: list[str]) -> GroupConfig:
        group = GroupConfig(".") if index is None else config.groups[index]
        factor = float(model.growth.width**exponent)
        rate = factor * (group.factor(config.learning_rate) or 0.0)
        decay = config.weight_decay if group.weight_decay is None else group.weight_decay
        return GroupConfig(f"^({'|'.join(paths)})$", f"{rate!r} x", decay / factor)

    others = {index for path, index in given.items() if path not in exponents}
    rest = [group for index, group in enumerate(config.groups) if index in others]
    return replace(config, groups=(*(scaled(*key, paths) for key, paths in members.items()), *rest))


def gradient_scales(growth: Growth) -> Callable[[Any], Any]:
    """A function from a transformer's parameters to the scale s of their gradients, a prefix tree."""
    import equinox as eqx
    import jax

    def scales(model: Any) -> Any:
        outside = jax.tree.map(lambda _: growth.width, model)
        return eqx.tree_at(lambda tree: tree.blocks, outside, growth.width * growth.depth)

    return scales
