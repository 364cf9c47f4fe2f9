"""`quant` bit for bit against numpy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_nixlep import quant

FORMATS = [("float32", False), ("float32", True), ("ue8m0", True)]


def bits(a):
    return np.asarray(a).view(f"u{np.asarray(a).dtype.itemsize}")


def values(seed, shape, dtype):
    rng = np.random.default_rng(seed)
    spread = np.exp2(rng.integers(-14, 14, (*shape[:-1], 1)))
    return (rng.standard_normal(shape) * spread).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize(("scale_format", "round_scale"), FORMATS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.sampled_from([0, 1, 17]), blocks=st.sampled_from([1, 3]))
def test_same_bits_as_numpy(dtype, scale_format, round_scale, seed, rows, blocks):
    x = values(seed, (rows, blocks * 128), dtype)
    q, scales = jax.jit(quant.quantize, static_argnames=("scale_format", "round_scale"))(
        x, scale_format=scale_format, round_scale=round_scale
    )
    want_q, want_scales = oracle.quantize(x, scale_format, round_scale)
    assert (q.dtype, scales.dtype) == (want_q.dtype, want_scales.dtype)
    np.testing.assert_array_equal(bits(q), bits(want_q))
    np.testing.assert_array_equal(bits(scales), bits(want_scales))
    back = jax.jit(quant.dequantize, static_argnums=2)(q, scales, dtype)
    want = want_q.astype(np.float32) * np.repeat(want_scales.astype(np.float32), 128, axis=1)
    np.testing.assert_array_equal(bits(back), bits(want.astype(dtype)))


@pytest.mark.parametrize(("scale_format", "round_scale"), FORMATS)
def test_error_is_at_most_half_a_step(scale_format, round_scale):
    x = values(0, (64, 256), np.float32)
    q, scales = quant.quantize(x, scale_format=scale_format, round_scale=round_scale)
    back = np.asarray(quant.dequantize(q, scales, jnp.float32))
    step = np.repeat(np.asarray(scales, np.float32), 128, axis=1)
    assert (np.abs(back - x) <= np.maximum(np.abs(x) / 16, step * 2.0**-10) * 1.0001).all()


def test_round_scale_is_exact_at_powers_of_two():
    amax = np.float32(448) * np.exp2(np.arange(-20, 21)).astype(np.float32)
    amax = np.stack([np.nextafter(amax, 0), amax, np.nextafter(amax, np.inf)]).reshape(-1, 1).astype(np.float32)
    x = np.repeat(amax, 128, axis=1)
    _, scales = quant.quantize(x, scale_format="ue8m0", round_scale=True)
    inverse = np.maximum(amax, np.float32(1e-4)) * np.float32(1 / 448)
    # exact: the smallest power of two that is not below the float32 `inverse`
    scales = np.asarray(scales, np.float32)
    assert (scales >= inverse).all()
    assert (scales / 2 < inverse).all()


def test_zeros_stay_zeros():
    q, scales = quant.quantize(jnp.zeros((2, 128)), scale_format="float32", round_scale=False)
    assert not bits(q).any()
    np.testing.assert_array_equal(scales, np.float32(1e-4) * np.float32(1 / 448))


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (jnp.zeros((2, 100)), {}, r"quantize: x must have a multiple of 128 columns; got \(2, 100\); pad"),
        (jnp.zeros((2, 128), int), {}, "quantize: x must be floating point; got int32; cast"),
        (jnp.zeros((2, 128)), {"scale_format": "fp4"}, "quantize: scale_format must be .*; got 'fp4'; choose"),
        (jnp.zeros((2, 128)), {"scale_format": "ue8m0"}, "quantize: round_scale must be True .*; got False; set it"),
    ],
)
def test_refuses(x, options, message):
    with pytest.raises(ValueError, match=message):
        quant.quantize(x, **({"scale_format": "float32", "round_scale": False} | options))


def test_dequantize_refuses_foreign_scales():
    with pytest.raises(ValueError, match=r"dequantize: scales must have one column per 128 of q; got \(2, 2\)"):
        quant.dequantize(jnp.zeros((2, 128), jnp.float8_e4m3fn), jnp.zeros((2, 2)), jnp.float32)
