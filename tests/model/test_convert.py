"""convert and revert: what changes, what stays, and what is said when nothing matched."""

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad import catalogue


class Model(nnx.Module):
    """Layers in every container, shared, inside layers of nnx, and of other types."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.again = self.first
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs), self.first])
        self.named = nnx.Dict({"a": nnx.Linear(4, 4, rngs=rngs)})
        self.plain = nnx.data([nnx.Linear(4, 4, rngs=rngs)])
        self.attention = nnx.MultiHeadAttention(2, 4, 4, decode=False, rngs=rngs)
        self.lora = nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.own = OwnLinear(4, 4, rngs=rngs)

    def __call__(self, x):
        layers = [self.first, self.again, *self.blocks, self.named["a"], self.plain[0]]
        for layer in [*layers, self.lora, self.norm, self.own]:
            x = nnx.relu(layer(x)) + x
        return self.attention(x)


class OwnLinear(nnx.Linear):
    """A user's subclass is another type."""


@pytest.fixture
def model():
    return Model(nnx.Rngs(0))


# Small: what grows through the layers are scores, whose rounding is that of the gradient.
X = 0.1 * jax.random.normal(jax.random.key(0), (2, 3, 4))


@nnx.jit
def loss(model):
    return jnp.sum(model(X) ** 2)


loss_and_grad = nnx.jit(nnx.value_and_grad(loss))


def linears(model):
    return [model.first, *model.blocks, model.named["a"], model.plain[0]]


def test_every_layer_that_has_a_drop_in_becomes_it_in_place(model):
    before, first = nnx.state(model), model.first
    expected, expected_grads = loss_and_grad(model)
    assert fcg.convert(model) is model
    assert model.first is first
    assert {type(layer) for layer in linears(model)} == {fcg.Linear}
    assert type(model.lora) is fcg.LoRALinear
    assert type(model.lora.lora) is fcg.LoRA
    assert type(model.attention.query) is fcg.LinearGeneral
    assert type(model.own) is OwnLinear
    assert type(model.norm) in (nnx.LayerNorm, *catalogue.drop_ins().values())
    after = nnx.state(model)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert all(a is b for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    got, grads = loss_and_grad(model)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.smoke
def test_shared_layers_stay_shared(model):
    fcg.convert(model)
    assert model.first is model.again is model.blocks[1]
    fcg.convert(model, rules={fcg.Linear: Wrapped})
    assert type(model.first) is Wrapped
    assert model.first is model.again is model.blocks[1]


def test_an_optimizer_made_before_goes_on(model):
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    update = nnx.jit(lambda optimizer, model, grads: optimizer.update(model, grads))
    update(optimizer, model, loss_and_grad(model)[1])
    fcg.convert(model)
    before, grads = loss_and_grad(model)
    for _ in range(3):
        update(optimizer, model, grads)
        after, grads = loss_and_grad(model)
    assert after < before


def test_a_second_conversion_changes_nothing_and_revert_undoes_it(model):
    graphdef = nnx.graphdef(model)
    converted = nnx.graphdef(fcg.convert(model))
    assert converted != graphdef
    assert nnx.graphdef(fcg.convert(model)) == converted
    assert fcg.revert(model) is model
    assert nnx.graphdef(model) == graphdef


def test_a_layer_alone_a_list_of_models_and_none_to_convert():
    layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    assert type(fcg.convert(layer)) is fcg.Linear
    layers = [nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 2, rngs=nnx.Rngs(0))]
    assert {type(layer) for layer in fcg.convert(layers)} == {fcg.Linear}
    own = OwnLinear(2, 2, rngs=nnx.Rngs(0))
    with pytest.warns(UserWarning, match="convert changed nothing"):
        assert type(fcg.convert(own)) is OwnLinear
    with pytest.raises(TypeError, match="expected a Module or a tree of Modules, got int"):
        fcg.convert(3)


@pytest.mark.parametrize("graph", [True, False])
def test_both_modes_of_nnx(graph):
    with nnx.set_graph_mode(graph):
        model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.relu)
        assert type(fcg.convert(model).layers[0]) is fcg.Linear
        assert type(fcg.revert(model).layers[0]) is nnx.Linear


# where


def test_where_narrows_by_path_or_predicate(model):
    fcg.convert(model, where=r"blocks/\d+|named/.*")
    # The second block is the first layer, which is found under each of its paths.
    assert [type(layer) for layer in linears(model)] == [
        fcg.Linear,
        fcg.Linear,
        fcg.Linear,
        fcg.Linear,
        nnx.Linear,
    ]
    fcg.convert(model, where=lambda path, layer: path.startswith("plain") and layer.use_bias)
    assert type(model.plain[0]) is fcg.Linear
    fcg.revert(model, where="again")
    assert [type(layer) for layer in linears(model)] == [
        nnx.Linear,
        fcg.Linear,
        nnx.Linear,
        fcg.Linear,
        fcg.Linear,
    ]


def test_where_that_matches_nothing_names_itself_and_the_paths(model):
    with pytest.raises(ValueError, match=r"where='block' matched no layer.*blocks/0: flax.Linear"):
        fcg.convert(model, where="block")

    def never(path, layer):
        return False

    with pytest.raises(ValueError, match="where=never matched no layer"):
        fcg.revert(model, where=never)


# rules


class Wrapped(nnx.Module):
    """A layer that holds another."""

    def __init__(self, layer):
        self.layer = layer

    @classmethod
    def from_layer(cls, layer):
        return cls(layer)

    def __call__(self, x):
        return self.layer(x)


def test_a_rule_builds_a_new_layer(model):
    expected = loss(model)
    old = model.first
    fcg.convert(model, rules={nnx.Linear: Wrapped})
    assert {type(layer) for layer in linears(model)} == {Wrapped}
    assert model.first.layer is old
    assert type(model.lora) is nnx.LoRALinear
    np.testing.assert_allclose(loss(model), expected, rtol=1e-6)


def test_the_first_rule_that_matches_wins(model):
    rules = [
        fcg.Rule(nnx.Linear, Wrapped, where="blocks/0"),
        fcg.Rule(nnx.Linear, lambda layer: Wrapped(Wrapped(layer)), where="plain/.*"),
        fcg.Rule(nnx.Linear, fcg.Linear),
    ]
    fcg.convert(model, rules=rules)
    assert [type(layer) for layer in linears(model)] == [
        fcg.Linear,
        Wrapped,
        fcg.Linear,
        fcg.Linear,
        Wrapped,
    ]
    assert type(model.plain[0].layer) is Wrapped


def test_a_rule_for_the_model_itself_returns_a_new_object():
    layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    assert type(fcg.convert(layer, rules={nnx.Linear: Wrapped})) is Wrapped


def test_a_rule_that_matched_nothing_names_itself(model):
    with pytest.raises(ValueError, match=r"the rule flax.Conv -> \w+.Wrapped matched no layer"):
        fcg.convert(model, rules={nnx.Linear: fcg.Linear, nnx.Conv: Wrapped})
    shadowed = [fcg.Rule(nnx.LayerNorm, Wrapped), fcg.Rule(nnx.LayerNorm, Wrapped, where="norm")]
    with pytest.raises(ValueError, match=r"flax.LayerNorm -> \w+.Wrapped where 'norm' matched"):
        fcg.convert(Model(nnx.Rngs(0)), rules=shadowed)


def test_an_error_leaves_the_model_as_it_was(model):
    graphdef = nnx.graphdef(model)
    with pytest.raises(ValueError, match=r"flax.Conv -> flax.Conv matched no layer"):
        fcg.convert(model, rules={nnx.Linear: fcg.Linear, nnx.Conv: nnx.Conv})
    assert nnx.graphdef(model) == graphdef


def test_where_that_matches_only_layers_without_a_drop_in():
    model = nnx.Sequential(OwnLinear(2, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="matched no layer that there is a rule for"):
        fcg.convert(model, where="layers/0")
    for _ in range(2):  # what is converted already is no mistake
        fcg.convert(model, where="layers/1")


def test_a_rule_whose_target_cannot_take_the_layer(model):
    with pytest.raises(TypeError, match="Conv has no `from_layer` and is no subclass of Linear"):
        fcg.convert(model, rules={nnx.Linear: nnx.Conv})
    with pytest.raises(TypeError, match="returned None for a layer; return the new layer"):
        fcg.convert(model, rules={nnx.Linear: lambda layer: None})
    with pytest.raises(TypeError, match="expected a class or a function, got 3"):
        fcg.convert(model, rules={nnx.Linear: 3})


def test_a_layer_in_a_tuple_cannot_be_replaced_but_converted():
    class Held(nnx.Module):
        def __init__(self):
            self.pair = nnx.data((nnx.Linear(2, 2, rngs=nnx.Rngs(0)),))

    assert type(fcg.convert(Held()).pair[0]) is fcg.Linear
    with pytest.raises(TypeError, match=r"held in a tuple.*hold it in an nnx.List"):
        fcg.convert(Held(), rules={nnx.Linear: Wrapped})


# Layers that need more than a class.


@pytest.mark.parametrize(
    ("make", "cls", "arguments"),
    [
        (nnx.Linear, fcg.NMSparseLinear, {}),
        (nnx.Linear, fcg.FeedbackLinear, {"rngs": nnx.Rngs(0)}),
        (nnx.Linear, fcg.LoRALinear, {"lora_rank": 2, "rngs": nnx.Rngs(0)}),
        (fcg.NF4Linear, fcg.QLoRALinear, {"lora_rank": 2, "rngs": nnx.Rngs(0)}),
        (fcg.Int4Linear, fcg.QLoRALinear, {"lora_rank": 2, "rngs": nnx.Rngs(0)}),
        (
            lambda *sizes, rngs: nnx.Conv(*sizes, 3, rngs=rngs),
            fcg.FeedbackConv,
            {"rngs": nnx.Rngs(0)},
        ),
    ],
    ids=lambda a: getattr(a, "__name__", None),
)
def test_a_trained_layer_becomes_one_with_more_state(make, cls, arguments):
    layer, x = make(8, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 5, 8))
    before, kernel = layer(x), getattr(layer, "kernel", None)
    kind = type(layer)
    if arguments:
        with pytest.raises(TypeError, match=rf"{cls.__name__}.from_layer\(layer, .*rngs=...\)"):
            fcg.convert(layer, rules={kind: cls})
    new = fcg.convert(layer, rules={kind: lambda layer: cls.from_layer(layer, **arguments)})
    assert type(new) is cls
    if isinstance(new, nnx.Linear | nnx.Conv):
        assert new is layer
        assert new.kernel is kernel
    if cls is fcg.NMSparseLinear:
        before = x @ new.sparse_kernel + new.bias[...]
    np.testing.assert_allclose(new(x), before, rtol=1e-6, atol=1e-6)
    gradients = nnx.grad(lambda layer: (layer(x) ** 2).sum())(new)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


class Ranked(nnx.Linear):
    """A user's layer that holds more than nnx.Linear."""

    def __init__(self, *sizes, rank, rngs):
        super().__init__(*sizes, rngs=rngs)
        self.rank = rank


def test_a_class_that_is_made_with_more_is_refused():
    with pytest.raises(TypeError, match="Ranked is made with rank, which a Linear does not have"):
        fcg.convert(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), rules={nnx.Linear: Ranked})


# What was not done is said.


def test_a_rule_for_a_layer_of_nnx_takes_its_drop_in():
    layer = fcg.convert(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    assert type(fcg.convert(layer, rules={nnx.Linear: Wrapped})) is Wrapped
    both = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0)), fcg.Linear(2, 2, rngs=nnx.Rngs(0))])
    fcg.convert(both, rules={nnx.Linear: fcg.Linear, fcg.Linear: Wrapped})
    assert [type(layer) for layer in both] == [fcg.Linear, Wrapped]


def test_rules_without_a_quantizer_are_refused():
    with pytest.raises(TypeError, match=r"nothing to quantize with: write .*weight=.*FakeQuant"):
        fcg.convert(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), rules={nnx.Linear: fcg.QuantLinear})


class Narrow(nnx.GroupNorm):
    """A public model's layer: other arguments, the same computation."""

    def __init__(self, features, rngs):
        super().__init__(features, num_groups=2, rngs=rngs)


class Cast(Narrow):
    """Another one, which computes something else."""

    def __call__(self, x):
        return super().__call__(x) * 2


def test_subclasses_are_converted_if_asked_for_and_else_named():
    def model(*kinds):
        return nnx.List([kind(4, rngs=nnx.Rngs(0)) for kind in kinds])

    with pytest.warns(UserWarning, match=r"changed nothing: .*0: \w+.Narrow\. Write subclasses=Tr"):
        fcg.convert(model(Narrow))
    assert type(fcg.convert(model(Narrow), subclasses=True)[0]) is fcg.GroupNorm
    with pytest.warns(UserWarning, match=r"methods of their own, .* and stay: 1: \w+.Cast"):
        found = fcg.convert(model(Narrow, Cast), subclasses=True)
    assert [type(layer) for layer in found] == [fcg.GroupNorm, Cast]
    assert type(fcg.convert(model(Narrow), rules={Narrow: fcg.GroupNorm})[0]) is fcg.GroupNorm
    with pytest.raises(TypeError, match="Cast has __call__ of its own, which GroupNorm would not"):
        fcg.convert(model(Cast), rules={Cast: fcg.GroupNorm})


def test_revert_names_the_layers_that_stay():
    model = nnx.List([fcg.Linear(2, 2, rngs=nnx.Rngs(0)), fcg.Int8Linear(2, 2, rngs=nnx.Rngs(0))])
    with pytest.warns(UserWarning, match=r"and stay: 1: flax_customgrad.Int8Linear"):
        fcg.revert(model)
    assert [type(layer) for layer in model] == [nnx.Linear, fcg.Int8Linear]


# Functions that layers hold


class Pair(NamedTuple):
    first: Any
    second: Any


class Config:
    """An object that is neither a Module nor a dataclass."""

    def __init__(self):
        self.act = nnx.gelu


@dataclass(frozen=True)
class Inner:
    head: tuple = (nnx.softmax, "name")


@dataclass(frozen=True)
class Settings:
    width: int = 8
    act: Any = nnx.gelu
    init: Any = nnx.initializers.zeros
    inner: Inner = field(default_factory=Inner)


class Cell(nnx.LSTMCell):
    """A subclass of a layer of nnx, whose arguments are functions, with one more."""

    def __init__(self, *, rngs):
        super().__init__(4, 4, rngs=rngs)
        self.act = nnx.relu


class Holder(nnx.Module):
    """Functions in every place that can hold one."""

    by_class = staticmethod(nnx.gelu)

    def __init__(self, rngs):
        self.act = nnx.gelu
        self.same_as_in_numpy = jnp.tanh
        self.partial = functools.partial(nnx.leaky_relu, negative_slope=0.1)
        self.tuple = (nnx.relu, 3, (jax.nn.softmax, "name"))
        self.named = Pair(nnx.silu, None)
        self.list = [nnx.relu, {"act": nnx.elu}]
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.selu])
        self.by_name = nnx.Dict(act=nnx.celu)
        self.mixed = nnx.data((nnx.Linear(4, 4, rngs=rngs), nnx.glu))
        self.own = jnp.sin
        self.config = Config()
        self.settings = Settings()
        self.attention = nnx.MultiHeadAttention(2, 4, 4, decode=False, rngs=rngs)
        self.cell = Cell(rngs=rngs)
        self.lstm = nnx.LSTMCell(4, 4, rngs=rngs)
        self.lstm.act = nnx.relu
        self.kind = nnx.Linear


def held(model):
    """What Holder holds, by where."""
    return {
        "act": model.act,
        "same_as_in_numpy": model.same_as_in_numpy,
        "partial": model.partial.func,
        "tuple/0": model.tuple[0],
        "tuple/2/0": model.tuple[2][0],
        "named/0": model.named.first,
        "list/0": model.list[0],
        "list/1/act": model.list[1]["act"],
        "layers/1": model.layers[1],
        "by_name/act": model.by_name["act"],
        "mixed/1": model.mixed[1],
        "settings/act": model.settings.act,
        "settings/inner/head/0": model.settings.inner.head[0],
        "cell/act": model.cell.act,
    }


def test_functions_that_layers_hold_are_converted_and_reverted():
    model = Holder(nnx.Rngs(0))
    before, settings = held(model), model.settings
    linear, attention, gate = model.mixed[0], model.attention.attention_fn, model.cell.gate_fn
    fcg.convert(model)
    ours = catalogue.drop_in_functions()
    assert held(model) == {path: ours[function] for path, function in before.items()}
    assert held(model)["act"] is fcg.gelu
    assert model.partial.keywords == {"negative_slope": 0.1}
    assert (model.tuple[1], model.tuple[2][1], type(model.named)) == (3, "name", Pair)
    assert (settings, model.settings.width) == (Settings(), 8)
    # What belongs to a layer of nnx, to an object that is no Module, or to a class is left.
    # That layer holds the same function, and reads it as ours.
    assert vars(model.attention)["attention_fn"] is attention
    assert model.attention.attention_fn is fcg.dot_product_attention
    assert (model.cell.gate_fn, model.cell.activation_fn) == (gate, nnx.tanh)
    assert (model.lstm.gate_fn, model.lstm.activation_fn) == (gate, nnx.tanh)
    assert model.lstm.act is nnx.relu
    assert (model.config.act, model.own, model.kind) == (nnx.gelu, jnp.sin, nnx.Linear)
    assert model.by_class is nnx.gelu
    assert model.mixed[0] is linear
    assert type(linear) is fcg.Linear
    assert jax.tree.leaves(nnx.state(model))  # a tuple of layers is data as before
    assert fcg.convert(model) is model
    fcg.revert(model)
    assert all(a is b for a, b in zip(held(model).values(), before.values(), strict=True))
    assert type(model.mixed[0]) is nnx.Linear
    assert model.settings == settings


def test_a_config_keeps_its_other_functions_out_of_the_report():
    rows = {row.paths[0]: row for row in fcg.conversion(Holder(nnx.Rngs(0))).rows}
    assert "settings/act" in rows
    assert "settings/init" not in rows


@pytest.mark.parametrize("graph", [True, False])
def test_a_model_with_converted_functions_is_traced_anew(graph):
    with nnx.set_graph_mode(graph):
        model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.gelu)
        step = nnx.jit(nnx.grad(lambda model: model(X).sum()))
        graphdef, expected = nnx.graphdef(model), step(model)
        fcg.convert(model)
        assert nnx.graphdef(model) != graphdef
        for a, b in zip(jax.tree.leaves(step(model)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert nnx.graphdef(fcg.revert(model)) == graphdef


def test_where_selects_a_function_by_its_path_and_the_module_that_holds_it():
    model = Holder(nnx.Rngs(0))
    fcg.convert(model, where="(tuple|list)/.*")
    changed = {p for p, f in held(model).items() if f.__module__ == "flax_customgrad"}
    assert changed == {"tuple/0", "tuple/2/0", "list/0", "list/1/act"}
    assert type(model.layers[0]) is nnx.Linear
    fcg.convert(model, where=lambda path, module: path == "by_name/act" and "act" in module)
    assert model.by_name["act"] is fcg.celu
    fcg.revert(model, where="list/0")
    assert (model.list[0], model.tuple[0]) == (nnx.relu, fcg.relu)
    with pytest.raises(ValueError, match=r"where='config/act' matched no layer"):
        fcg.convert(model, where="config/act")


def test_a_rule_for_a_function():
    def clipped(x):
        return jnp.clip(x, 0, 1)

    model = Holder(nnx.Rngs(0))
    fcg.convert(model, rules=[fcg.Rule(nnx.relu, clipped, where="list/.*")])
    assert (model.list[0], model.tuple[0], model.act) == (clipped, nnx.relu, nnx.gelu)
    fcg.convert(model)
    fcg.convert(model, rules={nnx.relu: clipped})  # a rule for its drop-in too
    assert model.tuple[0] is clipped
    with pytest.raises(ValueError, match=r"the rule jax.relu6 -> .*clipped matched no layer"):
        fcg.convert(model, rules={nnx.relu6: clipped})
    with pytest.raises(TypeError, match="expected a function, got 3"):
        fcg.convert(model, rules={nnx.gelu: 3})


def test_a_keyword_that_nnx_does_not_know_goes_with_our_function():
    model = nnx.Sequential(functools.partial(fcg.relu, residual="bits"))
    fcg.revert(model)
    assert model.layers[0].func is nnx.relu
    assert model.layers[0](jnp.ones(2)).sum() == 2


def test_functions_in_a_list_of_models_and_in_shared_blocks():
    block = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.relu)
    models = [nnx.List([block, block]), nnx.gelu]
    fcg.convert(models)
    assert (block.layers[1], models[1]) == (fcg.relu, fcg.gelu)


# Inside of transformations


def _convert_and_call(model, x):
    return fcg.convert(model)(x).sum()


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize(
    "transform", [nnx.jit, nnx.grad, nnx.remat, lambda f: nnx.vmap(f, in_axes=(None, 0))]
)
def test_convert_inside_of_a_transformation_is_an_error(transform, graph):
    with nnx.set_graph_mode(graph):
        model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.relu)
        with pytest.raises(ValueError, match="inside of a transformation"):
            transform(_convert_and_call)(model, X)
        with pytest.raises(ValueError, match="inside of a transformation"):
            nnx.jit(lambda x: _convert_and_call(model, x))(X)
        assert type(model.layers[0]) is nnx.Linear


@pytest.mark.parametrize("graph", [True, False])
def test_a_model_that_is_made_merged_or_cloned_inside_is_converted(graph):
    def make(key):
        return nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(key)), nnx.relu)

    with nnx.set_graph_mode(graph):
        model = nnx.jit(lambda key: fcg.convert(make(key)))(jax.random.key(0))
        assert (type(model.layers[0]), model.layers[1]) == (fcg.Linear, fcg.relu)
        stack = nnx.vmap(lambda key: fcg.convert(make(key)))(jax.random.split(jax.random.key(0)))
        assert type(stack.layers[0]) is fcg.Linear
        graphdef, state = nnx.split(make(jax.random.key(0)))
        merged = jax.jit(lambda state: _convert_and_call(nnx.merge(graphdef, state), X))(state)
        cloned = nnx.jit(lambda model: _convert_and_call(nnx.clone(model), X))(model)
        np.testing.assert_allclose(merged, cloned, rtol=1e-6)


# Optimizers


def test_an_optimizer_whose_parameters_change_is_named():
    def quantized(layer):
        return fcg.QuantLinear.from_layer(layer, weight=fcg.LSQ(4))

    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    fcg.convert([model, optimizer])  # The parameters stay.
    with pytest.warns(UserWarning, match=r"Optimizer was made for: .*weight/scale.*Make it anew"):
        fcg.convert((model, optimizer), rules={nnx.Linear: quantized})
