"""Runs comparisons, as many in one compiled program as can be, and turns them into rows."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.extend
import numpy as np

from flax_customgrad.contract import compat
from flax_customgrad.testing import failures
from flax_customgrad.testing.compare import SHARD_MAP, TOGETHER, Comparison, Fn, Skip
from flax_customgrad.testing.difference import not_finite, relative_error
from flax_customgrad.testing.problem import Gradient, Problem
from flax_customgrad.testing.report import Row

Check = Callable[[Problem], Iterator[Comparison]]

_Key = tuple[str, int]


def run(
    problem: Problem,
    checks: Mapping[str, Check],
    tolerance: float,
    excuses: Mapping[str, Fn | None],
    shared: Sequence[str] = (),
) -> list[Row]:
    """Makes the comparisons of some checks.

    Args:
        problem: the function, its reference and its arguments.
        checks: the checks by name.
        tolerance: the error allowed where a comparison has none of its own.
        excuses: by the name of the check a function that turns a failure into a skip if it fails
            as well, or None.
        shared: the names of what comparisons that run alone need of the problem.

    Returns:
        A row per comparison and argument, in the order of the checks.
    """
    if not checks:
        return []
    computed = _Computed()
    computed.run(problem, checks, TOGETHER, shared)
    if any(c.program == SHARD_MAP for cs in computed.comparisons.values() for c in cs):
        computed.run(problem, checks, SHARD_MAP)
    rows = []
    for check, generate in checks.items():
        live = functools.cache(lambda generate=generate: list(generate(problem)))
        for n, comparison in enumerate(computed.comparisons.get(check) or live()):
            comparison = computed.instead_of(comparison, (check, n), problem.fn, live)

            def compiled(fn: Fn, generate=generate, n=n) -> Gradient:
                return _compiled(lambda arrays: [*generate(problem.at(arrays))][n].run(fn))(
                    problem.arrays
                )

            rows += _compare(problem, check, comparison, tolerance, excuses.get(check), compiled)
    return rows


class _Computed:
    """What compiled programs have computed.

    Attributes:
        comparisons: by check, its comparisons, in order; their functions are of no use.
        expected: by check and number of the comparison.
        got: the same; a `Skip` where it cannot be run.
    """

    def __init__(self) -> None:
        self.comparisons: dict[str, list[Comparison]] = {}
        self.expected: dict[_Key, Gradient] = {}
        self.got: dict[_Key, Gradient | Skip] = {}

    def instead_of(
        self, comparison: Comparison, key: _Key, fn: Fn, live: Callable[[], list[Comparison]]
    ) -> Comparison:
        """A comparison that returns what has been computed, and computes the rest.

        Args:
            comparison: as it was in a program, or live.
            key: its check and number.
            fn: the function under test.
            live: makes the comparisons of the check outside of any program.
        """

        def expected() -> Gradient:
            return self.expected[key] if key in self.expected else live()[key[1]].expected()

        def run(other: Fn) -> Gradient:
            got = self.got.get(key) if other is fn else None
            if isinstance(got, Skip):
                raise got
            return live()[key[1]].run(other) if got is None else got

        def adds_up() -> bool:
            return live()[key[1]].adds_up()

        return comparison._replace(expected=expected, run=run, adds_up=adds_up)

    def run(
        self, problem: Problem, checks: Mapping[str, Check], name: str, shared: Sequence[str] = ()
    ) -> None:
        """Runs the comparisons of one program, which is much faster than one program for each.

        The program `TOGETHER` computes every expected value. A comparison that cannot be traced is
        left out. Where the program cannot be compiled all are left out: the error then shows when
        each runs alone.
        """
        comparisons: dict[str, list[Comparison]] = {}
        skipped: dict[_Key, Skip] = {}

        def program(arrays: list[jax.Array]) -> tuple[Any, ...]:
            traced = problem.at(arrays)
            expected, got = {}, {}
            for check, generate in checks.items():
                comparisons[check] = list(generate(traced))
                for n, comparison in enumerate(comparisons[check]):
                    try:
                        if name == TOGETHER:
                            expected[check, n] = comparison.expected()
                        if name == comparison.program:
                            got[check, n] = _traced(comparison, traced.fn)
                    except Skip as reason:
                        skipped[check, n] = reason
                    except Exception:
                        continue
            return expected, got, {name: getattr(traced, name) for name in shared}

        try:
            expected, got, values = _compiled(program)(problem.arrays)
        except Exception:
            return
        self.expected |= expected
        self.got |= got | skipped
        self.comparisons |= comparisons
        for attribute, value in values.items():
            setattr(problem, attribute, value)


def _traced(comparison: Comparison, fn: Fn) -> Gradient:
    """Runs a comparison as part of a program that can be compiled."""
    if not comparison.is_forward:
        return comparison.run(fn)
    jaxpr = jax.make_jaxpr(lambda: comparison.run(fn))()
    if compat.refuses_forward_mode(jaxpr):
        raise TypeError("JAX would refuse to compile it")
    return tuple(jax.extend.core.jaxpr_as_fun(jaxpr)())


def _compiled(program: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a program that runs once: on a CPU, LLVM need not optimize it."""
    on_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    return jax.jit(program, compiler_options=options)


def _compare(
    problem: Problem,
    check: str,
    comparison: Comparison,
    tolerance: float,
    excuse: Fn | None,
    compiled: Callable[[Fn], Gradient],
) -> list[Row]:
    """Runs one comparison: a row per argument, or one that says why there is none."""
    case = comparison.case
    try:
        expected = comparison.expected()
        got = comparison.run(problem.fn)
    except Skip as reason:
        return [Row(check, case, status="skipped", note=str(reason))]
    except Exception as error:
        return [_row_of_error(check, comparison, excuse, error)]
    rows = _rows(problem, check, comparison, got, expected, tolerance)
    if comparison.limit and excuse and any(row.status == "failed" for row in rows):
        limited = comparison._replace(tolerance=comparison.limit)
        rows_with_limit = _rows(problem, check, limited, got, expected, tolerance)
        if comparison.adds_up():
            return rows_with_limit
        try:
            of_reference = compiled(excuse)
        except Exception:
            return rows  # the reference is known in float64 alone
        same = _rows(problem, check, comparison, of_reference, expected, tolerance)
        choices = zip(rows, rows_with_limit, same, strict=True)
        return [row if other.status == "ok" else limited for row, limited, other in choices]
    return rows


def _row_of_error(check: str, comparison: Comparison, excuse: Fn | None, error: Exception) -> Row:
    """A failed row; or a skipped one, where the excuse fails as well: JAX cannot do this here."""
    if excuse is not None:
        try:
            comparison.expected()
            comparison.run(excuse)
        except Exception as same:
            note = f"the reference fails as well: {failures.first_line(same)}"
            return Row(check, comparison.case, status="skipped", note=note)
    return Row(
        check,
        comparison.case,
        status="failed",
        note=failures.summary(error),
        details=failures.details(error),
    )


def _rows(
    problem: Problem,
    check: str,
    comparison: Comparison,
    got: Gradient,
    expected: Gradient,
    tolerance: float,
) -> list[Row]:
    rows = []
    names = comparison.of
    if names is None:
        names = [problem.names[i] for i in problem.differentiable]
    elif isinstance(names, str):
        names = [names] * len(expected)
    for label, g, e in zip(names, got, expected, strict=True):
        row = Row(check, comparison.case, label)
        rows.append(_row(row, comparison, _as_float64(g), _as_float64(e), tolerance))
    return rows


def _row(
    row: Row, comparison: Comparison, got: np.ndarray, expected: np.ndarray, tolerance: float
) -> Row:
    """Fills in the error of one array."""
    if got.shape != expected.shape:
        note = f"has shape {got.shape}, expected {expected.shape}"
        return dataclasses.replace(row, status="failed", note=note)
    note = not_finite(got, expected)
    if note:
        return dataclasses.replace(row, status="failed", note=note)
    if comparison.tolerance is not None:
        tolerance = comparison.tolerance(expected)
    error = relative_error(got, expected)
    status = "ok" if error <= tolerance else "failed"
    return dataclasses.replace(row, error=error, tolerance=tolerance, status=status)


def _as_float64(array: Any) -> np.ndarray:
    return np.asarray(array, np.float64)
