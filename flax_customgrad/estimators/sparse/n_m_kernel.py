"""`NMKernel`: the weights of a pruned kernel that are kept, and which ones they are.

    mask      a bit a weight, 8 to a byte
    values    the n weights that are kept of every m, in their order; 0 where less are

2:4 in float32 takes 2.125 bytes a weight in place of 4. The kernel comes back to the bit: where all
the weights that a group keeps are more than 0, and where zeros are among them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.contract.compat import is_traced
from flax_customgrad.estimators.sparse.n_m import Pattern
from flax_customgrad.layers.packed_weights import Packed, PackedWeights
from flax_customgrad.numerics.packing import pack_bits, unpack_bits


class NMKernel(PackedWeights):
    """The kept weights of a kernel, in its place; `kernel[...]` gives the pruned kernel.

    Args:
        layer: the name of the layer, for the error.
        kernel: array of shape (in_features, out_features), float.
        variable: the Variable of the kernel, whose type and metadata are kept.
        pattern: which weights are kept, of groups along the first axis.

    Attributes:
        codes: the weights that are kept, in the dtype of the kernel, of shape (in_features n / m,
            out_features).
        mask: uint8, a bit for each weight along the last axis.
        kind: the type of the kernel's Variable.
        shape: of the kernel.
        dtype: of the kernel.
        bits: how many bits a weight that is kept takes.

    Raises:
        ValueError: NaN makes a group keep more than n.
    """

    def __init__(self, layer: str, kernel: jax.Array, variable: nnx.Variable, pattern: Pattern):
        self.shape, self.dtype, self.bits = kernel.shape, kernel.dtype, 8 * kernel.dtype.itemsize
        self.kind = type(variable)
        self._pattern = pattern
        mask = pattern.mask(kernel)
        groups, kept = self._groups(kernel), self._groups(mask)
        if not is_traced(mask) and jnp.any(jnp.sum(kept, 1) > pattern.n):
            raise ValueError(
                f"{layer}: its kernel has NaN, which is kept beside the {pattern.n} of every "
                f"{pattern.m} weights that there is place for: it cannot be packed"
            )
        # Those that are kept come first, in their order.
        order = jnp.argsort(~kept, axis=1, stable=True)[:, : pattern.n]
        values = jnp.take_along_axis(jnp.where(kept, groups, 0), order, 1)
        self.codes = Packed.from_metadata(
            values.reshape(-1, kernel.shape[-1]), variable.get_metadata()
        )
        self.mask = Packed(pack_bits(mask, 1))

    def __getitem__(self, key: Any) -> jax.Array:
        """The pruned kernel, indexed by a key."""
        kept = self._groups(unpack_bits(self.mask[...], 1, self.shape[-1]).astype(jnp.bool))
        values = self.codes[...].reshape(-1, self._pattern.n, self.shape[-1])
        place = jnp.clip(jnp.cumsum(kept, 1) - 1, 0, self._pattern.n - 1)
        return jnp.where(kept, jnp.take_along_axis(values, place, 1), 0).reshape(self.shape)[key]

    def latent(self) -> jax.Array:
        """Weights of which these are kept."""
        return self[...]

    def _groups(self, a: jax.Array) -> jax.Array:
        return a.reshape(-1, self._pattern.m, self.shape[-1])
