"""`check_vjp`: checks the gradient of a layer or function, alone and under JAX's transforms."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_customgrad.contract.custom_vjp import CustomVJP
from flax_customgrad.contract.residuals import residual_bytes
from flax_customgrad.testing import checks, coverage
from flax_customgrad.testing.forward_mode import forward_mode
from flax_customgrad.testing.half_precision import in_dtype
from flax_customgrad.testing.problem import Problem
from flax_customgrad.testing.report import GradientError, Report, Row
from flax_customgrad.testing.running import run

_EXACT = {
    "autodiff": checks.autodiff,
    "finite_differences": checks.finite_differences,
    "jit": checks.jit,
    "vmap": checks.vmap,
    "scan": checks.scan,
    "remat": checks.remat,
    "second_order": checks.second_order,
    "forward_mode": forward_mode,
    "modes": checks.modes,
    "mesh": checks.mesh,
    "shard_map": checks.shard_map,
}

CHECKS = (*_EXACT, "dtypes", "residuals")
"""The names of the checks, in the order in which they run."""

# Of any other dtype a few units in the last place: see `half_precision`.
_TOLERANCES = {"float64": 1e-9, "float32": 2e-6}
_NO_REFERENCE = (
    "what autodiff is trusted to differentiate has a custom gradient itself, so the function is "
    "compared with that, and with finite differences: give reference= or formula="
)


def check_vjp(
    fn: Callable[..., Any],
    *args: Any,
    reference: Callable[..., Any] | None = None,
    formula: Callable[..., tuple[Any, ...]] | None = None,
    checks: Sequence[str] = CHECKS,
    dtypes: Sequence[Any] = ("float32", "bfloat16", "float16"),
    tolerances: Mapping[str, float] | None = None,
    raises: bool = True,
) -> Report:
    """Compares a gradient with its expected value, alone and under the transforms of JAX.

    Everything but `dtypes` runs in float64, where a mistake cannot be taken for rounding.

    Args:
        fn: a layer, called with `args`; or a function of `args`, the first of which may be a
            Module, a State or a dict of parameters. Any custom gradient will do: that of this
            library, `jax.custom_vjp`, `nnx.custom_vjp`.
        *args: arrays, Modules, States, dicts, None and static values. An axis of size 8 in front
            of the inputs lets the checks on a mesh split them.
        reference: a function of the same arguments for autodiff to differentiate. By default `fn`
            itself under `use_autodiff`, which is right for a gradient of this library; for another
            custom gradient give the plain function.
        formula: for a gradient that is meant to differ from the derivative: a function of the
            arguments and of the output's cotangent, `formula(*args, g)`, that returns what a
            backward returns, one cotangent per argument. It replaces the reference, and finite
            differences are left out.
        checks: which of `CHECKS` to run:
            `autodiff` (value and gradient of the reference), `finite_differences`, `jit`, `vmap`
            (everything batched; parameters shared, or an array that may be one), `scan`, `remat`,
            `second_order` (grad of grad, jvp of grad), `forward_mode` (jvp, vmap of jvp, grad of
            jvp; skipped where it is not supported), `modes` (nnx.jit, remat, vmap and scan in each
            mode of NNX), `mesh` (8 devices, Explicit and Auto axes), `shard_map` (with and without
            check_vma), `dtypes`, `residuals` (bytes kept, beside autodiff; more than autodiff is a
            warning, never a failure).
        dtypes: dtypes for the check `dtypes`, whose expected values are computed in float64 from
            the same rounded inputs. In half precision the gradients that are summed over the rows
            of the inputs are compared for thousands of rows as well.
        tolerances: the error allowed per dtype, relative to the largest expected value; by default
            1e-9 for float64 and 2e-6 for float32. For half precision it is 2 units in the last
            place of the largest expected value; 8 where autodiff of the reference, in the same
            dtype, is off by more than 2 as well, or where `fn` rounds on the way to its value.
        raises: whether a failed comparison raises `GradientError`.

    Returns:
        A `Report`; `print` shows it as a table. Below it stands what the example does not cover,
        such as a bias that is None or zero, a batch of 1, or axes of the same size.

    Raises:
        GradientError: a comparison failed; it names the check, the argument and how far off.
        ValueError: one of `checks` does not exist, or both `reference` and `formula` are given.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> from flax_customgrad.testing import check_vjp
        >>> layer = fcg.Linear(3, 4, rngs=nnx.Rngs(0))
        >>> report = check_vjp(layer, jnp.ones((8, 3)), checks=["autodiff", "vmap"])
        >>> report.failures
        []
    """
    unknown = sorted(set(checks) - set(CHECKS))
    if unknown:
        raise ValueError(f"unknown checks {unknown}; there are {', '.join(CHECKS)}")
    if reference is not None and formula is not None:
        raise ValueError("give a reference or a formula, not both: each says what is expected")
    name = _name(fn)
    if isinstance(fn, nnx.Module):
        args = (fn, *args)
        names = ["", *_argument_names(type(fn).__call__, len(args))[1:]]
        fn = _call
    else:
        names = _argument_names(fn, len(args))
    if formula is not None:
        reference = _with_formula(fn, formula)
    allowed = {**_TOLERANCES, **(tolerances or {})}
    report = Report(name)
    with jax.enable_x64(True):
        made = functools.partial(
            Problem.make, fn, reference, arg_names=names, is_surrogate=formula is not None
        )
        problem = made(args, dtype=jnp.float64)
        itself = formula is None and _has_custom_gradient(problem)
        if itself:
            report.rows.append(Row("reference", "", status="skipped", note=_NO_REFERENCE))
        exact = {c: make for c, make in _EXACT.items() if c in checks}
        if formula is not None:
            exact.pop("finite_differences", None)
        # A check that the reference fails as well is a limit of JAX, and skipped; not so without a
        # transform, or where a function is its own reference.
        excuse = None if itself else problem.reference
        excuses = {c: excuse for c in exact if c != "autodiff"}
        shared = ("expected_value", "expected", "cotangent")
        report.rows += run(problem, exact, allowed["float64"], excuses, shared)
        report.not_covered = _not_covered(problem, dict(zip(names, args, strict=True)))
        for dtype in map(jnp.dtype, dtypes if "dtypes" in checks else ()):
            low = made(args, dtype=dtype)
            # In float64, with the same rounded arguments.
            high = made(low.args, dtype=jnp.float64)
            check = functools.partial(
                in_dtype, high=high, dtype=dtype, allowed=allowed.get(dtype.name)
            )
            excuses = {"dtypes": None if itself else low.reference}
            report.rows += run(low, {"dtypes": check}, 0.0, excuses)
    if "residuals" in checks:
        _measure_residuals(report, made(args, dtype=jnp.float32))
    if raises and report.failures:
        raise GradientError(report)
    return report


def _not_covered(problem: Problem, args: Mapping[str, Any]) -> list[coverage.Hint]:
    keywords = problem.fn.keywords if isinstance(problem.fn, functools.partial) else {}
    hints = coverage.hints(problem, {**args, **keywords})
    # A formula states a gradient of 0; and nothing has been computed without a check.
    if not problem.is_surrogate and "expected" in vars(problem):
        for i, gradient in zip(problem.differentiable, problem.expected, strict=True):
            hints += coverage.of_gradient(problem.names[i], np.asarray(gradient))
    return hints


def _has_custom_gradient(problem: Problem) -> bool:
    """Whether the reference, which autodiff is to differentiate, has a custom gradient in it."""
    try:
        traced = jax.make_jaxpr(problem.apply(problem.reference))(*problem.arrays)
    except Exception:
        return False  # each check will say that the reference fails
    return "custom_vjp_call" in str(traced)


def _measure_residuals(report: Report, problem: Problem) -> None:
    def kept_by(fn: Callable[..., Any]) -> int:
        values = [problem.arrays[i] for i in problem.differentiable]
        return residual_bytes(problem.of_differentiable(problem.apply(fn)), *values)

    report.residual_bytes = kept_by(problem.fn)
    report.reference_residual_bytes = kept_by(problem.reference)
    kept = f"{report.residual_bytes} B kept, autodiff {report.reference_residual_bytes} B"
    report.rows.append(Row("residuals", kept))


def _with_formula(fn: Callable[..., Any], formula: Callable[..., tuple[Any, ...]]) -> CustomVJP:
    """`fn` with the gradient that a formula states."""
    plain = fn.fun if isinstance(fn, CustomVJP) else fn

    def stated(*args: Any) -> Any:
        return plain(*args)

    op = CustomVJP(stated, surrogate=True)
    op.defvjp(lambda *args: (op(*args), args), lambda args, g: formula(*args, g))
    return op


def _call(module: nnx.Module, *args: Any) -> Any:
    return module(*args)  # type: ignore[operator]


def _name(fn: Any) -> str:
    if isinstance(fn, nnx.Module):
        return type(fn).__name__
    return getattr(fn, "__name__", type(fn).__name__)


def _argument_names(fn: Callable[..., Any], n: int) -> list[str]:
    """The names in a function's signature, numbered where it has none."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        parameters = ()
    names = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    return [*names[:n], *(f"argument {i}" for i in range(len(names), n))]
