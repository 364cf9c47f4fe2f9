"""The benchmark of moving weights, small; how fast is not asserted."""

from jax_nixlep.bench_elastic import weight_rates


def test_weight_rates():
    rates = weight_rates(1 << 20, samples=2)
    assert set(rates) == {"copy", "copy_in_use", "shared", "nixl"} and all(rate > 0 for rate in rates.values())
