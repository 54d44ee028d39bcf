"""Train a multilayer perceptron on scikit-learn's handwritten digits with Sophia-G, and with AdamW for comparison."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from sophia_levanter.optim import AdamW, SophiaG, split_microbatches, value_grad_and_curvature

STEPS, ROWS, MICROBATCH = 400, 128, 32


def load():
    """Return (images, classes) for training and for testing: 1,437 and 360 images of 64 pixels between 0 and 1."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, classes = digits.data[order].astype(np.float32) / 16, digits.target[order]
    return (images[:1437], classes[:1437]), (images[1437:], classes[1437:])


def logits(model, images):
    return jax.vmap(model)(images)


def mean_loss(model, batch):
    images, classes = batch
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(model, images), classes))


@eqx.filter_jit
def train_step(optimizer, model, state, batch):
    loss, grads = eqx.filter_value_and_grad(mean_loss)(model, batch)
    updates, state = optimizer.update(grads, state, model)
    return eqx.apply_updates(model, updates), state, loss


@eqx.filter_jit
def train_step_with_refresh(optimizer, model, state, batch, key):
    """Take a step in four microbatches. The curvature estimate reuses the gradient's forward pass."""

    def losses(model, microbatch, key):
        images, classes = microbatch
        return optimizer.estimator.losses(logits(model, images), classes, key=key)

    microbatches, _ = split_microbatches(batch, MICROBATCH)
    loss, grads, h_hat = value_grad_and_curvature(
        losses, model, microbatches, key=key, estimator=optimizer.estimator_at(state)
    )
    updates, state = optimizer.update(grads, state, model, h_hat)
    return eqx.apply_updates(model, updates), state, loss


def train(optimizer, data):
    """Return the trained model and the final optimizer state."""
    images, classes = data
    model = eqx.nn.MLP(64, 10, width_size=64, depth=2, key=jax.random.key(1))
    state = optimizer.init(model)
    for step, rows in enumerate(np.random.default_rng(2).integers(len(classes), size=(STEPS, ROWS))):
        batch = (images[rows], classes[rows])
        if optimizer.refresh_due(step):
            key = jax.random.fold_in(jax.random.key(3), step)
            model, state, _ = train_step_with_refresh(optimizer, model, state, batch, key)
        else:
            model, state, _ = train_step(optimizer, model, state, batch)
    return model, state


def main(sophia=None, adamw=None):
    data, (test_images, test_classes) = load()
    decay = optax.cosine_decay_schedule(1.0, STEPS)
    optimizers = {
        "sophia_g": sophia
        or SophiaG(
            learning_rate=lambda step: 1e-2 * decay(step),
            b1=0.9,
            rho="auto",
            weight_decay=0.1,
        ),
        "adamw": adamw or AdamW(learning_rate=lambda step: 3e-2 * decay(step), weight_decay=0.1),
    }
    results: dict[str, dict] = {}
    for name, optimizer in optimizers.items():
        model, state = train(optimizer, data)
        right = jnp.argmax(logits(model, test_images), axis=-1) == test_classes
        results[name] = {
            "training_loss": float(mean_loss(model, data)),
            "test_accuracy": float(jnp.mean(right)),
            "metrics": {key: float(value) for key, value in optimizer.metrics(state).items()},
        }
        print(f"{name}: training loss {results[name]['training_loss']:.4f},", end=" ")
        print(f"{results[name]['test_accuracy']:.1%} of the test images right")
    print(f"Sophia-G's win rate: {results['sophia_g']['metrics']['win_rate']:.2f}")
    return results


if __name__ == "__main__":
    main()
