"""The sums over kernels, on made-up ones: this machine may have no GPU."""

import jax
import jax.numpy as jnp

from jax_nixlep.bench_kernels import Kernel, kernels_of, usage


def test_overlaps_count_once_and_gaps_beside_ours_are_ours():
    kernels = [
        Kernel("gemm", 1000, 4000),
        Kernel("void jax_nixlep::cuda::SendTokensKernel<1>()", 7000, 2000),  # 2 us after the gemm
        Kernel("_ZN10jax_nixlep4cuda10PlanKernelEv", 8000, 3000),  # overlaps by 1 us
        Kernel("copy", 14000, 1000),  # 3 us later
        Kernel("within it", 14200, 300),
        Kernel("gemm", 15500, 1000),  # 0.5 us later, beside none of ours
    ]
    used = usage(kernels)
    assert (used.busy_us, used.ours_us, used.kernels, used.ours) == (10, 4, 6, 2)
    assert (used.idle_us, used.ours_idle_us) == (5.5, 5)


def test_nothing_ran():
    assert usage([]).busy_us == 0 and usage([]).kernels == 0


def test_a_cpu_has_no_kernels():
    assert kernels_of(lambda: jax.jit(lambda x: x @ x)(jnp.ones((8, 8)))) == []
