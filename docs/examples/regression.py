"""A regression with the normal likelihood: Sophia-G, Sophia-H and AdamW fit Friedman's function.

y = 10 sin(pi x1 x2) + 20 (x3 - 1/2)^2 + 10 x4 + 5 x5 + noise of variance 1, and five inputs that do not matter.
No model can expect a squared error below the noise's variance on new data; linear least squares has about 7 times that.
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
    """((x [1000, 10], y [1000]), the same for testing), y in standard deviations, and the noise's variance."""
    x, y = make_friedman1(n_samples=2000, noise=1.0, random_state=0)
    mean, deviation = y[:1000].mean(), y[:1000].std()
    x, y = x.astype(np.float32), ((y - mean) / deviation).astype(np.float32)
    return (x[:1000], y[:1000]), (x[1000:], y[1000:]), float(1 / deviation**2)


def predictions(model, x):
    return jax.vmap(model)(x)


def mean_loss(model, likelihood, data):
    """The mean negative log-likelihood."""
    x, y = data
    return jnp.mean(likelihood.loss(predictions(model, x), y))


@eqx.filter_jit
def train_step(optimizer, model, state, likelihood, data):
    grads = eqx.filter_grad(mean_loss)(model, likelihood, data)
    updates, state = optimizer.update(grads, state, model)
    return eqx.apply_updates(model, updates), state


@eqx.filter_jit
def refresh(optimizer, model, state, likelihood, data, key):
    """Sophia-H estimates from the loss, Sophia-G from the predictions, for which it samples targets itself."""
    if isinstance(optimizer, SophiaH):
        h_hat = optimizer.estimate(lambda model: mean_loss(model, likelihood, data), model, key=key)
    else:
        h_hat = optimizer.estimate(lambda model: predictions(model, data[0]), model, key=key)
    return optimizer.refresh(state, h_hat)


def train(optimizer, likelihood, data):
    """The trained model and the optimizer's last state."""
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
    """The mean squared error on the test rows of the linear model that fits the training rows best."""

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
