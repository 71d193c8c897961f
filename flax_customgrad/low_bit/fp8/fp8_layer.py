"""`Fp8Layer`: what the fp8 layers share, their scaling."""

import operator
from typing import Any, ClassVar, Literal, Self

from flax import nnx

from flax_customgrad.layers.packed_weights import PackableKernel
from flax_customgrad.layers.replaced_matmul import adopted, refuse_injected
from flax_customgrad.layers.stacked import Index, stack_axes
from flax_customgrad.low_bit.fp8.fp8_codes import Fp8Codes
from flax_customgrad.low_bit.fp8.fp8_kernel import Fp8Kernel
from flax_customgrad.low_bit.fp8.fp8_scaling import DelayedScaling, DelayedState
from flax_customgrad.numerics.argument_checks import check_size, check_word, is_integer
from flax_customgrad.numerics.products import MatmulConfig

Scaling = Literal["delayed", "current"]


class Fp8Layer(PackableKernel):
    """Mixed into a layer with a kernel, which, and its input, are multiplied in fp8.

    It comes after the layer among the bases: only then can a layer of nnx become one of these.

    Attributes:
        scaling: "delayed" or "current".
        margin: how many halvings of a range are left unused.
        delayed: the histories and scales, a `DelayedScaling`; None with current scaling.
    """

    __slots__ = ()
    _reference: ClassVar[type[nnx.Module]]
    """The layer of nnx that it takes the place of."""
    dtype: Any
    scaling: Scaling
    margin: int
    delayed: DelayedScaling | None

    @classmethod
    def from_layer(
        cls,
        layer: nnx.Module,
        *,
        scaling: Scaling = "delayed",
        history: int = 1024,
        margin: int = 0,
    ) -> Self:
        """Turns a layer of nnx, or a drop-in, into one that multiplies in fp8, in place.

        `layer` itself changes and is returned: pass `nnx.clone(layer)` to keep the original.

        Args:
            layer: of the class of nnx that this one subclasses, `nnx.Linear` for `Fp8Linear`.
            scaling: as for the constructor.
            history: as for the constructor.
            margin: as for the constructor.

        Returns:
            `layer`, which is now of this class.

        Raises:
            TypeError: the layer is of another class of nnx, or computes something else.
            ValueError: as for the constructor.
        """
        fp8: Any
        with adopted(cls, layer, cls._reference) as fp8:  # type: ignore[type-var]
            fp8._set_scaling(scaling, history, margin)
        return fp8

    def _set_scaling(self, scaling: Scaling, history: int, margin: int) -> None:
        """Gives the layer its scaling, or says what is wrong with an argument."""
        name = type(self).__name__
        refuse_injected(name, self)
        check_word(name, "scaling", scaling, ("delayed", "current"))
        history = check_size(name, "history", history)
        if not is_integer(margin) or not 0 <= margin <= 15:
            raise ValueError(f"{name}: margin={margin!r} must be an integer from 0 to 15")
        self.scaling = scaling
        self.margin = operator.index(margin)
        self.delayed = nnx.data(None)
        if scaling == "delayed":
            self.delayed = DelayedScaling(name, history, stack_axes(self))

    def stack_backward_state(self) -> None:
        """Gives each of stacked layers, which `nnx.vmap` has made, histories of its own."""
        if self.delayed is not None:
            self.delayed.stack(stack_axes(self))

    def _pack_one(self, index: Index) -> Fp8Kernel:
        """The codes of a kernel, for the scales of the step to come."""
        kernel, scales = self.kernel[index], None
        (computed,) = MatmulConfig(self.dtype).promote(kernel)
        if self.delayed is not None:
            scales = self.delayed.scales_to_come(index, self.margin)
        return Fp8Kernel(computed, kernel.dtype, self.kernel, scales, self.margin)

    @property
    def _state(self) -> tuple[DelayedState | None, Fp8Codes | None]:
        """What an operation is handed of the histories and scales, and of a packed kernel."""
        if self.is_packed:
            return None, self.kernel.fp8
        return None if self.delayed is None else self.delayed.states(), None
