"""FSQ and LFQ: quantizers whose codes are not stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import flax_customgrad as fcg
from flax_customgrad.catalogue import find
from flax_customgrad.estimators.codebook.code_entropy import code_entropy
from flax_customgrad.estimators.codebook.usage import Quantized


def random(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def pulled(layer, z, g, dloss=0.0):
    """The gradient of z, inside a compiled function."""

    def outputs(z):
        out = layer(z)
        return out.values, out.loss

    out, pull = jax.vjp(outputs, z)
    return pull((g, jnp.asarray(dloss, out[1].dtype)))[0]


def beside_the_formula(layer, z, g, dloss=0.0):
    def both(z, g):
        formula = find(type(layer).__name__).formula
        of_output = Quantized(g, None, dloss, None, None)
        return pulled(layer, z, g, dloss), formula(layer, z, of_output)[1]

    return jax.jit(both)(z, g)


ALL_LEVELS = (2, 3, 8, 500, 501, 1001, 4001)


def test_all_levels_are_reached_and_no_more_and_zero_is_one():
    with jax.enable_x64(True):
        z = np.concatenate([np.linspace(-9, 9, 20001), [-1e30, 1e30, 0.0]])[:, None]
        found = jax.jit(lambda z: [fcg.FSQ((levels,))(z) for levels in ALL_LEVELS])(z)
        for levels, out in zip(ALL_LEVELS, found, strict=True):
            numbers = np.unique(out.indices)
            assert (numbers.min(), numbers.max()) == (0, levels - 1)
            if levels < 1000:
                assert len(numbers) == levels
            expected = np.arange(levels) - levels // 2
            half = levels // 2
            np.testing.assert_allclose(np.unique(out.values), expected[numbers] / half, rtol=1e-12)
            assert out.values[-1] == 0


def test_fsq_forward_is_the_paper_s():
    levels = np.array([8, 5, 5, 4])
    with jax.enable_x64(True):
        z = np.random.default_rng(0).standard_normal((500, 4))
        h = (levels - 1) * 1.001 / 2
        offset = np.where(levels % 2, 0, 0.5)
        bounded = np.tanh(z + np.arctanh(offset / h)) * h - offset
        out = jax.jit(fcg.FSQ(levels.tolist()))(z)
        np.testing.assert_array_equal(out.values, np.round(bounded) / (levels // 2))


def test_fsq_gradient_is_its_formula():
    with jax.enable_x64(True):
        z, g = np.random.default_rng(0).standard_normal((2, 100, 4))
        found, expected = beside_the_formula(fcg.FSQ((8, 5, 5, 2)), z, g)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_fsq_far_out():
    layer = fcg.FSQ((5,))
    z = np.float32([[1e3], [-1e3], [6e4], [np.inf], [-np.inf]])
    dtypes = (jnp.float16, jnp.bfloat16, jnp.float32)

    @jax.jit
    def far_out(z, near):
        of_dtypes = [
            (layer(z.astype(d)).values, pulled(layer, z.astype(d), jnp.ones_like(z, d)))
            for d in dtypes
        ]
        return of_dtypes, pulled(layer, near, jnp.ones_like(near))

    of_dtypes, slope = far_out(z, np.full((1, 1), 10, np.float32))
    for dtype, (values, dz) in zip(dtypes, of_dtypes, strict=True):
        assert values.dtype == dtype
        np.testing.assert_array_equal(np.float32(values)[:, 0], [1, -1, 1, 1, -1])
        np.testing.assert_array_equal(np.float32(dz), np.zeros_like(z))
    # 1 - tanh^2 is rounding here in float32, and e^-20 is not.
    np.testing.assert_allclose(slope, 4 * np.exp(-20) * 2.002 / 2, rtol=1e-5)


def test_fsq_half_precision_counts_many_levels():
    z = random(64, 2, dtype=jnp.bfloat16)
    layer = fcg.FSQ((1000, 999))
    half, wide = jax.jit(lambda z: (layer(z).indices, layer(z.astype(jnp.float32)).indices))(z)
    np.testing.assert_array_equal(half, wide)


@pytest.mark.parametrize("layer", [fcg.FSQ((3, 4, 5)), fcg.LFQ(5, scale=0.5)])
def test_numbers_and_codes_are_one_to_one(layer):
    numbers = np.arange(layer.num_codes)

    @jax.jit
    def there_and_back(numbers):
        codes = layer.indices_to_codes(numbers)
        # Codes are not where FSQ's tanh leads; undo it.
        if isinstance(layer, fcg.FSQ):
            levels = np.array(layer.levels)
            h, offset = (levels - 1) * 1.001 / 2, np.where(levels % 2, 0, 0.5)
            z = jnp.arctanh((codes * (levels // 2) + offset) / h) - np.arctanh(offset / h)
        else:
            z = codes
        return codes, layer(z), layer.indices_to_codes(numbers.reshape(2, -1))

    codes, out, in_two_rows = there_and_back(numbers)
    assert len(np.unique(codes, axis=0)) == layer.num_codes
    np.testing.assert_array_equal(out.indices, numbers)
    np.testing.assert_array_equal(out.values, codes)
    np.testing.assert_allclose([out.usage, out.perplexity], [1, layer.num_codes], rtol=1e-5)
    np.testing.assert_array_equal(in_two_rows[1, -1], codes[-1])


@pytest.mark.smoke
def test_lfq_at_zero():
    out = jax.jit(fcg.LFQ(3, scale=2.0))(np.float32([[0.0, -0.0, -1e-30]]))
    np.testing.assert_array_equal(out.values, [[2, 2, -2]])
    assert out.indices[0] == 3


@pytest.mark.parametrize("layer", [fcg.FSQ((3, 4)), fcg.LFQ(2)])
def test_nan(layer):
    out = jax.jit(layer)(np.float32([[1.0, np.nan], [1.0, 1.0]]))
    assert np.isnan(out.values[0, 1])
    assert out.indices[0] == layer.num_codes
    assert out.indices[1] < layer.num_codes


@pytest.mark.parametrize("bits", [1, 5])
def test_lfq_gradient_is_its_formula(bits):
    with jax.enable_x64(True):
        layer = fcg.LFQ(bits, temperature=1.5, diversity=0.6, scale=0.7)
        z, g = np.random.default_rng(0).standard_normal((2, 6, 5, bits))
        found, expected = beside_the_formula(layer, z, g, 1.3)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


def brute_force_entropies(z, sharpness):
    z = np.asarray(z, np.float64).reshape(-1, z.shape[-1])
    words = np.arange(2 ** z.shape[1])[:, None] >> np.arange(z.shape[1]) & 1
    p = 1 / (1 + np.exp(-sharpness * z))
    each = np.prod(np.where(words, p[:, None], 1 - p[:, None]), -1)

    def entropy(p):
        return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)

    return entropy(each).mean(), entropy(each.mean(0))


def test_code_entropy_is_that_of_all_codes():
    with jax.enable_x64(True):
        zs = [np.random.default_rng(0).standard_normal((4, 3, bits)) for bits in (1, 7)]
        found = jax.jit(lambda zs: [code_entropy(z, 2.0) for z in zs])(zs)
        for z, entropies in zip(zs, found, strict=True):
            np.testing.assert_allclose(entropies, brute_force_entropies(z, 2.0), rtol=1e-12)


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_entropy_of_parts_is_that_of_all_vectors(check_vma):
    z, layer = random(16, 5), fcg.LFQ(5, temperature=2.0, axis_name="data")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))

    def loss(z):
        out = layer(z)
        return jax.lax.pmean(out.loss, "data"), out.usage

    spread = jax.shard_map(
        loss, mesh=mesh, in_specs=P("data"), out_specs=(P(), P()), check_vma=check_vma
    )
    (found, usage), dz = jax.jit(jax.value_and_grad(spread, has_aux=True))(z)
    whole = fcg.LFQ(5, temperature=2.0)
    expected, dexpected = jax.jit(jax.value_and_grad(lambda z: whole(z).loss))(z)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(dz, dexpected, rtol=1e-4, atol=1e-7)
    assert usage == whole(z).usage


def test_code_entropy_of_what_is_sure():
    z = 100 * np.sign(random(16, 6))

    @jax.jit
    def of_dtypes(z):
        found = []
        for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
            entropies, pull = jax.vjp(lambda z: code_entropy(z, 400.0), z.astype(dtype))
            found.append((*entropies, *pull((jnp.ones(()), jnp.ones(())))))
        return found

    expected = brute_force_entropies(np.sign(z), 50.0)[1]
    for each, together, dz in of_dtypes(z):
        assert each == 0
        np.testing.assert_allclose(together, expected, rtol=1e-5)
        np.testing.assert_array_equal(np.float32(dz), np.zeros_like(z))


def test_code_entropy_never_has_all_codes_of_all_vectors():
    def gradient(z):
        return jax.grad(lambda z: sum(code_entropy(z, 1.0)))(z)

    compiled = jax.jit(gradient).lower(jnp.zeros((512, 16))).compile()
    # 512 x 2^16 numbers are 134 MB.
    assert compiled.memory_analysis().temp_size_in_bytes < 8e6


def test_codes_that_are_too_many_are_not_counted():
    layer = fcg.FSQ((2**10, 2**10, 2**10))
    out, codes = jax.jit(lambda z: (out := layer(z), layer.indices_to_codes(out.indices)))(
        np.zeros((2, 3), np.float32)
    )
    assert out.perplexity is None
    assert out.usage is None
    np.testing.assert_array_equal(codes, out.values)
    many_bits = jax.jit(fcg.LFQ(30, entropy_weight=0))(np.ones((1, 30), np.float32))
    assert many_bits.indices == 2**30 - 1


@pytest.mark.parametrize("layer", [fcg.FSQ((3, 4)), fcg.LFQ(2)])
def test_no_vectors(layer):
    none = np.zeros((0, 2), np.float32)
    out, dz = jax.jit(lambda z: (layer(z), pulled(layer, z, z, 1.0)))(none)
    assert out.values.shape == dz.shape == (0, 2)
    assert out.loss == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fcg.FSQ(()), "levels=\\(\\) must be integers of at least 2"),
        (lambda: fcg.FSQ((3, 1)), "levels=\\(3, 1\\) must be"),
        (lambda: fcg.FSQ((3.0,)), "must be integers"),
        (lambda: fcg.FSQ((2**16, 2**15)), "int32 has numbers for less than"),
        (lambda: fcg.LFQ(0), "features=0 must be"),
        (lambda: fcg.LFQ(31), "make 2\\*\\*31 codes"),
        (lambda: fcg.LFQ(3, temperature=0), "temperature=0 must be positive"),
        (lambda: fcg.LFQ(3, scale=-1), "scale=-1 must be positive"),
        (lambda: fcg.LFQ(3, commitment=-1), "commitment=-1 must be"),
        (lambda: fcg.FSQ((3, 3))(jnp.zeros((2, 3))), "last axis must have 2"),
        (lambda: fcg.LFQ(3)(jnp.zeros((2, 2))), "last axis must have 3"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Padding, and numbers that no code has.


@pytest.mark.parametrize(
    "layer", [fcg.FSQ((5, 4, 3)), fcg.LFQ(3, temperature=1.0, diversity=0.7)], ids=["FSQ", "LFQ"]
)
def test_padding_counts_in_nothing(layer):
    z = 2 * np.random.default_rng(0).standard_normal((3, 5, 3)).astype(np.float32)
    g = np.random.default_rng(1).standard_normal(z.shape).astype(np.float32)
    mask = np.arange(5) < np.array([[5], [2], [3]])
    z[~mask] = np.nan

    @jax.jit
    def program(z, g, mask):
        def loss(z):
            out = layer(z, mask=mask)
            return jnp.sum(out.values * g) + out.loss, out

        return jax.grad(loss, has_aux=True)(z)

    (dz, out), (expected, whole) = program(z, g, mask), program(z[mask], g[mask], None)
    np.testing.assert_array_equal(out.indices[~mask], layer.num_codes)
    np.testing.assert_array_equal(out.values[~mask], 0)
    np.testing.assert_array_equal(dz[~mask], 0)
    np.testing.assert_allclose(dz[mask], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(out.loss, whole.loss, rtol=1e-5)
    np.testing.assert_allclose(out.usage, whole.usage)
    decoded = layer.indices_to_codes(out.indices)
    np.testing.assert_allclose(decoded[mask], out.values[mask], rtol=1e-6)
    assert np.isnan(decoded[~mask]).all()
    assert np.isnan(layer.indices_to_codes(np.array([-1]))).all()
    with pytest.raises(ValueError, match=r"mask has shape \(5,\)"):
        layer(z, mask=mask[0])


def test_entropy_under_a_mask_is_that_of_the_vectors_of_all_devices():
    z, mask = np.random.default_rng(0).standard_normal((8, 3, 4)), np.arange(24).reshape(8, 3) < 17
    mask = np.random.default_rng(1).permuted(mask)
    # The commitment is of each device.
    of_all = fcg.LFQ(4, temperature=1.0, commitment=0.0, axis_name="data")
    whole = fcg.LFQ(4, temperature=1.0, commitment=0.0)

    @jax.jit
    def losses(z, mask):
        return jax.vmap(lambda z, m: of_all(z, mask=m).loss, axis_name="data")(z, mask)

    np.testing.assert_allclose(losses(z, mask), jax.jit(whole)(z[mask]).loss, rtol=1e-5)
