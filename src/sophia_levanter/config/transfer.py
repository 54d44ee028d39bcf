"""Transfer hyper-parameters from a small model to a larger one (`model.parametrization: mup`). jax is imported lazily.

Let n be the width and L the depth, both relative to the base model. Heads, key/value heads and the MLP grow with the
width. The depth is handled as in CompleteP with alpha = 1 (Dey et al. 2025, arXiv 2505.01618).

    forward        The initial variance of matrices is divided by n. Scores are q k / head_size. Block outputs are
                   divided by L. Logits are divided by n, even if the head is tied.
    gradients      Because logits are divided by n, the gradients of hidden states scale as 1 / n. Each coordinate of a
                   parameter's gradient therefore scales as 1 / n, or as 1 / (n L) in blocks. The gradients of the
                   `qk_norm` gains, which are shared by all heads, are larger.

An update dW must change a matrix's outputs (by dW x) as much as in the base model, where x has 1 / n as many
coordinates of the same size. The spectral norm of dW must therefore not depend on n (Yang et al. 2023, arXiv
2310.17813). All other arrays (embeddings, norms, biases, and the head, whose logits are divided by n) keep the learning
rate of the base model. The learning rate of a matrix is multiplied by n^e, where e is the optimizer's `width_exponent`:

    -1             AdamW, AdEMAMix, Lion and Sophia (due to clipping) change each coordinate by about lr. Gradients are
                   sums of products d x^T, so the signs of dW and x agree, and dW x grows with n (Yang et al. 2022,
                   arXiv 2203.03466, table 8).
    0              SOAP and Sophia in a Kronecker basis change each coordinate in the basis by about lr. At any width,
                   the gradient for r targets has rank at most r, and its singular directions are part of the basis. The
                   gradient thus occupies r x r coordinates, and |dW x| / |x| is lr times the norm of that block. With
                   only one side rotated, it occupies r n coordinates, and e is -1/2. Qiu et al. 2025 (arXiv 2512.05620,
                   table 1) derive both exponents for SOAP. They report more occupied coordinates at realistic widths
                   and batch sizes, so activations change more in wider models. Treat these rates as a starting point.
    -1/2           Muon's update is 0.2 lr sqrt(max(in, out)) times an orthogonal matrix.

With a hyperball, the learning rate is an angle: the norm of an update is lr |W|, and |W| scales as sqrt(n). Without
one, the norm is lr n if each coordinate changes by lr, and 0.2 lr n for Muon. A hyperball therefore increases e by 1/2.
In a Kronecker basis, the norm depends on the number of occupied coordinates, so a hyperball cannot be combined with it.

Bounded updates depend on the scale of gradients through eps, and Sophia's also through rho. Gradients are therefore
multiplied by n L in blocks and by n elsewhere before they reach the optimizer, and squared gradients (the GNB and
empirical Fisher estimates) by the squares of these factors. Hutchinson's estimate u * (H u), with one random probe u,
is mostly noise from the off-diagonal entries in each row of the Hessian. The largest are derivatives with respect to
two matrices of the same block: n entries of size 1 / (n L). The estimate is therefore multiplied by sqrt(n) L in blocks
and by sqrt(n) elsewhere. Sophia's win rate is then the same as in the base model at the same batch size. Gradients are
clipped (`trainer.max_grad_norm`) before this scaling. The gradient norm of matrices does not depend on n; that of
embeddings scales as 1 / sqrt(n).

Weight decay shrinks an array by the fraction lr wd in each step, at any width, because this determines how many steps
weights remember (Wang and Aitchison 2024, arXiv 2405.13698), as in CompleteP. This assumes the base model's step count.
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


def matrix_sides(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return the numbers of inputs and outputs of each matrix in the blocks, keyed by path."""
    import jax

    from sophia_levanter.models.language_model import abstract_model, matrix_axes
    from sophia_levanter.optim._matrices import matrix_views
    from sophia_levanter.optim._trees import is_named

    abstract = abstract_model(model, 1)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(abstract, is_leaf=is_named)]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (view.sizes[1], view.sizes[2])
        for path, view in zip(paths, matrix_views(matrix_axes, abstract), strict=True)
        if view is not None
    }


def width_exponents(config: OptimizerConfig, model: ModelConfig, optimizer: Any) -> dict[str, float]:
    """Return the exponent e for each matrix, keyed by path. The learning rate is multiplied by n^e for a width of n.

    Args:
        config: the optimizer's settings.
        model: the model's settings.
        optimizer: the optimizer built from `config`.

    Raises:
        InputError: if the optimizer has no `width_exponent`, rotates different sides of a matrix than in the base
            model, or combines a Kronecker basis with a hyperball.
    """
    exponent: Any = getattr(optimizer, "width_exponent", None)
    if exponent is None or exponent(1, 1) is None:
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
    width = model.growth.width
    exponents: dict[str, float] = {}
    for name, (inputs, outputs) in matrix_sides(model).items():
        base = round(inputs / width), round(outputs / width)
        exponents[name] = exponent(inputs, outputs) + 0.5 * config.hyperball
        if exponent(inputs, outputs) != exponent(*base):
            raise InputError(
                f"optimizer.basis_max_size: {name} ({inputs} x {outputs}) is not rotated on the same sides as in "
                f"the base model; with model.parametrization mup, set it to at least {max(inputs, outputs, *base)}"
            )
    return exponents


def scale_matrix_rates(config: OptimizerConfig, model: ModelConfig, exponents: dict[str, float]) -> OptimizerConfig:
    """Scale the learning rates of matrices in an optimizer's settings. Their weight decay per step stays the same.

    Matrices are moved from the configured groups to separate groups.

    Raises:
        InputError: if a configured group matches no parameters.
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


Scales = Callable[[Any], Any]  # from a transformer's parameters to a prefix tree of factors


def gradient_scales(growth: Growth) -> Scales:
    """Return the factors on gradients: n L in blocks and n elsewhere."""
    return _scales(growth.width * growth.depth, growth.width)


def curvature_scales(growth: Growth, *, signed: bool) -> Scales:
    """Return the factors on curvature estimates. `signed` specifies whether the estimates may be negative."""
    n, depth = growth
    return _scales(n**0.5 * depth, n**0.5) if signed else _scales((n * depth) ** 2, n**2)


def _scales(in_blocks: float, elsewhere: float) -> Scales:
    import equinox as eqx
    import jax

    def scales(model: Any) -> Any:
        return eqx.tree_at(lambda tree: tree.blocks, jax.tree.map(lambda _: elsewhere, model), in_blocks)

    return scales
