"""check_vjp catches planted mistakes, and says where; and lets right gradients pass."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType

import flax_customgrad as fcg
from flax_customgrad.testing import CHECKS, GradientError, check_vjp, forward_mode

QUICK = ["autodiff", "finite_differences"]
X = jax.random.normal(jax.random.key(0), (8, 3))


def square(params, x):
    """A square kernel, so that a transposed gradient has the right shape."""
    return x @ params["kernel"] + params["bias"]


PARAMS = {"kernel": jax.random.normal(jax.random.key(1), (3, 3)), "bias": jnp.ones(3)}


def right(res, g):
    params, x = res
    return {"kernel": x.T @ g, "bias": g.sum(0)}, g @ params["kernel"].T


def with_backward(bwd, fun=square, decorate=fcg.custom_vjp):
    op = decorate(fun)
    op.defvjp(lambda *args: (fun(*args), args), bwd)
    return op


def planted(**wrong):
    """A backward that is right but for the entries given, each a function of (res, g, right)."""

    def bwd(res, g):
        grads, dx = right(res, g)
        for name in wrong:
            if name == "x":
                dx = wrong[name](res, g, dx)
            else:
                grads[name] = wrong[name](res, g, grads[name])
        return grads, dx

    return bwd


MISTAKES = {
    "transposed weight gradient": ("params.kernel", planted(kernel=lambda res, g, d: d.T)),
    "transposed weight": ("x", planted(x=lambda res, g, d: g @ res[0]["kernel"])),
    "dropped sum over the batch": ("params.bias", planted(bias=lambda res, g, d: g[0])),
    "dropped rows": ("params.kernel", planted(kernel=lambda res, g, d: res[1][:4].T @ g[:4])),
    "doubled bias": ("params.bias", planted(bias=lambda res, g, d: 2 * d)),
    "mean for sum": ("params.bias", planted(bias=lambda res, g, d: g.mean(0))),
    "zero": ("x", planted(x=lambda res, g, d: None)),
    "sign": ("x", planted(x=lambda res, g, d: -d)),
    "computed in bfloat16": (
        "params.kernel",
        planted(kernel=lambda res, g, d: d.astype(jnp.bfloat16).astype(d.dtype)),
    ),
    "computed in float32": (
        "params.kernel",
        planted(kernel=lambda res, g, d: d.astype(jnp.float32).astype(d.dtype)),
    ),
}


@pytest.mark.parametrize("check", QUICK)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_caught_and_located(mistake, check):
    argument, bwd = MISTAKES[mistake]
    if (mistake, check) == ("computed in float32", "finite_differences"):
        return  # slopes have too few digits to see this one
    with pytest.raises(GradientError, match=rf"{check}, .*{argument}: off by") as caught:
        check_vjp(with_backward(bwd), PARAMS, X, checks=[check])
    wrong = {row.argument for row in caught.value.report.failures}
    assert wrong == {argument}


@pytest.mark.smoke
def test_a_missing_mean_is_caught():
    """The classic of normalization: a backward that forgets that the mean depends on x too."""

    def centred(x):
        return x - x.mean(-1, keepdims=True)

    wrong = with_backward(lambda res, g: (g,), fun=centred)
    with pytest.raises(GradientError, match="autodiff, gradient, x: off by"):
        check_vjp(wrong, X, checks=QUICK)
    good = with_backward(lambda res, g: (g - g.mean(-1, keepdims=True),), fun=centred)
    assert not check_vjp(good, X, checks=QUICK).failures


def right_on_every_mesh(res, g):
    params, x = res
    sharding = jax.typeof(params["kernel"]).sharding
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    dkernel = jnp.einsum("bi,bo->io", x, g, out_sharding=sharding if explicit else None)
    return {"kernel": dkernel, "bias": g.sum(0)}, g @ params["kernel"].T


def test_a_right_gradient_passes_everything_and_a_layer_is_called():
    report = check_vjp(with_backward(right_on_every_mesh), PARAMS, X)
    assert {row.check for row in report.rows} == set(CHECKS) - {"modes"}
    skipped = {row.check for row in report.rows if row.status == "skipped"}
    assert skipped <= (set() if forward_mode.REQUIRED else {"forward_mode"})
    report = check_vjp(fcg.Linear(3, 4, rngs=nnx.Rngs(0)), X, checks=["modes"])
    assert {row.argument for row in report.rows} == {"kernel", "bias"}
    assert len({row.case for row in report.rows}) == 12


def test_a_weight_gradient_that_shard_map_must_sum():
    bare = with_backward(right, decorate=jax.custom_vjp)
    with pytest.raises(GradientError, match="shard_map, check_vma=True: raised"):
        check_vjp(bare, PARAMS, X, reference=square, checks=["shard_map"])


def test_a_product_whose_sharding_nobody_said():
    with pytest.raises(GradientError, match="mesh, Explicit axes: raised ShardingTypeError"):
        check_vjp(with_backward(right), PARAMS, X, checks=["mesh"])


def test_a_forward_that_calls_the_decorated_function():
    op = jax.custom_vjp(square)
    op.defvjp(lambda params, x: (op(params, x), (params, x)), right)
    with pytest.raises(GradientError, match=r"second_order, jvp of grad: raised"):
        check_vjp(op, PARAMS, X, reference=square, checks=["second_order"])


def test_a_dtype_that_is_too_narrow_is_caught_by_dtypes():
    def in_bfloat16(res, g):
        params, x = (jax.tree.map(lambda a: a.astype(jnp.bfloat16), part) for part in res)
        grads, dx = right((params, x), g.astype(jnp.bfloat16))
        return jax.tree.map(lambda a, b: a.astype(b.dtype), (grads, dx), tuple(res))

    with pytest.raises(GradientError, match="dtypes, float32"):
        check_vjp(with_backward(in_bfloat16), PARAMS, X, checks=["dtypes"])


@pytest.mark.parametrize("decorate", [jax.custom_vjp, nnx.custom_vjp], ids=["jax", "nnx"])
def test_the_custom_gradients_of_others(decorate):
    if decorate is nnx.custom_vjp:
        decorate = lambda f: nnx.custom_vjp(f, graph=False)  # noqa: E731
    good = with_backward(right, decorate=decorate)
    checks = ["autodiff", "finite_differences", "jit", "vmap", "scan", "remat", "dtypes"]
    assert not check_vjp(good, PARAMS, X, reference=square, checks=checks).failures
    wrong = with_backward(MISTAKES["doubled bias"][1], decorate=decorate)
    with pytest.raises(GradientError, match=r"params\.bias"):
        check_vjp(wrong, PARAMS, X, reference=square, checks=["autodiff"])


def test_a_custom_gradient_of_others_without_a_reference_is_pointed_out():
    report = check_vjp(with_backward(right, decorate=jax.custom_vjp), PARAMS, X, checks=QUICK)
    assert [row.check for row in report.rows if row.status == "skipped"] == ["reference"]
    assert "give reference= or formula=" in str(report)
    wrong = with_backward(MISTAKES["doubled bias"][1], decorate=jax.custom_vjp)
    with pytest.raises(GradientError, match=r"finite_differences, central, params\.bias"):
        check_vjp(wrong, PARAMS, X, checks=QUICK)


def test_a_function_is_no_excuse_for_itself():
    """Without a reference the function is compared with itself: that it fails is no skip."""
    broken = with_backward(lambda res, g: ({"kernel": g}, None), decorate=jax.custom_vjp)
    with pytest.raises(GradientError, match="jit, gradient: raised TypeError: Custom VJP bwd rule"):
        check_vjp(broken, PARAMS, X, checks=["jit"])
    bare = with_backward(right, decorate=jax.custom_vjp)
    with pytest.raises(GradientError, match="shard_map, check_vma=True: raised"):
        check_vjp(bare, PARAMS, X, checks=["shard_map"])


def test_a_broken_formula_or_reference_is_no_proof():
    step = with_backward(lambda res, g: (g,), fun=jnp.round)
    with pytest.raises(GradientError, match="autodiff, gradient: raised CotangentError"):
        check_vjp(step, X, formula=lambda x, g: (g[0],), checks=["autodiff"])


def test_what_jax_cannot_do_is_a_skip_and_no_failure():
    """nnx.vmap with the Module shared: its statistics would be one per example."""
    report = check_vjp(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), X, checks=["modes"])
    skipped = {row.case.split(",")[0] for row in report.rows if row.status == "skipped"}
    assert skipped == {"nnx.vmap"}


def test_a_surrogate_is_compared_with_its_formula():
    def step(x):
        return jnp.where(x > 0, 1.0, 0.0)

    def window(x, g):
        return (jnp.where(jnp.abs(x) <= 1, g, 0.0),)

    op = fcg.custom_vjp(surrogate=True)(step)
    op.defvjp(lambda x: (op(x), x), window)
    report = check_vjp(op, X, formula=window)
    assert "finite_differences" not in {row.check for row in report.rows}
    # JAX has no forward mode of what carries a backward of its own.
    skipped = {row.check for row in report.rows if row.status == "skipped"}
    assert skipped <= {"second_order", "forward_mode"}
    identity = with_backward(lambda res, g: (g,), fun=step)
    with pytest.raises(GradientError, match="autodiff, gradient, x"):
        check_vjp(identity, X, formula=window, checks=["autodiff"])


def test_a_wrong_value_is_caught():
    op = fcg.custom_vjp(square)
    op.defvjp(lambda p, x: (2 * square(p, x), (p, x)), right)
    with pytest.raises(GradientError, match="autodiff"):
        check_vjp(op, PARAMS, X, reference=lambda p, x: 2 * square(p, x), checks=["autodiff"])


def test_an_error_in_the_backward_is_a_failure_that_quotes_it():
    op = with_backward(lambda res, g: ({"kernel": g}, None))
    with pytest.raises(
        GradientError, match=r"jit, gradient: raised CotangentError: .* misses the parameter"
    ):
        check_vjp(op, PARAMS, X, checks=["jit"])
    report = check_vjp(op, PARAMS, X, checks=["jit"], raises=False)
    assert len(report.failures) == 1


def test_a_reference_that_fails_is_a_skip_that_says_so():
    def reference(params, x):
        raise ValueError("not here")

    report = check_vjp(with_backward(right), PARAMS, X, reference=reference, checks=["jit"])
    assert [row.status for row in report.rows] == ["skipped"] * 2
    assert "skipped: jit, gradient: the reference fails as well: not here" in str(report)


def test_statistics_counters_and_random_state_are_left_alone():
    class Noisy(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.ones(3))
            self.mean = nnx.BatchStat(jnp.ones(3))
            self.rngs = nnx.Rngs(0)

        def __call__(self, x):
            return x * self.scale + self.mean

    report = check_vjp(Noisy(), X, checks=["autodiff", "jit", "vmap", "scan", "remat"])
    assert {row.argument for row in report.rows if row.case != "value"} == {"scale", "x"}


def test_a_module_that_holds_a_bare_array_beside_its_parameters():
    class Shifted(nnx.Module):
        def __init__(self):
            self.a_shift = nnx.data(jnp.arange(3.0))
            self.scale = nnx.Param(jnp.ones(3))

        def __call__(self, x):
            return x * self.scale + self.a_shift

    report = check_vjp(Shifted(), X, checks=["modes"])
    assert {row.argument for row in report.rows} == {"scale"}


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"unknown checks \['jti'\]; there are autodiff,"):
        check_vjp(square, PARAMS, X, checks=["jti"])
    with pytest.raises(ValueError, match="a reference or a formula, not both"):
        check_vjp(square, PARAMS, X, reference=square, formula=lambda *a: ())


def test_the_table_shows_every_check_and_the_worst_argument():
    report = check_vjp(
        with_backward(MISTAKES["doubled bias"][1]),
        PARAMS,
        X,
        checks=[*QUICK, "residuals"],
        raises=False,
    )
    text = str(report)
    assert "gradient of square" in text
    assert "finite_differences" in text
    assert "params.bias" in text
    assert "failed" in text
    assert "autodiff" in text


def test_an_array_that_is_a_parameter_may_be_shared_by_a_batch():
    """A gradient of what all examples share is their sum, of bare arrays too."""

    def scaled(x, scale):
        return x * scale

    def of_scale(res, g):
        x, scale = res
        return g * scale, (x * g).sum(0)

    report = check_vjp(with_backward(of_scale, fun=scaled), X, X[0], checks=["vmap"])
    assert [row.case for row in report.rows] == [
        f"{case}" for case in ("parameters batched", "x shared", "scale shared") for _ in range(2)
    ]
    report = check_vjp(lambda params, x, y: square(params, x) * y, PARAMS, X, X, checks=["vmap"])
    assert {row.case for row in report.rows} == {
        *("parameters batched", "parameters shared", "x shared", "y shared")
    }


def test_a_batch_that_shares_an_array_finds_what_no_other_batch_does():
    """A rule for batches that forgets to sum over them, where the array has no axis for it."""

    @jax.custom_batching.custom_vmap
    def weigh(x, scale, g):
        return (x * g).sum(0)

    @weigh.def_vmap
    def of_batch(size, batched, x, scale, g):
        each = (x * g).sum(1)
        return (each if batched[1] else each[:1].repeat(size, 0)), True

    op = with_backward(lambda res, g: (g * res[1], weigh(*res, g)), fun=lambda x, scale: x * scale)
    report = check_vjp(op, X, X[0], checks=["autodiff", "vmap"], raises=False)
    assert {(row.case, row.argument) for row in report.failures} == {("scale shared", "scale")}


def test_a_value_that_is_not_finite_is_called_so():
    wrong = planted(kernel=lambda res, g, d: d.at[2, 1].set(jnp.nan).at[0, 0].set(jnp.inf))
    where = r"params\.kernel: is inf at \[0, 0\], expected "
    with pytest.raises(GradientError, match=where) as caught:
        check_vjp(with_backward(wrong), PARAMS, X, checks=["autodiff"])
    assert "is inf at [0, 0]" in str(caught.value.report)
    root = with_backward(lambda res, g: (g / jnp.sqrt(res[0]) / 2,), fun=jnp.sqrt)
    zero = X.at[3, 1].set(0.0) ** 2
    wrong = with_backward(lambda res, g: (g * res[0] / (2 * res[0] ** 1.5),), fun=jnp.sqrt)
    with pytest.raises(GradientError, match=r"x: is NaN at \[3, 1\], expected inf"):
        check_vjp(wrong, zero, checks=["autodiff"])
    assert not check_vjp(root, zero, checks=["autodiff"]).failures


def test_keeping_more_than_autodiff_is_a_warning():
    op = fcg.custom_vjp(lambda x: x + 1)
    op.defvjp(lambda x: (op(x), jnp.sin(x)), lambda res, g: (g,))
    report = check_vjp(op, X, checks=["residuals"])
    warning = "the backward keeps 96 B, more than autodiff, which keeps 0 B"
    assert report.warnings == [warning]
    assert f"warning: {warning}" in str(report)
    assert check_vjp(with_backward(right), PARAMS, X, checks=["residuals"]).warnings == []


def test_an_exception_in_a_backward_keeps_its_lines_and_its_notes():
    def backward(res, g):
        error = ValueError("no gradient today\nand not tomorrow")
        error.add_note("ask again later")
        raise error

    line = backward.__code__.co_firstlineno + 3
    with pytest.raises(GradientError) as caught:
        check_vjp(with_backward(backward), PARAMS, X, checks=["jit", "remat"])
    for text in (str(caught.value), str(caught.value.report)):
        text = " ".join(text.split())
        assert (
            f"raised ValueError: no gradient today (test_check_vjp.py:{line}, in backward)" in text
        )
        assert "and not tomorrow ask again later" in text
        assert text.count("raise error") == 1  # however many comparisons it failed
        assert "/jax/" not in text


@pytest.mark.parametrize("required", [False, True])
def test_forward_mode_is_checked_where_there_is_one(required, monkeypatch):
    monkeypatch.setattr(forward_mode, "REQUIRED", required)

    def status(fn, reference=None):
        report = check_vjp(
            fn, PARAMS, X, reference=reference, checks=["forward_mode"], raises=False
        )
        return {row.case: row.status for row in report.rows}

    cases = ("jvp", "vmap of jvp", "grad of jvp")
    assert status(square) == dict.fromkeys(cases, "ok")
    # jax.custom_vjp has none, and nobody can ask it for one.
    of_jax = with_backward(right, decorate=jax.custom_vjp)
    assert status(of_jax, square) == dict.fromkeys(cases, "skipped")

    wrong = jax.custom_jvp(square)
    wrong.defjvp(lambda p, t: (square(*p), 2 * jax.jvp(square, p, t)[1]))
    assert status(wrong, square) == dict.fromkeys(cases, "failed")


def test_forward_mode_of_a_surrogate_is_the_transpose_of_its_backward():
    @jax.custom_jvp
    def step(x):
        return jnp.round(x)

    step.defjvp(lambda p, t: (step(*p), t[0] * jnp.cos(p[0])))
    cosine = lambda x, g: (g * jnp.cos(x),)  # noqa: E731
    report = check_vjp(step, X, formula=cosine, checks=["forward_mode"])
    assert [(row.case, row.status) for row in report.rows] == [("jvp", "ok"), ("vmap of jvp", "ok")]
    with pytest.raises(GradientError, match="forward_mode, jvp, output: off by"):
        check_vjp(step, X, formula=lambda x, g: (g,), checks=["forward_mode"])
    clipped = lambda x, g: (jnp.clip(g, -1, 1) * jnp.cos(x),)  # noqa: E731
    report = check_vjp(step, X, formula=clipped, checks=["forward_mode"])
    assert {row.status for row in report.rows} == {"skipped"}


def test_the_comparisons_of_a_dtype_share_a_program():
    """One program for what runs on a device, one for shard_map, two meshes, one for each dtype."""
    lowered = []

    def count(event, seconds, **names):
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            lowered.append(names)

    layer = fcg.Linear(6, 4, rngs=nnx.Rngs(0))
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        report = check_vjp(layer, jnp.ones((8, 2, 6)))
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert len({(row.check, row.case) for row in report.rows}) > 30
    names = [name["fun_name"] for name in lowered]
    assert names.count("jit(program)") == 2 + 3
    assert names.count("jit(<lambda>)") == 2
    # What runs eagerly and what is put on a mesh takes small programs of its own.
    assert len(names) < 40
