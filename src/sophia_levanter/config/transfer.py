"""Hyper-parameters of a smaller model for a larger one, `model.parametrization: mup`. Free of jax until it is used.

Let n be the width over that of the base and L the depth over it. The depth's rules are those of CompleteP with alpha 1
(Dey et al. 2025, arXiv 2505.01618).

    forward        Matrices have an initial variance / n; scores are q k / head_size; blocks add 1 / L of what they
                   compute; logits are divided by n, with a tied head too.
    gradients      Each coordinate of every array is 1 / n as large, since logits / n give hidden states gradients of
                   1 / n; in the blocks it is 1 / (n L) as large.

A step dW of a matrix must change its outputs dW x by as much as at the base, where x has n times as many coordinates of
the same size: the spectral norm of dW must not depend on n (Yang et al. 2023, arXiv 2310.17813). All other arrays
(embeddings, the head behind logits / n, norms, biases) take the base's steps. The learning rate of a matrix goes with
n^e, and e is the optimizer's `width_exponent`:

    -1             AdamW, AdEMAMix, Lion and Sophia, which is clipped, step by about lr in each coordinate. Gradients
                   are sums of products d x^T, so the signs of dW and x agree, and dW x grows with n (Yang et al. 2022,
                   arXiv 2203.03466, table 8).
    0              SOAP, and Sophia in a Kronecker basis, step by about lr in each coordinate of the basis. The gradient
                   of r targets has the rank r, whatever the width, and the basis holds its singular directions: it
                   fills r x r coordinates, and |dW x| / |x| is lr times the norm of that block. With one side rotated
                   it fills r n coordinates, and e is -1/2. Qiu et al. 2025 (arXiv 2512.05620) have these rules for
                   SOAP, and Ishikawa and Karakida 2023 (arXiv 2312.12226) those of Shampoo without momentum.
    -1/2           Muon steps by 0.2 lr sqrt(max(in, out)) times an orthogonal matrix here.

With a hyperball the learning rate is an angle: a step is lr |W| long, and |W| goes with sqrt(n). A step of lr in each
coordinate would be lr n long, and Muon's 0.2 lr n, so e is larger by 1/2. The length of a step in a basis depends on
the number of coordinates that are filled, so the two are not combined.

Bounded steps depend on the size of gradients through eps, and Sophia's through rho besides: m / (rho h) grows with n,
because m is 1 / n and h, an average of squares, 1 / n^2. Gradients are therefore multiplied by n, or n L, and
curvatures by the square, before the optimizer sees them, which amounts to rho n and eps / n. Then the win rate is the
base's, as long as the batch is: the noise of m falls with the batch's root, whatever the width. In a basis this keeps
the many coordinates that hold noise alone unclipped, as they are at the base.

Weight decay takes lr wd of an array in each step, at any width, since this sets how many steps weights remember
(Wang and Aitchison 2024, arXiv 2405.13698). CompleteP has it so too.
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
    """The power of the width that the learning rate of each matrix goes with, by the matrix's path.

    Args:
        config: the optimizer's settings.
        model: the model's.
        optimizer: what the settings build.

    Raises:
        InputError: if the optimizer does not say how its steps follow the width, rotates other sides at the base, or
            has a basis in a hyperball.
    """
    import jax

    from sophia_levanter.models.language_model import abstract_model, matrix_axes
    from sophia_levanter.optim._matrices import matrix_views
    from sophia_levanter.optim._trees import is_named

    exponent = getattr(optimizer, "width_exponent", lambda inputs, outputs: None)
    if exponent(1, 1) is None:
        raise InputError(
            f"model.parametrization is 'mup', but optimizer.type {config.get_choice_name(type(config))} does not say "
            f"how its steps follow the width; define width_exponent() in {type(optimizer).__qualname__}, or set "
            "model.parametrization standard"
        )
    if config.hyperball and getattr(optimizer, "basis", None) is not None:
        raise InputError(
            "model.parametrization is 'mup', but how the angles of optimizer.hyperball follow the width in a Kronecker "
            "basis is not known; set optimizer.hyperball false, or model.parametrization standard"
        )
    abstract, width = abstract_model(model, 1), model.growth.width
    found: dict[str, float] = {}
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(abstract, is_leaf=is_named)]
    for path, view in zip(paths, matrix_views(matrix_axes, abstract), strict=True):
        if view is not None:
            _, inputs, outputs = view.sizes
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            found[name] = exponent(inputs, outputs) + 0.5 * config.hyperball
            if exponent(inputs, outputs) != exponent(round(inputs / width), round(outputs / width)):
                raise InputError(
                    f"optimizer.basis_max_size rotates other sides of {name}, {inputs} x {outputs}, than at "
                    f"model.base_embed_dim; with model.parametrization mup set it to {max(inputs, outputs)} or more"
                )
    return found


def with_matrix_steps(config: OptimizerConfig, model: ModelConfig, exponents: dict[str, float]) -> OptimizerConfig:
    """The optimizer's settings with factors on the learning rates of matrices, whose weight decay stays as it is.

    Matrices leave the groups that are given for groups of their own.

    Raises:
        InputError: if a group that is given matches no parameter.
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


def gradient_factors(growth: Growth) -> Callable[[Any], Any]:
    """A function from a transformer's parameters to the factors on their gradients, a prefix tree."""
    import equinox as eqx
    import jax

    def factors(model: Any) -> Any:
        outside = jax.tree.map(lambda _: growth.width, model)
        return eqx.tree_at(lambda tree: tree.blocks, outside, growth.width * growth.depth)

    return factors
