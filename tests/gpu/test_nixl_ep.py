"""NVIDIA's NIXL-EP kernels beside ours, several ranks to a GPU; needs torch and a nixl_ep wheel."""

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoints
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import test_gpu
from upstream import collect, deposit

GPU = {"JAX_PLATFORMS": "cuda", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
       "CUDA_MODULE_LOADING": "EAGER", "UCX_LOG_LEVEL": "error"}  # fmt: skip
EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("nixl_ep_cu13") is None,
    reason="needs torch and the nixl_ep_cu13 wheel",
)


def make_config(**changes):
    import jax_nixlep as nx

    fields = {"max_ranks": 2, "experts_per_rank": 4, "max_tokens_per_rank": 16, "hidden": 2048, "top_k": 4,
              "dtype": jnp.bfloat16} | changes  # fmt: skip
    return nx.EpConfig(**fields)


def make_input(config, rank, tokens, seed=0, members=None):
    """x, ids (some -1, one of them twice in its token) and weights."""
    rng = np.random.default_rng((seed, rank))
    slots = np.flatnonzero(np.isin(np.arange(config.num_slots) // config.experts_per_rank,
                                   range(config.max_ranks) if members is None else members))  # fmt: skip
    ids = np.array([rng.permutation(slots)[: config.top_k] for _ in range(tokens)], np.int32)
    ids = ids.reshape(tokens, config.top_k)
    ids[rng.random(ids.shape) < 0.2] = -1
    ids[:1, 1] = ids[:1, 0]
    x = np.asarray(jnp.asarray(rng.standard_normal((tokens, config.hidden)), config.dtype))
    return x, ids, rng.random(ids.shape, np.float32) + 0.1


def make_inputs(config, tokens, **options):
    inputs = [make_input(config, rank, t, **options) for rank, t in enumerate(tokens)]
    return tuple(list(column) for column in zip(*inputs, strict=True))


def exact_sums(config, rank, ids, weights, received, factor):
    """[t, H] float32 of the rows as they arrived at their experts."""
    y = np.zeros((len(ids[rank]), config.hidden), np.float32)
    for t, row in enumerate(ids[rank]):
        for k, slot in enumerate(row):
            if slot >= 0:
                there = received[slot // config.experts_per_rank]
                arrived = there.tokens[there.row_of[rank, t, k]].astype(np.float32)
                y[t] += weights[rank][t, k] * factor * arrived
    return y


def assert_rounded(got, exact):
    """Equal but for one rounding to bfloat16, and float32's."""
    np.testing.assert_array_less(np.abs(got.astype(np.float32) - exact), 2.0**-8 * np.abs(exact) + 1e-4)


# --- Both kernels, the same tokens ---


def rank_both(job, config, tokens, dequantize):
    import jax

    import jax_nixlep as nx

    x, ids, weights = make_input(config, job.rank, tokens[job.rank])
    results = {}
    for kernels in ("nixl_ep", "native"):
        job.initialize(config, kernels=kernels)

        @jax.jit
        def step(x, ids, weights):
            received = nx.dispatch(x, ids, weights, config=config, dequantize=dequantize)
            rows = 2 * received.tokens.astype(config.dtype)
            return received, nx.combine(rows, received.handle, config=config, after=received.status.order)

        for _ in range(3):  # an odd number of pairs: both banks
            results[kernels] = jax.tree.map(np.asarray, step(x, ids, weights))
        path = nx.current_group().health().peers[(job.rank + 1) % config.max_ranks].path
        nx.shutdown()
    return results, path


FP8 = {"wire": "fp8_e4m3"}
CASES = [
    ({}, [16, 9], True, "pointer"),
    ({}, [16, 9], True, "put"),
    ({"max_ranks": 4}, [16, 0, 5, 16], True, "pointer"),
    (FP8, [16, 9], True, "pointer"),
    (FP8, [16, 9], False, "pointer"),
    (FP8 | {"scale_format": "ue8m0"}, [16, 9], True, "pointer"),
    (FP8 | {"scale_format": "ue8m0"}, [16, 9], False, "put"),
    ({"hidden": 7168, "experts_per_rank": 32, "top_k": 8, "max_tokens_per_rank": 128}, [128, 100], True, "pointer"),
]


@pytest.mark.parametrize(("changes", "tokens", "dequantize", "transport"), CASES)
def test_agrees_with_the_oracle_and_with_ours(gpu_pools, changes, tokens, dequantize, transport):
    config = make_config(**changes)
    xs, ids, weights = make_inputs(config, tokens)
    expected = oracle.dispatch(xs, ids, weights, config, dequantize=dequantize)
    answers = gpu_pools(len(tokens), transport).run(rank_both, config, tokens, dequantize)
    for rank, (results, path) in enumerate(answers):
        assert path == transport
        want = expected[rank]
        for received, _ in results.values():
            assert received.tokens.tobytes() == want.tokens.tobytes()  # the same rows, in the same order
            assert (received.scales is None) == (want.scales is None)
            if want.scales is not None:
                assert received.scales.tobytes() == want.scales.tobytes()
            np.testing.assert_array_equal(received.group_sizes, want.group_sizes)
            assert list(received.status.peers) == [0] * config.max_ranks
        assert_rounded(results["nixl_ep"][1], exact_sums(config, rank, ids, weights, expected, 2))


# --- Upstream's layout ---


def rank_low_latency(job, config, tokens):
    import jax

    import jax_nixlep as nx

    job.initialize(config, kernels="nixl_ep")
    x, ids, weights = make_input(config, job.rank, tokens)
    ids[:1, 1] = -1  # here a repeated id would be two rows
    send = jax.jit(functools.partial(nx.nixl_ep.low_latency_dispatch, config=config))
    back = jax.jit(functools.partial(nx.nixl_ep.low_latency_combine, config=config))
    rows, _, count, handle = send(x, ids)
    y, _ = back(rows, ids, weights, handle)
    return jax.tree.map(np.asarray, (x, ids, weights, rows, count, handle, y))


def test_upstreams_layout(gpu_pools):
    config = make_config()
    answers = gpu_pools(2).run(rank_low_latency, config, 11)
    for rank, (x, _, weights, rows, count, handle, y) in enumerate(answers):
        for e in range(config.experts_per_rank):
            assert count[e] == handle.ranges[e, :, 0].sum()
            for source in range(2):
                sent, ids = answers[source][:2]
                n, first = handle.ranges[e, source]
                tokens = handle.source[e, first : first + n]
                wanted = np.flatnonzero((ids == rank * config.experts_per_rank + e).any(axis=1))
                assert sorted(tokens) == list(wanted)
                assert rows[e, first : first + n].tobytes() == sent[tokens].tobytes()
        chosen = answers[rank][1] >= 0
        assert_rounded(y, x.astype(np.float32) * (weights * chosen).sum(1, keepdims=True))


# --- Who takes part ---


def rank_resize(job, config, memberships):
    """One compiled program through every membership."""
    import jax

    import jax_nixlep as nx

    group = job.initialize(config, kernels="nixl_ep")

    def step(x, ids, weights):
        received = nx.dispatch(x, ids, weights, config=config)
        y = nx.combine(2 * received.tokens, received.handle, config=config, after=received.status.order)
        return received, y

    compiled = jax.jit(step).lower(*make_input(config, 0, 8)).compile()
    results = []
    for i, members in enumerate(memberships):
        group._replace_members(members)
        if job.rank in members:
            arguments = make_input(config, job.rank, 8, seed=i, members=members)
            results.append(jax.tree.map(np.asarray, compiled(*arguments)))
        else:
            results.append(None)
    return results


def test_resizes_with_one_program(gpu_pools):
    config = make_config(max_ranks=4)
    memberships = [(0, 1), (0, 1, 2, 3), (0, 2, 3)]
    answers = gpu_pools(4).run(rank_resize, config, memberships)
    for i, members in enumerate(memberships):
        xs, ids, weights = make_inputs(config, [8] * 4, seed=i, members=members)
        present = [(x, d) if r in members else (None, None) for r, (x, d) in enumerate(zip(xs, ids, strict=True))]
        expected = oracle.dispatch([x for x, _ in present], [d for _, d in present], weights, config)
        for rank in members:
            received, y = answers[rank][i]
            assert received.tokens.tobytes() == expected[rank].tokens.tobytes()
            assert list(received.status.peers) == [0 if r in members else 1 for r in range(4)]
            assert_rounded(y, exact_sums(config, rank, ids, weights, expected, 2))


def rank_mask(job, config, on_timeout):
    """Rank 2 leaves after one pair of operations; the others go on."""
    import jax

    import jax_nixlep as nx

    job.initialize(config, kernels="nixl_ep", timeout_s=2.0, on_timeout=on_timeout)
    x, ids, weights = make_input(config, job.rank, 8)
    send = jax.jit(functools.partial(nx.dispatch, config=config))
    back = jax.jit(functools.partial(nx.combine, config=config))
    first = send(x, ids, weights)
    np.asarray(back(first.tokens, first.handle))
    if job.rank == 2:
        time.sleep(12)
        return None
    steps, error = [], ""
    for _ in range(3):
        try:
            received = send(x, ids, weights)
            steps.append(jax.tree.map(np.asarray, (received, back(received.tokens, received.handle))))
        except jax.errors.JaxRuntimeError as raised:
            error = str(raised)
            break
    return steps, error, nx.current_group().health()


def test_masks_a_late_peer(gpu_pools):
    config = make_config(max_ranks=3, max_tokens_per_rank=8)
    answers = gpu_pools(3).run(rank_mask, config, "mask")
    xs, ids, weights = make_inputs(config, [8] * 3)
    expected = oracle.dispatch([*xs[:2], None], [*ids[:2], None], weights, config)
    without = [np.where(i // config.experts_per_rank == 2, -1, i) for i in ids]
    for rank in (0, 1):
        steps, error, health = answers[rank]
        assert error == "" and health.masked == (2,) and health.failure == ""
        for i, (received, y) in enumerate(steps):
            assert list(received.status.peers) == [0, 0, 2 if i == 0 else 1]
            assert received.tokens.tobytes() == expected[rank].tokens.tobytes()
            assert_rounded(y, exact_sums(config, rank, without, weights, expected, 1))


def test_a_late_peer_poisons_and_is_named(gpu_pools):
    answers = gpu_pools(3).run(rank_mask, make_config(max_ranks=3, max_tokens_per_rank=8), "raise")
    for rank in (0, 1):
        steps, error, health = answers[rank]
        (received, y), *more = steps
        assert not more and np.isnan(received.tokens.astype(np.float32)).all() and np.isnan(y.astype(np.float32)).all()
        assert "rank 2 did not arrive within 2" in error and "rank 2 did not arrive" in health.failure


@pytest.mark.kills
@pytest.mark.parametrize("by", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_ends_while_it_is_met(gpu_pools, tmp_path, by):
    test_gpu.check_a_rank_that_ends_while_it_is_met(gpu_pools, make_config(), tmp_path, by, "nixl_ep")


# --- A rank that is upstream's own Buffer ---


def rank_beside_upstream(job, config, folder, repeats):
    """Rank 1: ours."""
    import jax
    import torch

    import jax_nixlep as nx

    store = torch.distributed.TCPStore("127.0.0.1", collect(folder, "port"), is_master=False, wait_for_workers=False)
    job.initialize(config, rank=1, members=[0, 1], store=store, kernels="nixl_ep")
    x, ids, weights = collect(folder, "input 1")

    def back(rows, ids, weights, handle):
        return nx.nixl_ep.low_latency_combine(2 * rows, ids, weights, handle, config=config)[0]

    send, back = jax.jit(functools.partial(nx.nixl_ep.low_latency_dispatch, config=config)), jax.jit(back)
    rows, _, _, handle = jax.eval_shape(send, x, ids)
    send, back = send.lower(x, ids).compile(), back.lower(rows, ids, weights, handle).compile()
    deposit(folder, "ready 1", True)
    collect(folder, "ready 0")
    results = []
    for _ in range(repeats):
        rows, _, count, handle = send(x, ids)
        y = back(rows, ids, weights, handle)
        floats = [np.asarray(v).astype(np.float32) for v in (rows, y)]
        results.append(floats + [np.asarray(v) for v in (count, handle.source, handle.ranges)])
    deposit(folder, "result 1", results)
    return results


def test_exchanges_with_upstreams_buffer(gpu_pools, tmp_path):
    config, repeats = make_config(), 3
    experts, tokens = config.experts_per_rank, config.max_tokens_per_rank
    inputs = [make_input(config, rank, tokens) for rank in range(2)]
    for _, ids, _ in inputs:
        ids[0, 1] = -1  # here a repeated id would be two rows
    x, ids, weights = inputs[0]
    deposit(tmp_path, "input 0", (experts, tokens, config.hidden, repeats, x.astype(np.float32), ids, weights))
    deposit(tmp_path, "input 1", inputs[1])
    path = os.pathsep.join([os.environ.get("JAX_NIXLEP_TEST_UPSTREAM", ""), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(Path(__file__).parent / "upstream.py"), str(tmp_path)]
    with subprocess.Popen(
        command, env=os.environ | GPU | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
    ) as peer:
        try:
            ours = gpu_pools(1).run(rank_beside_upstream, config, tmp_path, repeats, timeout_s=60)[0]
            assert peer.wait(20) == 0, peer.stderr.read()
        finally:
            peer.kill()
    for rank, results in enumerate((collect(tmp_path, "result 0"), ours)):
        x, ids, weights = inputs[rank]
        for rows, y, count, source, ranges in results:
            np.testing.assert_array_equal(count, ranges[..., 0].sum(axis=1))
            for e in range(experts):
                for sender in range(2):
                    n, first = ranges[e, sender]
                    found = source[e, first : first + n]
                    assert sorted(found) == list(np.flatnonzero((inputs[sender][1] == rank * experts + e).any(axis=1)))
                    np.testing.assert_array_equal(
                        rows[e, first : first + n], inputs[sender][0][found].astype(np.float32)
                    )
            assert_rounded(y, 2 * x.astype(np.float32) * (weights * (ids >= 0)).sum(1, keepdims=True))


# --- As a user starts it ---


def test_generates_the_same_tokens(tmp_path):
    wide = {"hidden_size": 2048, "intermediate_size": 256, "torch_dtype": "bfloat16"}
    checkpoints.write_config(tmp_path, checkpoints.MIXTRAL | wide)
    checkpoints.write_shards(tmp_path, checkpoints.mixtral_tensors(jnp.bfloat16, hidden=2048, expert=256))
    checkpoints.write_tokenizer(tmp_path)
    texts = {}
    for kernels in ("native", "nixl_ep"):
        out = tmp_path / f"{kernels}.json"
        options = ["--ranks", "2", "--gpus", "1", "--steps", "8", "--kernels", kernels, "--json", str(out)]
        prompts = ["--prompt", "hello user", "user", "hello : hello"]
        command = [sys.executable, str(EXAMPLES / "generate.py"), "--model", str(tmp_path), *options, *prompts]
        done = subprocess.run(command, env=os.environ | GPU, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        texts[kernels] = [completion["text"] for completion in json.loads(out.read_text())["completions"]]
    assert texts["nixl_ep"] == texts["native"]
