"""A sweep of convolutions of many shapes against nnx: where is a lowering slower?

python -m benchmarks.convolutions [--seconds S] [--only TEXT]

Every line is the value and gradient of one layer: time of nnx divided by time of ours, median and
quartiles of paired rounds; time of PyTorch divided by time of ours, in its own layout and channels
last, where it is installed; temporary memory; seconds of tracing and compilation. The shapes were
not chosen for the lowerings: features from 1 to 1024, windows from 1 to 9, strides from 1 to 4, one
group to one for each feature, small and large images, float32 and bfloat16.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import flax_customgrad as fcg
from benchmarks import pytorch_convolutions
from flax_customgrad.command.benchmark.paired import paired, pin_allocator
from flax_customgrad.command.benchmark.steps import step


@dataclass(frozen=True)
class Case:
    """A layer and its images.

    Attributes:
        shape: of the images, (batch, *size, features).
        features: of the output.
        window: extent of the kernel along each axis.
        stride: steps between windows along each axis.
        groups: of features.
        dilation: of the kernel.
        transposed: whether it is a ConvTranspose.
        dtype: of images and computation.
    """

    shape: tuple[int, ...]
    features: int
    window: int
    stride: int = 1
    groups: int = 1
    dilation: int = 1
    transposed: bool = False
    dtype: Any = jnp.float32

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), f"to {self.features}", f"window {self.window}"]
        for name in ("stride", "groups", "dilation"):
            if getattr(self, name) > 1:
                parts.append(f"{name} {getattr(self, name)}")
        if self.transposed:
            parts.append("transposed")
        return ", ".join(parts) + (", bf16" if self.dtype == jnp.bfloat16 else "")

    def make(self, module: Any) -> tuple[nnx.Module, jax.Array]:
        """The layer and the images, as `steps.step` takes them."""
        window = (self.window,) * (len(self.shape) - 2)
        kwargs: dict[str, Any] = {"dtype": self.dtype, "kernel_dilation": self.dilation}
        if not self.transposed:
            kwargs["feature_group_count"] = self.groups
        cls = module.ConvTranspose if self.transposed else module.Conv
        layer = cls(self.shape[-1], self.features, window, self.stride, **kwargs, rngs=nnx.Rngs(0))
        return layer, jax.random.normal(jax.random.key(0), self.shape, self.dtype)


def cases() -> Iterator[Case]:
    """The shapes of the sweep."""
    for features in (1, 3, 16, 64):
        yield Case((8, 32, 32, features), 32, 3)
        yield Case((8, 32, 32, features), 32, 1)
        yield Case((8, 32, 32, features), 32, 4, 4)
        yield Case((8, 32, 32, features), 32, 5, 2)
    yield Case((8, 32, 32, 64), 1, 3)
    yield Case((8, 32, 32, 64), 1, 1)
    yield Case((4, 7, 7, 1024), 1024, 1)
    yield Case((4, 7, 7, 512), 512, 3)
    yield Case((1, 128, 128, 32), 32, 3)
    yield Case((256, 4, 4, 32), 32, 3)
    yield Case((8, 28, 28, 64), 64, 3, dilation=2)
    yield Case((8, 28, 28, 64), 64, 2, 2, dilation=2)
    for window in (1, 2, 3, 5, 9):
        yield Case((8, 28, 28, 64), 64, window, groups=64)
    for stride in (2, 3, 4):
        yield Case((8, 28, 28, 64), 64, 3, stride, groups=64)
        yield Case((8, 28, 28, 32), 32, 3, stride, groups=8)
        yield Case((8, 28, 28, 32), 32, 3, stride)
    for groups in (2, 4, 8, 16, 32):
        yield Case((4, 14, 14, 64), 64, 3, groups=groups)
        yield Case((4, 14, 14, 64), 64, 1, groups=groups)
    yield Case((4, 7, 7, 1024), 1024, 3, groups=1024)
    yield Case((4, 7, 7, 1024), 1024, 3, groups=64)
    yield Case((1, 112, 112, 32), 32, 3, groups=32)
    yield Case((64, 4, 4, 32), 32, 3, groups=32)
    yield Case((2, 2, 2, 8), 8, 3, groups=8)
    yield Case((8, 28, 28, 32), 64, 3, groups=32)
    yield Case((8, 28, 28, 8), 64, 3, groups=8)
    yield Case((8, 512, 128), 128, 4)
    yield Case((8, 512, 128), 128, 4, groups=128)
    yield Case((8, 512, 128), 128, 9, groups=128, dilation=4)
    yield Case((4, 8, 8, 8, 16), 16, 3)
    yield Case((4, 8, 8, 8, 16), 16, 3, groups=16)
    yield Case((4, 8, 8, 8, 16), 16, 2, 2)
    for window, stride in ((2, 2), (3, 2), (4, 2), (3, 1), (5, 3), (4, 4), (3, 4)):
        yield Case((4, 14, 14, 32), 32, window, stride, transposed=True)
    yield Case((4, 14, 14, 3), 32, 4, 2, transposed=True)
    yield Case((4, 28, 28, 32), 3, 4, 2, transposed=True)
    yield Case((8, 128, 64), 64, 4, 2, transposed=True)
    yield Case((2, 6, 6, 6, 16), 16, 3, 2, transposed=True)
    half = {"dtype": jnp.bfloat16}
    yield Case((8, 28, 28, 32), 32, 3, **half)
    yield Case((8, 28, 28, 64), 64, 1, **half)
    yield Case((8, 28, 28, 64), 64, 3, groups=64, **half)
    yield Case((8, 28, 28, 32), 32, 3, groups=8, **half)
    yield Case((8, 28, 28, 32), 32, 3, 2, **half)
    yield Case((4, 14, 14, 32), 32, 4, 2, transposed=True, **half)


def main() -> None:
    """Prints a line per shape, and at the end those in which ours is slower."""
    pin_allocator("benchmarks.convolutions")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each shape")
    parser.add_argument("--only", default="", help="shapes whose line has this text")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    columns = f"{'nnx':>9} {'ours':>9} ms  {'x':19} {'torch':11}"
    print(f"{'':44} {columns}  {'memory, MB':>13}  {'compile, s':>13}")
    slower = []
    for case in cases():
        if args.only in str(case):
            ratio, line = compare(case, args.seconds)
            print(f"{case!s:44} {line}", flush=True)
            if ratio < 0.95:
                slower.append(f"{case}: x{ratio:.2f}")
    print(f"\nslower than 0.95: {'; '.join(slower) or 'none'}")


def compare(case: Case, seconds: float) -> tuple[float, str]:
    """The ratio of a case, and its line.

    Args:
        case: the shape.
        seconds: how long to measure.
    """
    functions: dict[str, Any] = {}
    memory, compilation = [], []
    for name, module in (("nnx", nnx), ("ours", fcg)):
        seconds_of = []
        for _ in range(2):  # the first pays for what JAX does once
            began = time.perf_counter()
            compiled, args = step(case.make(module))
            seconds_of.append(time.perf_counter() - began)
        compilation.append(min(seconds_of))
        memory.append(compiled.memory_analysis().temp_size_in_bytes / 1e6)
        functions[name] = lambda f=compiled, a=args: f(*a)
    functions |= pytorch_convolutions.steps(*case.make(fcg))
    timed = paired(functions, seconds, rounds=7)
    ours = timed.pop("ours")
    torch = (f"{timed[n].milliseconds / ours.milliseconds:5.2f}" for n in list(timed)[1:])
    return ours.ratio, (
        f"{timed['nnx'].milliseconds:9.3f} {ours.milliseconds:9.3f}     "
        f"x{ours.ratio:.2f} [{ours.low:.2f}, {ours.high:.2f}]  {' '.join(torch):11}  "
        f"{memory[0]:6.1f} {memory[1]:6.1f}  {compilation[0]:6.2f} {compilation[1]:6.2f}"
    )


if __name__ == "__main__":
    main()
