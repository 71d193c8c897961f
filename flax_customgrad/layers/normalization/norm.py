"""`Norm`: what the drop-ins for the normalizations of nnx share."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
from flax.nnx.nn import dtypes

from flax_customgrad.contract.compat import is_traced
from flax_customgrad.layers.drop_in import (
    Parameters,
    has_custom_backward,
    merged_signature,
    parameters,
)
from flax_customgrad.layers.normalization.axes import NormAxes
from flax_customgrad.layers.normalization.moments import Devices
from flax_customgrad.layers.normalization.normalize import (
    NormConfig,
    Statistics,
    normalize,
    reject_zeros,
)

Residual = Literal["input", "output"]
"""What the backward keeps to find the normalized input again.

"input" is right where nothing else keeps either. "output" costs nothing where the next layer keeps
its input, as a Linear does. But it divides by the scale: digits are lost where |bias / scale| is
large and where the output is in half precision, and a scale of 0 is an error.
"""


def choosing(of: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Puts `residual` beside the arguments of a constructor.

    Args:
        of: the constructor of nnx, whose signature is shown.

    Returns:
        A decorator, of a constructor that takes what that of nnx does. It raises a ValueError where
        `residual` is not one, and where it is "output" and a scale is 0.
    """

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        def with_residual(
            self: "Norm", *args: Any, residual: Residual = "input", **kwargs: Any
        ) -> None:
            init(self, *args, **kwargs)
            self._keep(residual)

        signature = merged_signature(of, with_residual)
        functools.update_wrapper(with_residual, of)
        with_residual.__signature__ = signature  # type: ignore[attr-defined]
        return with_residual

    return decorate


class Norm:
    """Mixed into a normalization of nnx: computes it with `normalize`, and adds a choice.

    It comes after the layer among the bases: only then can a layer of nnx become one of these. With
    a `promote_dtype` of the user's own, and for integer or complex inputs, the layer computes
    as nnx does and JAX differentiates that.

    Attributes:
        residual: what the backward keeps, "input" or "output".
    """

    __slots__ = ()
    residual: Residual = "input"
    # What the layers of nnx hold.
    promote_dtype: Any
    axis_name: Any
    axis_index_groups: Any
    epsilon: Any
    dtype: Any

    def _keep(self, residual: Residual) -> None:
        """Makes the choice; a layer that keeps its input holds nothing that nnx's does not."""
        if residual not in ("input", "output"):
            raise ValueError(f"residual={residual!r}: expected 'input' or 'output'")
        if residual == "output":
            self.residual = residual
            self._check_scale()

    def _ours(self, x: Any) -> bool:
        """Whether `normalize` computes what nnx would."""
        return self.promote_dtype is dtypes.promote_dtype and has_custom_backward(
            x, self._parameters()
        )

    def _parameters(self) -> Parameters:
        names = (name for name in ("scale", "bias") if hasattr(self, name))
        return parameters(self, *names)  # type: ignore[arg-type]

    def _normalize(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        axes: NormAxes,
        *promoted_with: jax.Array,
        centered: bool = True,
    ) -> tuple[jax.Array, Statistics]:
        """The output and the statistics.

        Args:
            x: input of any shape, float.
            mask: binary, broadcastable to x; or None.
            axes: what shares statistics.
            *promoted_with: arrays that have a say in the dtype of the output, beside x, scale and
                bias.
            centered: whether the mean is taken out.
        """
        params = self._parameters()
        if self.residual == "output":
            self._check_scale()
        groups = self.axis_index_groups
        how = NormConfig(
            axes,
            float(self.epsilon),
            dtypes.canonicalize_dtype(x, *promoted_with, *params.values(), dtype=self.dtype),
            centered,
            Devices(self.axis_name, groups and tuple(map(tuple, groups))),
            self.residual,
        )
        return normalize(params, x, None if mask is None else mask.astype(bool), how)

    def _check_scale(self) -> None:
        """Rejects a scale of 0 while it can be seen; a traced one is checked when it runs."""
        scale = self._parameters().get("scale")
        if scale is not None and not is_traced(scale):
            reject_zeros(scale)
