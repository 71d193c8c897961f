"""`Norm`: what the normalization layers have in common, mixed into those of nnx."""

from typing import Any

import jax
import jax.numpy as jnp
from flax.nnx.nn import dtypes

from flax_customgrad.contract.compat import is_traced
from flax_customgrad.layers.drop_in import Parameters, has_custom_backward, parameters
from flax_customgrad.layers.normalization.axes import NormAxes
from flax_customgrad.layers.normalization.config import NormConfig, NormResidual
from flax_customgrad.layers.normalization.devices import Devices
from flax_customgrad.layers.normalization.normalize import Statistics, normalize, reject_zeros
from flax_customgrad.numerics.argument_checks import integers


class Norm:
    """Mixed into a normalization of nnx: computes it with `normalize`.

    It comes after the layer among the bases: only then can a layer of nnx become one of these. With
    a `promote_dtype` of the user's own, and for integer or complex inputs, the layer computes
    as nnx does and JAX differentiates that.

    Attributes:
        residual: what the backward keeps, "input" or "output".
    """

    __slots__ = ()
    residual: NormResidual = "input"
    # What the layers of nnx hold.
    promote_dtype: Any
    axis_name: Any
    axis_index_groups: Any
    epsilon: Any
    dtype: Any

    def _set_residual(self, residual: NormResidual) -> None:
        """Makes the choice; a layer that keeps its input holds nothing that nnx's does not."""
        if residual not in ("input", "output"):
            raise ValueError(f"residual={residual!r}: expected 'input' or 'output'")
        if residual == "output":
            self.residual = residual
            self._check_scale()

    def _has_custom_backward(self, x: Any) -> bool:
        """Whether `normalize` computes what nnx would; a traced epsilon is left to nnx."""
        return (
            self.promote_dtype is dtypes.promote_dtype
            and not is_traced(self.epsilon)
            and has_custom_backward(x, self._scale_and_bias(), self.dtype)
        )

    def _scale_and_bias(self) -> Parameters:
        """Those of the two parameters that the layer has."""
        names = (name for name in ("scale", "bias") if hasattr(self, name))
        return parameters(self, *names)  # type: ignore[arg-type]

    def _normalize(
        self,
        x: jax.Array,
        mask: Any,
        axes: NormAxes,
        *promoted_with: jax.Array,
        centered: bool = True,
        with_statistics: bool = False,
    ) -> tuple[jax.Array, Statistics | None]:
        """The output, and the statistics or None.

        Args:
            x: input of any shape, float.
            mask: binary, an array that broadcasts to x or a boolean; or None.
            axes: the axes that share statistics.
            *promoted_with: further arrays that the dtype of the output is promoted with.
            centered: whether the mean is taken out.
            with_statistics: whether the layer needs them.
        """
        if self.residual == "output":
            self._check_scale()
        return normalize(
            *self._operands(
                x, mask, axes, *promoted_with, centered=centered, with_statistics=with_statistics
            )
        )

    def _operands(
        self,
        x: jax.Array,
        mask: Any,
        axes: NormAxes,
        *promoted_with: jax.Array,
        centered: bool = True,
        with_statistics: bool = False,
    ) -> tuple[Parameters, jax.Array, jax.Array | None, NormConfig]:
        """The arguments of `normalize`, from those of `_normalize`."""
        params = self._scale_and_bias()
        name, groups = self.axis_name, self.axis_index_groups
        config = NormConfig(
            axes,
            float(self.epsilon),
            dtypes.canonicalize_dtype(x, *promoted_with, *params.values(), dtype=self.dtype),
            centered,
            Devices(
                tuple(name) if isinstance(name, list) else name,
                None if groups is None else tuple(map(integers, groups)),
            ),
            self.residual,
            with_statistics,
        )
        if mask is not None:
            mask = jnp.asarray(mask, bool)
            mask = jnp.expand_dims(mask, range(x.ndim - mask.ndim))
        return params, x, mask, config

    def _check_scale(self) -> None:
        """Refuses a scale of 0 while it can be seen; a traced one is checked when it runs."""
        scale = self._scale_and_bias().get("scale")
        if scale is not None and not is_traced(scale):
            reject_zeros(scale)
