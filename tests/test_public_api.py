"""What users see: the names, where these say they are from, their signatures, and the API page."""

import importlib
import inspect
import pkgutil
import re
import runpy
import types
import typing
import warnings
from pathlib import Path

import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad import catalogue, surrogate, testing
from flax_customgrad.model.tree import layers

ROOT = Path(__file__).parents[1]
PAGES = {path: path.read_text() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))}
MODULES = (fcg, surrogate, testing, catalogue)
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in module.__all__
    if not isinstance(getattr(module, name), types.ModuleType)
} | {"flax_customgrad.model.tree.layers": layers}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
ALIASES = {"flax_customgrad.swish": "silu", "flax_customgrad.hard_swish": "hard_silu"}


@pytest.mark.smoke
def test_dir_lists_the_api_and_nothing_else():
    for module in MODULES:
        assert len(set(module.__all__)) == len(module.__all__)
    assert dir(fcg) == sorted(fcg.__all__)


@pytest.mark.smoke
def test_a_public_name_says_where_users_import_it_from():
    for name, value in PUBLIC.items():
        module, _, short = name.rpartition(".")
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__module__ == module, name
            assert value.__qualname__ == ALIASES.get(name, short)
        if inspect.isclass(value):
            assert repr(value) == f"<class '{name}'>"


def test_no_name_hides_a_module():
    for info in pkgutil.walk_packages(fcg.__path__, "flax_customgrad."):
        if not info.name.endswith("__main__"):
            module = importlib.import_module(info.name)
            parent, _, short = info.name.rpartition(".")
            assert getattr(importlib.import_module(parent), short) is module, info.name


def test_a_converted_layer_prints_as_ours():
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    assert str(layer).startswith("Linear(")
    assert str(fcg.convert(layer)).startswith("flax_customgrad.Linear(")

    class Mine(fcg.Linear):
        pass

    assert str(Mine(2, 3, rngs=nnx.Rngs(0))).startswith("Mine(")


# Signatures


def test_constructors_are_written_out():
    """Documentation, type checkers and `inspect.signature` see every argument."""
    variadic = {
        name: [str(p) for p in inspect.signature(cls).parameters.values() if p.kind in (2, 4)]
        for name, cls in CLASSES.items()
        if issubclass(cls, nnx.Module)
    }
    variadic = {name: parameters for name, parameters in variadic.items() if parameters}
    # Any number of layers; and what nnx.LoRALinear too hands on to its Linear.
    assert sorted(variadic) == ["flax_customgrad.DirectFeedback", "flax_customgrad.LoRALinear"]


@pytest.mark.parametrize("entry", catalogue.entries(), ids=lambda entry: entry.name)
def test_a_drop_in_is_called_as_what_it_stands_in_for(entry):
    if not entry.is_drop_in:
        return
    theirs, ours = entry.reference, entry.module
    if not entry.is_function:
        theirs, ours = theirs.__init__, ours.__init__
    theirs, ours = (list(inspect.signature(f).parameters.values()) for f in (theirs, ours))
    assert [p.name for p in ours][: len(theirs)] == [p.name for p in theirs]
    for mine, other in zip(ours, theirs, strict=False):
        assert mine.kind == other.kind or other.kind == other.POSITIONAL_ONLY, mine.name
        assert mine.default == other.default, mine.name


@pytest.mark.parametrize(
    ("names", "arguments"),
    [
        ("LayerNorm RMSNorm GroupNorm InstanceNorm BatchNorm", "residual"),
        (
            "QuantLinear QuantLinearGeneral QuantEinsum QuantConv QuantConvTranspose",
            "weight activation gradient residuals",
        ),
        ("QuantEmbed", "weight"),
        ("BinaryLinear BinaryConv TernaryLinear TernaryConv BitLinear", "residuals"),
    ],
)
def test_arguments_of_our_own_are_in_the_signature(names, arguments):
    for name in names.split():
        assert set(arguments.split()) <= set(inspect.signature(getattr(fcg, name)).parameters), name


# The API pages


def _documented():
    """What the pages document: full name, whether with a signature, and which members.

    Layers have pages that are made from the catalogue.
    """
    documented_methods = runpy.run_path(str(ROOT / "docs/ext/methods.py"))["documented_methods"]
    directive = r"^\.\. auto(?:function|class|exception|data):: ([\w.]+)(\(\))?\n(?:   :(.+)\n)?"
    for page in PAGES.values():
        for name, no_signature, option in re.findall(directive, page, re.MULTILINE):
            members = option.removeprefix("members:") if option.startswith("members") else ""
            yield (
                name,
                not no_signature,
                [member for member in re.split(r"[,\s]+", members) if member],
            )
        # A union of types, whose docstring would be that of Python's unions.
        written = r"^\.\. py:data:: (\w+)\n   :module: ([\w.]+)\n"
        for name, module in re.findall(written, page, re.MULTILINE):
            yield f"{module}.{name}", False, []
    for entry in catalogue.entries():
        members = [] if entry.is_function else documented_methods(entry.module)
        yield f"flax_customgrad.{entry.name}", True, members


@pytest.mark.smoke
def test_every_public_name_is_documented_once():
    documented = [name for name, *_ in _documented()]
    assert sorted(documented) == sorted(PUBLIC)


def _types(annotation):
    """The types that an annotation is made of."""
    parts = annotation if isinstance(annotation, list) else typing.get_args(annotation)
    for part in parts:
        yield from _types(part)
    if inspect.isclass(annotation) and not parts:
        yield annotation


def _annotated(cls, has_signature, members):
    """What has the annotations that its page shows of a class."""
    yield "", cls
    for member in (*members, *(["__init__"] if has_signature else [])):
        value = inspect.getattr_static(cls, member)
        value = getattr(value, "__func__", getattr(value, "fget", value))
        if inspect.isfunction(value):
            yield f".{member}", value


def test_types_in_documented_annotations_are_public():
    public = set(map(id, PUBLIC.values()))
    hidden = set()
    for name, has_signature, members in _documented():
        value = PUBLIC[name]
        for member, annotated in (
            _annotated(value, has_signature, members)
            if inspect.isclass(value)
            else [("", value)] * inspect.isfunction(value)
        ):
            for argument, annotation in inspect.get_annotations(annotated, eval_str=True).items():
                hidden |= {
                    f"{name}{member}, {argument}: {kind.__module__}.{kind.__qualname__}"
                    for kind in _types(annotation)
                    if kind.__module__.startswith("flax_customgrad") and id(kind) not in public
                }
    assert not hidden, "export these types and document them below docs/"


# Import paths


# What the documentation has shown by another path than that of today.
MOVED = {
    "flax_customgrad.codebook.nearest.nearest": "flax_customgrad.nearest_code",
    "flax_customgrad.codebook.usage.Quantized": "flax_customgrad.Quantized",
    "flax_customgrad.codebook.usage.perplexity": "flax_customgrad.codebook_perplexity",
    "flax_customgrad.codebook.vector_quantizer.Codebook": "flax_customgrad.Codebook",
    "flax_customgrad.linear.linear.Linear": "flax_customgrad.Linear",
    "flax_customgrad.model.convert.Where": "flax_customgrad.Where",
}

# Every other path that README, CHANGELOG and documentation have shown, below `flax_customgrad`.
SHOWN = """
AbsMean ApproxSign BackwardState BackwardStateError BatchNorm BinaryActivation BinaryConv
BinaryLinear BinaryWeight BitLinear Conv ConvTranspose CotangentError CustomVJP DelayedScaling
DirectFeedback DoReFaActivation DoReFaGradient DoReFaWeight EWGS Einsum Embed FSQ FakeQuant Feedback
FeedbackConv FeedbackLinear Fp8Einsum Fp8Linear Frozen GeGLU GradientClip GradientQuant
GradientReversal GradientScale GroupNorm GumbelSoftmax InstanceNorm Int4Linear Int8Conv Int8Kernel
Int8Linear LFQ LIF LSQ LSQPlus LayerNorm Leaky Linear LinearGeneral LoRA LoRALinear MXLinear
MagnitudeAwareSign NF4Linear NMSparseLinear NVFP4Linear PACT PReLU Packed PackedKernel QLoRALinear
QuantConv QuantConvTranspose QuantEinsum QuantEmbed QuantLinear QuantLinearGeneral QuantStat
Quantizer RMSNorm ReGLU ReinMax Residual ResidualVQ Rule SimVQ Size SizeReport SpectralNorm
SteHeaviside SteSign SteTern StochasticRound StopGradient SwiGLU SwishSign TQT TTQ TWN TernaryConv
TernaryLinear TopKST VectorQuantizer WeightNorm WeightStandardization XNORSign __version__ avg_pool
backward_state begin_step calibrate catalogue catalogue.Curve catalogue.Entry catalogue.Example
catalogue.drop_ins catalogue.entries catalogue.find ceil_ste celu clip_ste convert custom_vjp elu
floor_ste geglu gelu glu gradient_clip gradient_reversal gradient_scale gumbel_softmax hard_sigmoid
hard_silu hard_swish hard_tanh leaky_relu load_backward_state log_sigmoid log_softmax logsumexp
max_pool min_pool mish model.convert model.convert.layers n_m_sparsify pack pool reglu reinmax relu
relu6 reset_backward_state residual_bytes residuals revert rotation_trick round_ste selu sigmoid
silu size_report soft_sign softmax softplus squareplus standardize stochastic_round stop_gradient
straight_through_estimator surrogate surrogate.atan surrogate.boxcar surrogate.fast_sigmoid
surrogate.piecewise_exponential surrogate.sigmoid surrogate.triangular swiglu swish tanh testing
testing.CHECKS testing.GradientError testing.Report testing.Row testing.check_vjp top_k_st trunc_ste
unpack use_autodiff use_lowering
"""


def _resolve(path):
    """The object at a dotted path, found by importing and by attributes."""
    parts = path.split(".")
    found = importlib.import_module(parts[0])
    for k, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:k]))
        found = getattr(found, part)
    return found


@pytest.mark.smoke
def test_every_path_that_was_shown_leads_somewhere():
    """What fails here breaks the programs of users: let the old path warn, in registry/moved.py."""
    for name in SHOWN.split():
        _resolve(f"flax_customgrad.{name}")
    for text in PAGES.values():
        shown = r"(?<!github\.com/)\b(?:fcg|flax_customgrad)((?:\.[A-Za-z_]\w*)+)(?![\w/])"
        for name in re.findall(shown, text):
            _resolve(f"flax_customgrad{name}")


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_a_path_that_has_moved_warns_with_the_new_one(old, new):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = _resolve(old)
    assert found is _resolve(new)
    if old != "flax_customgrad.model.convert.Where":  # It is where it was.
        assert f"{old} is {new} now" in {str(warning.message) for warning in caught}
        assert {warning.filename for warning in caught} == {__file__}


def test_a_module_that_has_moved_has_no_other_names():
    import flax_customgrad.codebook.usage as usage

    with pytest.raises(AttributeError, match=r"flax_customgrad.codebook.usage' has no attribute"):
        usage.entropy  # noqa: B018
