"""Names of jax that haliax uses and newer versions of jax lack; whatever imports haliax first imports this too.

haliax looks the names up when its functions are called, so the order of the imports does not matter.
`tests/test_jax_compatibility.py` fails as soon as haliax no longer needs a name: then delete it here.
"""

import jax

# Deprecated in jax 0.10, removed in 0.11. When haliax contracts axes it asks which of their sizes are known: integers,
# but not the symbols of an export with unknown sizes.
vars(jax.core).setdefault("is_constant_dim", lambda size: isinstance(size, int))
