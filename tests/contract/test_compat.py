"""What flax and JAX do not promise is there in the installed versions, and we reach it."""

import ast
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import flax_customgrad as fcg
from flax_customgrad.contract import compat
from flax_customgrad.contract.arguments import is_written

PACKAGE = Path(fcg.__file__).parent


def test_a_value_inside_a_transformation_is_traced():
    seen = []
    jax.jit(lambda x: seen.append(compat.is_traced(x)) or x)(1.0)
    assert seen == [True]
    assert not compat.is_traced(jnp.ones(()))


def test_the_axes_over_which_an_array_varies():
    seen = []
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def note(a, b):
        seen.append((compat.varying_axes(a), compat.varying_axes(jax.typeof(b))))
        return a

    spec = PartitionSpec("x")
    jax.shard_map(note, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)(
        jnp.ones(8), jnp.ones(8)
    )
    assert seen == [(frozenset({"x"}), frozenset())]


def test_the_line_that_an_equation_comes_from():
    (equation,) = jax.make_jaxpr(lambda x: jax.lax.sin(x))(1.0).eqns
    line = inspect.currentframe().f_lineno - 1
    assert compat.source_line(equation, ("jax",)) == f"test_compat.py:{line}"
    here = Path(__file__).parent.name
    assert not compat.source_line(equation, ("jax", here)).startswith("test_compat")


def test_a_variable_of_a_class_that_poses_as_one_is_written():
    variable, plain = nnx.Param(jnp.ones(2)), jnp.ones(2)
    with nnx.var_defaults(hijax=True):
        posing = nnx.Param(jnp.ones(2))
    assert type(posing) in compat.POSING_AS_VARIABLES
    seen = []
    jax.jit(lambda *args: seen.extend(map(is_written, args)))(posing, plain)
    assert seen == [True, False]
    assert [is_written(value) for value in (variable, posing, plain, nnx.Rngs(0), (plain,), 1)] == [
        *(True, True, False, True, False, False)
    ]


def test_a_reference_is_told_from_an_array():
    assert compat.is_reference(jax.typeof(jax.new_ref(jnp.ones(2))))
    assert not compat.is_reference(jax.typeof(jnp.ones(2)))


def test_traces_are_told_apart():
    seen = []
    jax.jit(lambda x: seen.append(compat.is_outside_of_traces()) or x)(1.0)
    assert seen == [False]
    assert compat.is_outside_of_traces()


def test_a_trace_depends_on_flags_and_on_the_mesh():
    contexts = {compat.trace_context()}
    assert contexts == {compat.trace_context()}
    with jax.enable_x64(True):
        contexts.add(compat.trace_context())
    with jax.set_mesh(jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))):
        assert compat.has_explicit_axes()
        contexts.add(compat.trace_context())
    assert not compat.has_explicit_axes()
    assert len(contexts) == 3


def test_vmap_says_along_which_axis_an_output_is_mapped():
    def rule(a, b):
        return a.sum(), b

    mapped = jax.vmap(rule, (1, None), compat.INFERRED_AXIS)
    (_, b), axes = mapped(jnp.ones((2, 3)), jnp.ones(4))
    assert axes == (0, None)
    assert b.shape == (4,)


def test_a_module_that_holds_something_twice_is_told():
    class Pair(nnx.Module):
        def __init__(self, a, b):
            self.a, self.b = a, b

    first, second = (nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(2))
    assert compat.has_shared_nodes(nnx.graphdef(Pair(first, first)))
    assert compat.has_shared_nodes(nnx.graphdef(Pair(first.kernel, first)))
    assert not compat.has_shared_nodes(nnx.graphdef(Pair(first, second)))


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit, jax.vmap], ids=["", "jit", "vmap"])
def test_what_the_innermost_derivative_differentiates(jit):
    seen = []

    def inner(x, outer):
        derivative = compat.innermost_derivative()
        seen.append([compat.is_of_derivative(a, derivative) for a in (x, outer, 1.0)])
        jit(lambda _: seen.append(compat.is_of_derivative(x, compat.innermost_derivative())))(
            jnp.ones(1)
        )
        return x

    jax.grad(lambda x: jax.grad(inner)(x, x))(1.0)
    assert seen == [[True, False, False], True]
    assert compat.innermost_derivative() is None
    assert not compat.is_of_derivative(jnp.ones(()), None)


def test_a_program_that_has_been_traced_is_told_from_one_under_way():
    held = []

    def f(x):
        held.append(x)
        assert not compat.is_of_finished_trace(x)
        jax.jit(lambda y: held.append(y))(x)
        assert compat.is_of_finished_trace(held[1])
        assert not compat.is_of_finished_trace(x)
        return x

    jax.jit(f)(1.0)
    assert compat.is_of_finished_trace(held[0])
    assert not compat.is_of_finished_trace(jnp.ones(()))


@pytest.mark.parametrize(
    "needs",
    [bool, int, range, np.asarray, lambda x: {0: 1}[x], lambda x: jnp.ones(3).reshape(x, -1)],
)
def test_a_value_that_is_needed_and_not_known(needs):
    with pytest.raises(TypeError) as caught:
        jax.jit(needs)(1)
    assert compat.is_concrete_value_error(caught.value)
    assert not compat.is_concrete_value_error(TypeError("unhashable type: 'list'"))


def test_a_layer_changes_its_class_and_nothing_else():
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    before = dict(vars(layer))
    compat.set_class(layer, fcg.Linear)
    assert type(layer) is fcg.Linear
    assert vars(layer) == before
    assert type(nnx.clone(layer)) is fcg.Linear


def caught(function, *args):
    with pytest.raises(Exception) as error:  # noqa: PT011 (which one it is, is what is tested)
        function(*args)
    return error.value


def test_the_refusal_of_forward_mode_is_known():
    f = jax.custom_vjp(jnp.sin)
    f.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g,))
    assert compat.is_forward_mode_error(caught(jax.jvp, f, (1.0,), (1.0,)))
    assert not compat.is_forward_mode_error(TypeError("another"))


def test_the_refusal_of_a_batched_write_is_known():
    ref = jax.new_ref(jnp.zeros(()))

    def write(x):
        ref[...] = x
        return x

    assert compat.is_unbatched_write_error(caught(jax.vmap(write), jnp.ones(2)))


def test_the_refusal_of_a_product_over_a_sharded_axis_is_known():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        a = jax.device_put(jnp.ones((8, 8)), PartitionSpec(None, "x"))
        assert compat.is_sharding_type_error(caught(jnp.matmul, a, a.T))


def test_the_first_part_of_a_representation_names_the_type():
    heading = next(iter(nnx.Module.__nnx_repr__(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))))
    assert heading.type is nnx.Linear
    assert repr(fcg.Linear(2, 3, rngs=nnx.Rngs(0))).startswith("flax_customgrad.Linear(")


@pytest.mark.smoke
def test_everything_here_is_used():
    """A function of this module that nobody calls is a gradient that nothing guards."""
    names = {name for name, f in inspect.getmembers(compat, inspect.isfunction)}
    names = {name for name in names if getattr(compat, name).__module__ == compat.__name__}
    used = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name):
                used.add(node.id)
            elif isinstance(node, ast.Attribute):
                used.add(node.attr)
    assert names <= used


def test_nobody_else_relies_on_private_names():
    private = {"manual_axis_type", "inner_aval", "_src", "get_opaque_trace_state"}
    found = {}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        attributes = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        imported = {
            part
            for n in ast.walk(tree)
            if isinstance(n, ast.ImportFrom) and n.module
            for part in n.module.split(".")
        }
        if path.name != "compat.py" and private & (attributes | imported):
            found[str(path)] = private & (attributes | imported)
    assert not found, "wrap these in flax_customgrad/contract/compat.py"
