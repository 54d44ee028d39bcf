"""Regression with a normal likelihood: fit Friedman's function with Sophia-G, Sophia-H and AdamW.

y = 10 sin(pi x1 x2) + 20 (x3 - 1/2)^2 + 10 x4 + 5 x5 + noise with variance 1; five more inputs have no effect.
On new data, the expected squared error is at least the noise variance, and about 7 times that for linear least squares.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import make_friedman1

from sophia_levanter.optim import AdamW, GaussNewtonBartlett, Normal, SophiaG, SophiaH

STEPS = 400


def load():
    """Return (x [1000, 10], y [1000]) for training, the same for testing, and the noise variance. y is standardized."""
    x, y = make_friedman1(n_samples=2000, noise=1.0, random_state=0)
    mean, deviation = y[:1000].mean(), y[:1000].std()
    x, y = x.astype(np.float32), ((y - mean) / deviation).astype(np.float32)
    return (x[:1000], y[:1000]), (x[1000:], y[1000:]), float(1 / deviation**2)


def predictions(model, x):
    return jax.vmap(model)(x)


def mean_loss(model, likelihood, data):
    """Return the mean negative log-likelihood."""
    x, y = data
    return jnp.mean(likelihood.loss(predictions(model, x), y))


@eqx.filter_jit
def train_step(optimizer, model, state, likelihood, data):
    grads = eqx.filter_grad(mean_loss)(model, likelihood, data)
    updates, state = optimizer.update(grads, state, model)
    return eqx.apply_updates(model, updates), state


@eqx.filter_jit
def refresh(optimizer, model, state, likelihood, data, key):
    """Refresh the curvature. Sophia-H estimates it from the loss, Sophia-G from predictions and sampled targets."""
    if isinstance(optimizer, SophiaH):
        h_hat = optimizer.estimate(lambda model: mean_loss(model, likelihood, data), model, key=key)
    else:
        h_hat = optimizer.estimate(lambda model: predictions(model, data[0]), model, key=key)
    return optimizer.refresh(state, h_hat)


def train(optimizer, likelihood, data):
    """Return the trained model and the final optimizer state."""
    model = eqx.nn.MLP(10, "scalar", width_size=64, depth=2, key=jax.random.key(1))
    state = optimizer.init(model)
    for step in range(STEPS):
        if optimizer.refresh_due(step):
            state = refresh(optimizer, model, state, likelihood, data, jax.random.fold_in(jax.random.key(2), step))
        model, state = train_step(optimizer, model, state, likelihood, data)
    return model, state


def squared_error(predicted, y):
    return float(jnp.mean(jnp.square(predicted - y)))


def least_squares_error(data, test):
    """Return the mean squared error on the test rows of a linear model fitted to the training rows."""

    def with_ones(x):
        return np.column_stack([x, np.ones(len(x))])

    weights, *_ = np.linalg.lstsq(with_ones(data[0]), data[1], rcond=None)
    return squared_error(with_ones(test[0]) @ weights, test[1])


def main():
    data, test, noise = load()
    likelihood = Normal(variance=noise)
    decay = optax.cosine_decay_schedule(1.0, STEPS)
    shared = {"rho": "auto", "b1": 0.9, "weight_decay": 0.1}
    optimizers = {
        "sophia_g": SophiaG(
            learning_rate=lambda step: 3e-3 * decay(step), estimator=GaussNewtonBartlett(likelihood), **shared
        ),
        "sophia_h": SophiaH(learning_rate=lambda step: 3e-3 * decay(step), **shared),
        "adamw": AdamW(learning_rate=lambda step: 1e-2 * decay(step)),
    }
    results = {"win_rates": {}, "least_squares": least_squares_error(data, test) / noise}
    print(f"linear least squares: squared error {results['least_squares']:.3f} times the noise on new data")
    for name, optimizer in optimizers.items():
        model, state = train(optimizer, likelihood, data)
        results[name] = squared_error(predictions(model, test[0]), test[1]) / noise
        print(f"{name}: squared error {results[name]:.3f} times the noise on new data")
        if name != "adamw":
            results["win_rates"][name] = float(optimizer.metrics(state)["win_rate"])
            print(f"  win rate {results['win_rates'][name]:.2f}")
    return results


if __name__ == "__main__":
    main()
