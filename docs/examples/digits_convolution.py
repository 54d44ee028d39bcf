"""Train a convolutional network with batch norm on scikit-learn's digits with Sophia-G and three parameter groups.

The kernels have weight decay, and the vectors (norms and biases) have a different learning rate and no decay. The first
convolution is frozen: it keeps its random filters, as a pretrained layer would keep its weights.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from sophia_levanter.optim import SophiaG

STEPS, ROWS = 300, 128


def load():
    """Return (images, classes) for training and for testing: 1,437 and 360 images [1, 8, 8] between 0 and 1."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, classes = digits.images[order, None].astype(np.float32) / 16, digits.target[order]
    return (images[:1437], classes[:1437]), (images[1437:], classes[1437:])


class Network(eqx.Module):
    convolutions: list[eqx.nn.Conv2d]
    norms: list[eqx.nn.BatchNorm]
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        # Biases have no effect here, because batch norm subtracts the mean. Their gradients and curvature would consist
        # of rounding errors, and Sophia would change them by the full learning rate in every step.
        self.convolutions = [
            eqx.nn.Conv2d(1, 16, 3, padding=1, use_bias=False, key=keys[0]),
            eqx.nn.Conv2d(16, 32, 3, stride=2, padding=1, use_bias=False, key=keys[1]),
        ]
        self.norms = [eqx.nn.BatchNorm(size, axis_name="batch", momentum=0.9, mode="batch") for size in (16, 32)]
        self.head = eqx.nn.Linear(32 * 4 * 4, 10, key=keys[2])

    def __call__(self, x, statistics):
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x, statistics = norm(convolution(x), statistics)
            x = jax.nn.relu(x)
        return self.head(x.ravel()), statistics


def logits(model, statistics, images):
    """Return the logits [row, class] and the updated running statistics."""
    return jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(images, statistics)


def mean_loss(model, statistics, batch):
    images, classes = batch
    outputs, statistics = logits(model, statistics, images)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, classes)), statistics


def groups(params):
    """Return a tree with the name of each parameter's group."""
    # Equinox stores the bias of a convolution as [channel, 1, 1]. With such biases, `ndim` would give the wrong group.
    names = jax.tree.map(lambda p: "kernels" if p.ndim > 1 else "vectors", params)
    return eqx.tree_at(lambda model: model.convolutions[0].weight, names, "frozen")


@eqx.filter_jit
def train_step(optimizer, transformation, model, statistics, state, batch, key=None):
    """Take a step, and refresh the curvature if a key is given.

    `value_grad_and_curvature` cannot return the running statistics. `estimate` performs a separate forward pass, but
    this is identical to that of the loss, so the compiler keeps only one of them.
    """
    h_hat = None
    if key is not None:
        # Like the loss, use training mode and the whole batch, because batch norm makes each output depend on all rows.
        # Discard the updated running statistics, because the loss below returns them too.
        h_hat = optimizer.estimate(lambda model: logits(model, statistics, batch[0])[0], model, key=key)
    (loss, statistics), grads = eqx.filter_value_and_grad(mean_loss, has_aux=True)(model, statistics, batch)
    params = eqx.filter(model, eqx.is_inexact_array)
    # Each group uses its part of the whole model's estimate.
    updates, state = transformation.update(grads, state, params, h_hat=h_hat)
    return eqx.apply_updates(model, updates), statistics, state, loss


def main():
    (images, classes), (test_images, test_classes) = load()
    decay = optax.cosine_decay_schedule(1.0, STEPS)
    kernels = SophiaG(learning_rate=lambda step: 3e-3 * decay(step), b1=0.9, rho="auto", weight_decay=0.1)
    vectors = SophiaG(learning_rate=lambda step: 1e-3 * decay(step), b1=0.9, rho="auto", weight_decay=0.0)
    transformation = optax.multi_transform(
        {"kernels": kernels.as_optax(), "vectors": vectors.as_optax(), "frozen": optax.set_to_zero()}, groups
    )
    model, statistics = eqx.nn.make_with_state(Network)(jax.random.key(1))
    frozen = model.convolutions[0].weight
    state = transformation.init(eqx.filter(model, eqx.is_inexact_array))
    for step, rows in enumerate(np.random.default_rng(2).integers(len(classes), size=(STEPS, ROWS))):
        batch = (images[rows], classes[rows])
        # Both optimizers have the same interval, so checking one of them is enough.
        key = jax.random.fold_in(jax.random.key(3), step) if kernels.refresh_due(step) else None
        model, statistics, state, _ = train_step(kernels, transformation, model, statistics, state, batch, key)

    trained = eqx.nn.inference_mode(model)
    training_loss, _ = eqx.filter_jit(mean_loss)(trained, statistics, (images, classes))
    outputs, _ = eqx.filter_jit(logits)(trained, statistics, test_images)
    counter = model.norms[0].batch_counter
    assert counter is not None  # it is None only in mode "ema"
    results: dict = {
        "training_loss": float(training_loss),
        "test_accuracy": float(jnp.mean(jnp.argmax(outputs, axis=-1) == test_classes)),
        "frozen_unchanged": bool(jnp.array_equal(model.convolutions[0].weight, frozen)),
        "batches_in_statistics": int(statistics.get(counter)),
        "metrics": {
            name: {key: float(value) for key, value in optimizer.metrics(state.inner_states[name].inner_state).items()}
            for name, optimizer in {"kernels": kernels, "vectors": vectors}.items()
        },
    }
    print(f"training loss {results['training_loss']:.1e}, {results['test_accuracy']:.1%} of the test images right")
    print(f"the first convolution is unchanged: {results['frozen_unchanged']}")
    print(f"batches in the running statistics: {results['batches_in_statistics']}")
    for name, metrics in results["metrics"].items():
        print(f"{name}: win rate {metrics['win_rate']:.2f}")
    return results


if __name__ == "__main__":
    main()
