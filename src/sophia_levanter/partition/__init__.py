"""Which device holds what: `config` has the settings and is free of jax, `mesh` puts them into effect."""
