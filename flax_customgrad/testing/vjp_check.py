"""`check_vjp`: checks the gradient of a layer or function, alone and under JAX's transforms."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_customgrad.contract.custom_vjp import CustomVJP
from flax_customgrad.contract.residuals import residual_bytes
from flax_customgrad.testing import checks
from flax_customgrad.testing.problem import Problem
from flax_customgrad.testing.report import GradientError, Report, Row

_EXACT = {
    "autodiff": checks.autodiff,
    "finite_differences": checks.finite_differences,
    "jit": checks.jit,
    "vmap": checks.vmap,
    "scan": checks.scan,
    "remat": checks.remat,
    "second_order": checks.second_order,
    "modes": checks.modes,
    "mesh": checks.mesh,
    "shard_map": checks.shard_map,
}

# Never inside another compiled function: eager execution, and programs on several devices.
_RUN_ALONE = ("autodiff", "mesh")

CHECKS = (*_EXACT, "dtypes", "residuals")
"""The names of the checks, in the order in which they run."""

_TOLERANCES = {"float64": 1e-9, "float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}
_SLOPE_TOLERANCE = 1e-6
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
            (parameters batched and shared), `scan`, `remat`, `second_order` (grad of grad, jvp of
            grad), `modes` (nnx.jit, remat, vmap and scan in each mode of NNX), `mesh` (8 devices,
            Explicit and Auto axes), `shard_map` (with and without check_vma), `dtypes`,
            `residuals` (bytes kept, beside autodiff; reported, never a failure).
        dtypes: dtypes for the check `dtypes`, whose expected values are computed in float64 from
            the same rounded inputs.
        tolerances: the error allowed per dtype, relative to the largest expected value; by default
            1e-9 for float64, 2e-6 for float32, 4e-3 for float16 and 3e-2 for bfloat16.
        raises: whether a failed comparison raises `GradientError`.

    Returns:
        A `Report`; `print` shows it as a table.

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
        problem = Problem.make(fn, reference, args, names, jnp.float64)
        itself = formula is None and _has_custom_gradient(problem)
        if itself:
            report.rows.append(Row("reference", "", status="skipped", note=_NO_REFERENCE))
        exact = [c for c in _EXACT if c in checks]
        if formula is not None and "finite_differences" in exact:
            exact.remove("finite_differences")
        # A check that the reference fails as well is a limit of JAX, and skipped; not so without a
        # transform, or where a function is its own reference.
        together = [c for c in exact if c not in _RUN_ALONE]
        if formula is not None and "second_order" in together:
            together.remove("second_order")  # JAX has no forward mode of a formula
        computed = _in_one_program(problem, together)
        for check in exact:
            tolerance = _SLOPE_TOLERANCE if check == "finite_differences" else allowed["float64"]
            excuse = None if itself or check == "autodiff" else problem.reference
            for n, comparison in enumerate(_EXACT[check](problem)):
                if (check, n) in computed:
                    got, wanted = computed[check, n]
                    report.rows += _rows(problem, check, comparison, got, wanted, tolerance)
                else:
                    report.rows += _compare(problem, check, comparison, tolerance, excuse)
        if "dtypes" in checks:
            for dtype in dtypes:
                report.rows += _in_dtype(fn, reference, args, names, jnp.dtype(dtype), allowed)
    if "residuals" in checks:
        _measure_residuals(report, Problem.make(fn, reference, args, names, jnp.float32))
    if raises and report.failures:
        raise GradientError(report)
    return report


def _has_custom_gradient(problem: Problem) -> bool:
    """Whether the reference, which autodiff is to differentiate, has a custom gradient in it."""
    try:
        traced = jax.make_jaxpr(problem.apply(problem.reference))(*problem.arrays)
    except Exception:
        return False  # each check will say that the reference fails
    return "custom_vjp_call" in str(traced)


def _in_one_program(problem: Problem, names: Sequence[str]) -> dict[tuple[str, int], Any]:
    """Runs comparisons in one compiled program, which is much faster than one program for each.

    Args:
        problem: the function, its reference and its arguments.
        names: the checks.

    Returns:
        The gradient and its expected value, by check and number of the comparison. A comparison
        that cannot be traced is left out. Where the program cannot be compiled all are left out:
        the error then shows when each runs alone.
    """

    def program(arrays: list[jax.Array]) -> tuple[Any, Any, dict[tuple[str, int], Any]]:
        traced, computed = problem.at(arrays), {}
        for name in names:
            for n, comparison in enumerate(_EXACT[name](traced)):
                try:
                    computed[name, n] = comparison.run(traced.fn), comparison.expected()
                except Exception:
                    continue
        return traced.expected_value, traced.expected, computed

    try:
        problem.expected_value, problem.expected, computed = jax.jit(program)(problem.arrays)
    except Exception:
        return {}
    return computed


def _compare(
    problem: Problem,
    check: str,
    comparison: checks.Comparison,
    tolerance: float,
    excuse: Callable[..., Any] | None,
) -> list[Row]:
    """Runs one comparison: a row per argument, or one that says why there is none.

    Args:
        problem: the function, its reference and its arguments.
        check: the name of the check.
        comparison: what to compare.
        tolerance: the error allowed.
        excuse: a function that turns a failure into a skip if it fails as well; or None.
    """
    case = comparison.case
    try:
        expected = comparison.expected()
        got = comparison.run(problem.fn)
    except checks.Skip as reason:
        return [Row(check, case, status="skipped", note=str(reason))]
    except Exception as error:
        return [_row_of_error(check, comparison, excuse, error)]
    return _rows(problem, check, comparison, got, expected, tolerance)


def _row_of_error(
    check: str,
    comparison: checks.Comparison,
    excuse: Callable[..., Any] | None,
    error: Exception,
) -> Row:
    """A failed row; or a skipped one, where the excuse fails as well: JAX cannot do this here."""
    if excuse is not None:
        try:
            comparison.expected()
            comparison.run(excuse)
        except Exception as same:
            note = f"the reference fails as well: {_first_line(same)}"
            return Row(check, comparison.case, status="skipped", note=note)
    note = f"raised {type(error).__name__}: {_first_line(error)}"
    return Row(check, comparison.case, status="failed", note=note)


def _rows(
    problem: Problem,
    check: str,
    comparison: checks.Comparison,
    got: tuple[Any, ...],
    expected: tuple[Any, ...],
    tolerance: float,
) -> list[Row]:
    rows = []
    case = comparison.case
    names = comparison.of
    if names is None:
        names = [problem.names[i] for i in problem.differentiable]
    elif isinstance(names, str):
        names = [names] * len(expected)
    for label, g, e in zip(names, got, expected, strict=True):
        g, e = (np.asarray(a, np.float64) for a in (g, e))
        if g.shape != e.shape:
            note = f"has shape {g.shape}, expected {e.shape}"
            rows.append(Row(check, case, label, status="failed", note=note))
            continue
        error = relative_error(g, e)
        status = "ok" if error <= tolerance else "failed"
        rows.append(Row(check, case, label, error, tolerance, status))
    return rows


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference relative to the largest expected value; inf where one is not finite.

    Values that are not finite agree where they are equal, NaN with NaN.
    """
    if got.size == 0:
        return 0.0
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    difference = np.where(same, 0.0, np.abs(got - expected))
    if not np.isfinite(difference).all():
        return float("inf")
    finite = np.abs(expected[np.isfinite(expected)])
    scale = finite.max(initial=0.0)
    return float(difference.max() / scale) if scale else float(difference.max())


def _in_dtype(fn, reference, args, names, dtype, allowed) -> list[Row]:
    """The gradient in a dtype against the reference in float64, from the same rounded inputs."""
    low = Problem.make(fn, reference, args, names, dtype)
    high = Problem.make(fn, reference, low.args, names, jnp.float64)
    comparison = checks.Comparison(
        dtype.name,
        lambda fn: jax.jit(low.linear_gradient(fn))(*low.arrays),
        lambda: jax.jit(high.linear_gradient(high.reference))(*high.arrays),
    )
    return _compare(low, "dtypes", comparison, allowed[dtype.name], excuse=low.reference)


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


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]
