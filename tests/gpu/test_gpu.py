"""The operations on a GPU, several ranks to each, against the same oracle as on CPU."""

import functools
import os
import signal
import time

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import test_ops
from ranks import RankError
from test_ops import WIRES, check_round_trip, make_config, make_input, make_quantized, same_bits

TRANSPORTS = ["pointer", "put"]


def cases_for(num_ranks):
    base = make_config(max_ranks=num_ranks, experts_per_rank=3)
    cases = [(base, [6] * num_ranks, 0, {})]
    cases += [(make_config(max_ranks=num_ranks, dtype=dtype, **wire), [5] * num_ranks, 1, {})
              for dtype in ("float32", "bfloat16", "float16") for wire in WIRES]  # fmt: skip
    cases += [(make_config(max_ranks=num_ranks, dtype="bfloat16", **wire), [5] * num_ranks, 2, {"dequantize": False})
              for wire in WIRES if "hidden" in wire]  # fmt: skip
    cases += [(base, [r % 3 for r in range(num_ranks)], 3, {}), (base, [0] * num_ranks, 4, {})]  # idle ranks
    cases += [(base, [6] * num_ranks, 5, {"weigh_at_dispatch": False, "ids": "distinct"})]
    cases += [(base, [6] * num_ranks, 6, {"recv_capacity": capacity}) for capacity in (1, 4, 7)]
    cases += [(make_config(max_ranks=num_ranks, hidden=4, top_k=9, max_tokens_per_rank=17), [17] * num_ranks, 7, {})]
    cases += [(make_config(max_ranks=num_ranks + 2, hidden=4), [3] * num_ranks, 8, {})]  # room for two more ranks
    chunks = make_config(max_ranks=num_ranks, hidden=4, top_k=4, experts_per_rank=33, max_tokens_per_rank=70)
    cases += [(chunks, [(70, 33, 0, 1, 32, 64)[r % 6] for r in range(num_ranks)], 9, {})]
    return cases


def large_cases(num_ranks):
    wide = make_config(max_ranks=num_ranks, dtype="bfloat16", hidden=16384, top_k=36, experts_per_rank=40,
                       max_tokens_per_rank=5, recv_capacity=100)  # fmt: skip
    long = make_config(max_ranks=num_ranks, dtype="bfloat16", hidden=512, top_k=8, experts_per_rank=40,
                       max_tokens_per_rank=600, recv_capacity=3000)  # fmt: skip
    # Above 40 KB the routing plan is made by a kernel of its own.
    planned = make_config(max_ranks=num_ranks, dtype="bfloat16", hidden=512, top_k=8, experts_per_rank=140,
                          max_tokens_per_rank=600, recv_capacity=3000)  # fmt: skip
    odd = make_config(max_ranks=num_ranks, dtype="bfloat16", hidden=1032, top_k=7, experts_per_rank=5,
                      max_tokens_per_rank=70)  # fmt: skip
    quantized = make_config(max_ranks=num_ranks, dtype="bfloat16", hidden=7168, wire="fp8_e4m3", top_k=8,
                            experts_per_rank=8, max_tokens_per_rank=40)  # fmt: skip
    return [
        (wide, [5] * num_ranks, 0, {}),
        (long, [600 - 7 * r for r in range(num_ranks)], 1, {"ids": "distinct"}),
        (planned, [600 - 100 * r for r in range(num_ranks)], 5, {}),
        (odd, [70 - r for r in range(num_ranks)], 2, {}),
        (quantized, [40] * num_ranks, 3, {"dequantize": False, "ids": "distinct"}),
        (quantized, [40 - r for r in range(num_ranks)], 4, {"quantized": True, "ids": "distinct"}),
    ]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_equals_oracle(gpu_pools, num_ranks, transport):
    if num_ranks == 1 and transport == "put":
        pytest.skip("a single rank has no peer")
    pool = gpu_pools(num_ranks, transport)
    answers = check_round_trip(pool, cases_for(num_ranks))
    if num_ranks > 1:
        assert answers[0][0]["health"].peers[1].path == transport


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_quantized_input_equals_oracle(gpu_pools, num_ranks, transport):
    if num_ranks == 1 and transport == "put":
        pytest.skip("a single rank has no peer")
    answers = check_round_trip(gpu_pools(num_ranks, transport), test_ops.quantized_cases(num_ranks))
    if num_ranks > 1:
        assert answers[0][0]["health"].peers[1].path == transport


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("num_ranks", [2])
def test_large_equals_oracle(gpu_pools, num_ranks, transport):
    answers = check_round_trip(gpu_pools(num_ranks, transport), large_cases(num_ranks))
    peer = answers[0][1]["health"].peers[1]
    assert peer.bytes_in > 0 and peer.bytes_out > 0


def rank_steps(job, config, steps):
    """Operations of one group, each with other tokens than the one before."""
    import jax

    import jax_nixlep as nx

    job.initialize(config)
    answers = []
    for seed, tokens in enumerate(steps):
        x, ids, weights = make_input(config, job.rank, tokens[job.rank], seed)
        received = nx.dispatch(x, ids, weights, config=config)
        y = nx.combine(received.tokens, received.handle, config=config) if any(tokens) else None  # changes the bank
        answers.append(jax.tree.map(np.asarray, (received, y)))
    return answers


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("experts", [33, 700])
def test_nothing_of_an_earlier_operation_is_taken(gpu_pools, experts, transport):
    config = make_config(hidden=4, top_k=4, experts_per_rank=experts, max_tokens_per_rank=70, recv_capacity=300)
    steps = [(70, 64), (1, 70), (0, 33), (0, 0), (70, 70), (33, 0), (2, 3)]
    answers = gpu_pools(2, transport).run(rank_steps, config, steps)
    for seed, tokens in enumerate(steps):
        xs, ids, weights = zip(*(make_input(config, r, t, seed) for r, t in enumerate(tokens)), strict=True)
        expected = oracle.dispatch(xs, ids, weights, config)
        sums = oracle.combine([e.tokens for e in expected], expected, config)
        for rank, want in enumerate(expected):
            received, y = answers[rank][seed]
            same_bits(received.tokens, want.tokens)
            np.testing.assert_array_equal(received.group_sizes, want.group_sizes)
            np.testing.assert_array_equal(received.handle.row_of, want.row_of)
            if any(tokens):
                same_bits(y, sums[rank])


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("where", ["dispatch", "combine"])
def test_gradients(gpu_pools, where, transport):
    test_ops.test_gradients_are_the_closed_forms(
        lambda n, _: gpu_pools(n, transport), where, "shared" if transport == "pointer" else "nixl"
    )


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_weights_have_gradients_beside_quantized_input(gpu_pools, transport):
    test_ops.check_quantized_gradients(gpu_pools(2, transport))


def test_quantized_input_may_hold_nan(gpu_pools):
    test_ops.check_strange_values(gpu_pools(1))


def test_gradients_pass_straight_through_fp8(gpu_pools):
    test_ops.test_gradients_pass_straight_through_fp8(gpu_pools)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("buffers", ["graphs", "plain"])
def test_programs(gpu_pools, buffers, transport):
    pool = gpu_pools(2, transport, buffers)
    operations = pool.run(test_ops.rank_programs, make_config(hidden=4))
    assert operations[0] == operations[1] > 40


# --- Command buffers ---


def rank_replay(job, config, repeats):
    """One jitted chain with an odd number of operations, replayed; every result must be the oracle's."""
    import jax

    import jax_nixlep as nx

    job.initialize(config)
    x, ids, weights = make_input(config, job.rank, 6, 0, "distinct")

    @jax.jit
    def chain(x):
        received = nx.dispatch(x, ids, weights, config=config)
        y = nx.combine(received.tokens, received.handle, config=config)
        again = nx.dispatch(y, ids, weights, config=config, after=y)  # odd: three operations
        return y, again.tokens

    from jax_nixlep import _ffi

    out, launches = [], []
    for i in range(repeats):
        before = _ffi.num_launches()
        y, rows = chain(x * (i + 1))
        out.append((np.asarray(y), np.asarray(rows)))
        launches.append(_ffi.num_launches() - before)
    return out, launches, nx.current_group().health().operations


@pytest.mark.parametrize("buffers", ["graphs", "plain"])
def test_replays(gpu_pools, buffers):
    config, repeats = make_config(), 12
    answers = gpu_pools(2, "pointer", buffers).run(rank_replay, config, repeats)
    for i in range(repeats):
        inputs = [make_input(config, r, 6, 0, "distinct") for r in range(2)]
        xs, ids, weights = (list(column) for column in zip(*inputs, strict=True))
        first = oracle.dispatch([x * np.float32(i + 1) for x in xs], ids, weights, config)
        ys = oracle.combine([r.tokens for r in first], first, config)
        second = oracle.dispatch(ys, ids, weights, config)
        for rank, (out, _, operations) in enumerate(answers):
            same_bits(out[i][0], ys[rank])
            same_bits(out[i][1], second[rank].tokens)
            assert operations == 3 * repeats
    for _, launches, _ in answers:  # a replay calls no handler; XLA captures anew where buffers moved
        assert (0 in launches) == (buffers == "graphs"), launches


# --- Halves ---


def in_order(steps, starts, finish, edge, after=None):
    """Starts and finishes operations, as in "sA sB fA fB"; {name: result}, in the order in which they are finished.

    `edge` makes an order edge of a result.
    """
    pending, got = {}, {}
    for half, name in steps.split():
        if half == "s":
            pending[name] = starts[name](after=after)
            after = pending[name].order
        else:
            got[name] = finish(pending[name], after=after)
            after = edge(got[name])
    return got


def start_two(inputs, config, after):
    import jax_nixlep as nx

    a = nx.dispatch_start(*inputs, config=config, after=after)
    return a, nx.dispatch_start(*inputs, config=config, after=a.order)


def rank_halves(job, config, steps):
    import jax

    import jax_nixlep as nx

    job.initialize(config)
    inputs = [make_input(config, job.rank, 6, seed) for seed in (0, 1)]

    def edge(received):
        return received.status.order

    @jax.jit
    def step(xs):
        routings = [routing for _, *routing in inputs]
        tokens = zip("AB", xs, routings, strict=True)
        starts = {name: functools.partial(nx.dispatch_start, x, *r, config=config) for name, x, r in tokens}
        got = in_order(steps, starts, nx.dispatch_finish, edge)
        *_, last = got.values()
        starts = {n: functools.partial(nx.combine_start, g.tokens, g.handle, config=config) for n, g in got.items()}
        sums = in_order(steps, starts, nx.combine_finish, lambda y: y, edge(last))
        return got["A"], sums["A"], sums["B"]

    return [jax.tree.map(np.asarray, step([x for x, *_ in inputs])) for _ in range(5)]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "steps", ["sA fA sB fB", "sA sB fA fB", "sA sB fB fA"], ids=["apart", "side by side", "nested"]
)
def test_halves(gpu_pools, steps, transport):
    config = make_config()
    answers = gpu_pools(2, transport).run(rank_halves, config, steps)
    expected = []
    for seed in (0, 1):
        inputs = [make_input(config, r, 6, seed) for r in range(2)]
        xs, ids, weights = (list(column) for column in zip(*inputs, strict=True))
        received = oracle.dispatch(xs, ids, weights, config)
        expected.append((received, oracle.combine([r.tokens for r in received], received, config)))
    for rank, steps in enumerate(answers):
        for got, y_a, y_b in steps:
            same_bits(got.tokens, expected[0][0][rank].tokens)
            np.testing.assert_array_equal(got.handle.row_of, expected[0][0][rank].row_of)
            same_bits(y_a, expected[0][1][rank])
            same_bits(y_b, expected[1][1][rank])


def rank_quantized_halves(job, config, dequantize):
    import jax

    import jax_nixlep as nx

    job.initialize(config)
    q, scales = make_quantized(config, job.rank, 6, 0)
    _, ids, weights = make_input(config, job.rank, 6, 0)

    @jax.jit
    def step(q, scales):
        pending = nx.dispatch_start(q, ids, weights, config=config, scales=scales, dequantize=dequantize)
        received = nx.dispatch_finish(pending)
        return received.tokens, received.scales

    return [jax.tree.map(np.asarray, step(q, scales)) for _ in range(3)]


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
@pytest.mark.parametrize("dequantize", [True, False])
def test_halves_of_quantized_input(gpu_pools, dequantize, scale_format):
    config = make_config(wire="fp8_e4m3", hidden=256, dtype="bfloat16", scale_format=scale_format)
    qs, scales = zip(*(make_quantized(config, r, 6, 0) for r in range(2)), strict=True)
    _, ids, weights = zip(*(make_input(config, r, 6, 0) for r in range(2)), strict=True)
    expected = oracle.dispatch(qs, ids, weights, config, scales=scales, dequantize=dequantize)
    for rank, steps in enumerate(gpu_pools(2).run(rank_quantized_halves, config, dequantize)):
        for tokens, of_rows in steps:
            same_bits(tokens, expected[rank].tokens)
            assert dequantize == (of_rows is None)
            if not dequantize:
                same_bits(of_rows, expected[rank].scales)


# --- Late, dead and disagreeing peers ---


def rank_mask(job, config, absent_does):
    """Rank 2 stops after one operation; the others go on without it."""
    import jax

    import jax_nixlep as nx

    job.initialize(config, timeout_s=1.0, on_timeout="mask")
    x, ids, weights = make_input(config, job.rank, 6, 0, "distinct")
    step = jax.jit(functools.partial(nx.dispatch, config=config))
    back = jax.jit(functools.partial(nx.combine, config=config))
    first = step(x, ids, weights)
    np.asarray(back(first.tokens, first.handle))
    if job.rank == 2:
        if absent_does == "die":
            os._exit(0)
        time.sleep(6)
        late = step(x, ids, weights)  # the others have gone on: its signals must count for nothing
        np.asarray(late.tokens)
        return nx.current_group().health()
    steps, took = [], []
    for _ in range(4):
        start = time.monotonic()
        received = step(x, ids, weights)
        y = back(received.tokens, received.handle)
        steps.append(jax.tree.map(np.asarray, (received, y)))
        took.append(time.monotonic() - start)
    if absent_does == "late":
        time.sleep(6)
        received = step(x, ids, weights)
        steps.append(jax.tree.map(np.asarray, (received, back(received.tokens, received.handle))))
    return steps, took, nx.current_group().health()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("absent_does", ["late", "die"])
def test_masks_a_peer(gpu_pools, absent_does, transport):
    config = make_config(max_ranks=3, top_k=4)
    pool = gpu_pools(3, transport)
    if absent_does == "die":
        with pytest.raises(RankError) as caught:
            pool.run(rank_mask, config, absent_does)
        assert list(caught.value.errors) == [2], caught.value.errors
        answers = caught.value.results
    else:
        answers = pool.run(rank_mask, config, absent_does)
        assert answers[2].failure  # the late rank was told
    inputs = [make_input(config, r, 6, 0, "distinct") for r in range(3)]
    xs, ids, weights = (list(column) for column in zip(*inputs, strict=True))
    expected = oracle.dispatch([xs[0], xs[1], None], [ids[0], ids[1], None], weights, config)
    ys = oracle.combine([r and r.tokens for r in expected], expected, config)
    for rank in (0, 1):
        steps, took, health = answers[rank]
        for i, (received, y) in enumerate(steps):
            same_bits(received.tokens, expected[rank].tokens)
            same_bits(y, ys[rank])
            assert list(received.status.peers) == [0, 0, 2 if i == 0 else 1]
        assert max(took[1:]) < 0.9 and (took[0] >= 0.9 or absent_does == "die")
        assert health.masked == (2,) and health.peers[2].timeouts == 1 and health.failure == ""


def rank_starts_when_given_up(job, config):
    """Rank 1 sleeps until the other has gone on without it, and only starts an operation then."""
    import jax

    import jax_nixlep as nx

    group = job.initialize(config, timeout_s=1.0, on_timeout="mask")
    inputs = make_input(config, job.rank, 6, 0, "distinct")
    received = jax.jit(functools.partial(nx.dispatch, config=config))(*inputs)
    operands = received.tokens, received.handle
    back = jax.jit(functools.partial(nx.combine, config=config))
    np.asarray(back(*operands))
    before = group.health()
    if job.rank == 0:
        np.asarray(back(*operands))
        time.sleep(5)  # its memory is there to be written to
    else:
        time.sleep(4)
        jax.block_until_ready(jax.jit(functools.partial(nx.combine_start, config=config))(*operands))
    return before.peers[1 - job.rank].bytes_out, group.health()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nothing_is_sent_to_a_peer_that_gave_this_rank_up(gpu_pools, transport):
    (_, awake), (bytes_out, late) = gpu_pools(2, transport).run(rank_starts_when_given_up, make_config())
    assert awake.masked == (1,) and not awake.failure
    assert late.operations == 3 and late.peers[0].bytes_out == bytes_out > 0


def rank_halves_beside_a_dead_one(job, config, timeout_s):
    """Two operations in flight at once; rank 2 dies when it has started the first two."""
    import jax

    import jax_nixlep as nx

    group = job.initialize(config, timeout_s=timeout_s, on_timeout="mask")
    inputs = make_input(config, job.rank, 6, 0, "distinct")

    starts = jax.jit(functools.partial(start_two, inputs, config))

    @jax.jit
    def finishes(a, b):
        got_a = nx.dispatch_finish(a)
        got_b = nx.dispatch_finish(b, after=got_a.status.order)
        return got_a.status.peers, got_b.status.peers, got_b.status.order

    pending = starts(jnp.zeros((), jnp.float32))
    if job.rank == 2:
        jax.block_until_ready(pending)
        os._exit(0)
    *peers, order = finishes(*pending)
    jax.block_until_ready(order)
    start = time.monotonic()
    for _ in range(3):
        *more, order = finishes(*starts(order))
        peers += more
    return [list(np.asarray(p)) for p in peers], group.health(), time.monotonic() - start


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_halves_mask_a_dead_peer_alone(gpu_pools, transport):
    # By pointer a death shows at once; by put (JAX_NIXLEP_P2P=0) as one silence of timeout_s, and no more than one.
    timeout_s, bound_s = (20, 15) if transport == "pointer" else (5, 9)
    with pytest.raises(RankError) as caught:
        gpu_pools(3, transport).run(rank_halves_beside_a_dead_one, make_config(max_ranks=3, top_k=4), timeout_s)
    assert list(caught.value.errors) == [2], caught.value.errors
    for peers, health, took in caught.value.results.values():
        assert all(states[:2] == [0, 0] for states in peers) and peers[-1][2] == 1, peers
        assert health.masked == (2,) and not health.failure and took < bound_s


def rank_finishes_late(job, config):
    """Two operations in flight at once; rank 2 sleeps before it finishes the first two, until the others went on."""
    import jax

    import jax_nixlep as nx

    group = job.initialize(config, timeout_s=1.5, on_timeout="mask")
    inputs = make_input(config, job.rank, 6, 0, "distinct")

    starts = jax.jit(functools.partial(start_two, inputs, config))
    finish = jax.jit(nx.dispatch_finish)
    a, b = jax.block_until_ready(starts(jnp.zeros((), jnp.float32)))
    if job.rank == 2:
        time.sleep(6)
        return bool(np.isnan(np.asarray(finish(a).tokens)).all()), group.health()
    for _ in range(2):
        finished = finish(b, after=finish(a).status.order)
        a, b = starts(finished.status.order)
    np.asarray(finish(b, after=finish(a).status.order).tokens)
    time.sleep(8)  # its memory is there to be read
    return True, group.health()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_halves_finished_too_late_look_good_to_nobody(gpu_pools, transport):
    *others, (poisoned, health) = gpu_pools(3, transport).run(rank_finishes_late, make_config(max_ranks=3, top_k=4))
    for _, awake in others:
        assert awake.masked == (2,) and not awake.failure
    assert poisoned and "went on" in health.failure


def rank_finishes_in_its_own_order(job, config, steps):
    import jax

    import jax_nixlep as nx

    group = job.initialize(config, timeout_s=10)
    start = functools.partial(nx.dispatch_start, *make_input(config, job.rank, 6, 0, "distinct"), config=config)
    starts = dict.fromkeys("ABC", start)

    @jax.jit
    def run():
        *_, last = in_order(steps[job.rank], starts, nx.dispatch_finish, lambda got: got.status.order).values()
        return last.tokens

    try:
        poisoned = bool(np.isnan(np.asarray(run())).all())
    except jax.errors.JaxRuntimeError:  # the failure was known when the last operations were to be launched
        poisoned = True
    return poisoned, group.health().failure


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "steps", [("sA fA sB fB", "sA sB fA fB"), ("sA fA sB sC fB fC", "sA sB fA sC fB fC")], ids=["two", "three"]
)
def test_ranks_that_finish_in_other_orders_are_told(gpu_pools, steps, transport):
    answers = gpu_pools(2, transport).run(rank_finishes_in_its_own_order, make_config(), steps)
    assert all(poisoned and failure for poisoned, failure in answers), answers
    assert "unfinished" in answers[0][1] and "same order" in answers[0][1]


def rank_finishes_again(job, config, later):
    """Finishes an operation again, `later` ones after it. The kernels see no difference to one of another epoch."""
    import jax

    import jax_nixlep as nx

    group = job.initialize(config)
    inputs = make_input(config, job.rank, 6, 0, "distinct")
    start = jax.jit(functools.partial(nx.dispatch_start, config=config))
    finish = jax.jit(nx.dispatch_finish)
    pending = start(*inputs)
    good = np.asarray(finish(pending).tokens)
    for _ in range(later):
        same_bits(finish(start(*inputs)).tokens, good)
    return bool(np.isnan(np.asarray(finish(pending).tokens)).all()), group.health().failure


@pytest.mark.parametrize("later", [1, 2])
def test_what_is_not_in_flight_cannot_be_finished(gpu_pools, later):
    for poisoned, failure in gpu_pools(2).run(rank_finishes_again, make_config(), later):
        assert poisoned and "must be in flight" in failure


def rank_disagree(job, config):
    """Rank 1 runs another operation. Both must find out, and no result may look good."""
    import jax

    import jax_nixlep as nx

    job.initialize(config, timeout_s=5)
    x, ids, weights = make_input(config, job.rank, 6, 0, "distinct")
    send = jax.jit(functools.partial(nx.dispatch, config=config))
    back = jax.jit(functools.partial(nx.combine, config=config))
    received = send(x, ids, weights)
    out = send(x, ids, weights).tokens if job.rank == 0 else back(received.tokens, received.handle)
    poisoned = bool(np.isnan(np.asarray(out)).all())
    try:
        np.asarray(send(x, ids, weights).tokens)
    except jax.errors.JaxRuntimeError as error:
        return poisoned, str(error), nx.current_group().health().failure
    return poisoned, "", nx.current_group().health().failure


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_names_both_operations(gpu_pools, transport):
    for poisoned, error, failure in gpu_pools(2, transport).run(rank_disagree, make_config()):
        assert poisoned
        assert "same order" in failure and failure in error
        assert "dispatch #" in failure and "combine #" in failure


def rank_raise(job, config):
    import jax

    import jax_nixlep as nx

    job.initialize(config, timeout_s=1.0)
    x, ids, weights = make_input(config, job.rank, 6, 0, "distinct")
    send = jax.jit(functools.partial(nx.dispatch, config=config))
    np.asarray(send(x, ids, weights).tokens)
    if job.rank == 1:
        time.sleep(3)
        return None
    poisoned = bool(np.isnan(np.asarray(send(x, ids, weights).tokens)).all())
    return poisoned, nx.current_group().health().failure


def test_a_late_peer_poisons_and_is_named(gpu_pools):
    poisoned, failure = gpu_pools(2).run(rank_raise, make_config())[0]
    assert poisoned and "rank 1 did not arrive within 1" in failure


def rank_leaves(job, config):
    import jax

    import jax_nixlep as nx

    job.initialize(config, timeout_s=20)
    x, ids, weights = make_input(config, job.rank, 6, 0, "distinct")
    send = jax.jit(functools.partial(nx.dispatch, config=config))
    np.asarray(send(x, ids, weights).tokens)
    if job.rank == 1:
        time.sleep(1)
        nx.shutdown()
        return None
    start = time.monotonic()
    np.asarray(send(x, ids, weights).tokens)
    return time.monotonic() - start, nx.current_group().health().failure


def test_a_peer_that_leaves_ends_the_wait(gpu_pools):
    took, failure = gpu_pools(2).run(rank_leaves, make_config())[0]
    assert took < 15 and "rank 1 has left" in failure


def rank_ends_while_it_is_met(job, config, folder, by, kernels):
    """Rank 1 stops or dies when the other knows how to connect to it. What that one is told."""
    import jax_nixlep as nx
    from jax_nixlep.rendezvous import Rendezvous

    put, pid = Rendezvous._put, folder / "pid"

    def put_and_end(self, seat, step, value, ttl_s=None):
        put(self, seat, step, value, ttl_s)
        if step == "nixl":
            os.kill(os.getpid(), by)

    if job.rank == 1:
        Rendezvous._put = put_and_end
        pid.write_text(str(os.getpid()))
    try:
        job.initialize(config, kernels=kernels, init_timeout_s=20)
    except (nx.EpError, nx.NixlError, TimeoutError) as error:
        return str(error)
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)


def check_a_rank_that_ends_while_it_is_met(gpu_pools, config, folder, by, kernels="native"):
    """NIXL answers for a stopped process, and need not notice a dead one: the others then miss it, or NIXL's limit
    passes."""
    with pytest.raises(RankError) as caught:
        gpu_pools(2).run(rank_ends_while_it_is_met, config, folder, by, kernels, timeout_s=80)
    assert list(caught.value.errors) == [1], caught.value.errors
    words = "ranks [1] did not reach step 'active' within 20 s", "must answer; got none for 30 s"
    assert any(word in caught.value.results[0] for word in words), caught.value.results


@pytest.mark.kills
@pytest.mark.parametrize("by", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_ends_while_it_is_met(gpu_pools, tmp_path, by):
    check_a_rank_that_ends_while_it_is_met(gpu_pools, make_config(), tmp_path, by)


def combine_as_one_forges(config, rank, forger):
    """Whether all sums are NaN, where the handle of `forger` names rows that are not there."""
    import jax

    import jax_nixlep as nx

    received = nx.dispatch(*make_input(config, rank, 6, 0, "distinct"), config=config)
    handle = received.handle
    if rank == forger:
        handle = handle._replace(row_of=handle.row_of + 1_000_000)
    y = jax.jit(functools.partial(nx.combine, config=config))(received.tokens, handle)
    return bool(np.isnan(np.asarray(y)).all())


def rank_forges(job, config):
    import jax_nixlep as nx

    job.initialize(config, timeout_s=20)
    return combine_as_one_forges(config, job.rank, 0), nx.current_group().health().failure


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_sums_along_a_forged_handle_look_good_to_nobody(gpu_pools, transport):
    (poisoned, failure), (peers_poisoned, peers_failure) = gpu_pools(2, transport).run(rank_forges, make_config())
    assert poisoned and "handle must be the one dispatch returned" in failure
    assert peers_poisoned and "rank 0 failed" in peers_failure


def rank_fails(job, config):
    """The combine of rank 2 fails, and says so. Whom the others miss in the dispatch after it."""
    import jax_nixlep as nx

    group = job.initialize(config, timeout_s=30, on_timeout="mask")
    start = time.monotonic()
    poisoned = combine_as_one_forges(config, job.rank, 2)
    if job.rank == 2:
        return poisoned
    peers = np.asarray(nx.dispatch(*make_input(config, job.rank, 6, 0, "distinct"), config=config).status.peers)
    return poisoned, list(peers), group.health().masked, time.monotonic() - start


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_masks_a_peer_that_failed_at_once(gpu_pools, transport):
    *others, failed = gpu_pools(3, transport).run(rank_fails, make_config(max_ranks=3, top_k=4))
    assert failed
    for poisoned, peers, masked, took in others:
        assert not poisoned and peers == [0, 0, 1] and masked == (2,) and took < 15


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_late_words_of_an_earlier_group_count_for_nothing(gpu_pools, transport):
    test_ops.check_begins_anew(gpu_pools(2, transport))


def test_symmetric_memory(gpu_pools):
    config = make_config(max_ranks=8, experts_per_rank=32, max_tokens_per_rank=128, hidden=7168, top_k=8,
                         dtype=jnp.bfloat16)  # fmt: skip
    assert gpu_pools(1).run(rank_alone, config)[0] <= 100e6


def rank_alone(job, config):
    import jax_nixlep as nx

    job.initialize(config, members=[0], store=None)
    return nx.current_group().health().symmetric_bytes
