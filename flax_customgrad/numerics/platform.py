"""What the machine is that a program is traced for."""

from typing import Any

import jax

from flax_customgrad.numerics.sizes import is_known

_LARGE = 1 << 16


def is_one_cpu() -> bool:
    """Whether JAX computes on one device, a CPU."""
    return jax.device_count() == 1 and jax.default_backend() == "cpu"


def pays_to_branch(size: Any) -> bool:
    """Whether it pays to decide by a value which of two computations of an array runs.

    It does on one CPU. A GPU would wait for the value, and several devices would have to agree on
    it, which takes a collective. For a small array compiling the branch takes longer than it saves.

    Args:
        size: the number of elements of the array.
    """
    return is_known(size) and size >= _LARGE and is_one_cpu()
