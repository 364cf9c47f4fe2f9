"""`nixlep_moe`: a mixture-of-experts layer. route -> dispatch -> experts -> combine, in shard_map."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_nixlep import _order, reference
from jax_nixlep._vary import vary, vary_alike
from jax_nixlep.combine import combine_ordered
from jax_nixlep.config import EpConfig
from jax_nixlep.dispatch import dispatch
from jax_nixlep.experts import grouped_mlp
from jax_nixlep.group import EpGroup, joined
from jax_nixlep.placement import Placement, check_experts, identity_placement, to_slots
from jax_nixlep.router import Router, route

Params = Mapping[str, jax.Array]
Backend = Literal["native", "xla"]

_EXPERT_PARAMS = ("wi_0", "wi_1", "wo", "bi_0", "bi_1", "bo")
_SHARED_PARAMS = ("shared_wi_0", "shared_wi_1", "shared_wo")


class MoeAux(NamedTuple):
    """What a layer reports beside its output.

    Attributes:
      loss: [] float32, the router's weighted losses; add it to the training loss.
      load_balance_loss, z_loss: [] float32, unweighted.
      load: [L] int32, tokens that chose each logical expert.
      dropped: [] int32, rows dropped for want of capacity.
        These are over the whole batch and all ranks with a mesh or `token_axes`; in a process that is a rank by itself,
        over its own tokens and its own experts' rows.
      order: [n] float32 zeros, one value on each rank; pass it as `after=` to a layer that must run later.
    """

    loss: jax.Array
    load_balance_loss: jax.Array
    z_loss: jax.Array
    load: jax.Array
    dropped: jax.Array
    order: jax.Array


def nixlep_moe(
    x: jax.Array,
    params: Params,
    *,
    config: EpConfig,
    router: Router,
    placement: Placement | None = None,
    activation: str | Callable[..., jax.Array] = "silu",
    token_mask: jax.Array | None = None,
    mesh: jax.sharding.Mesh | None = None,
    axis: str | tuple[str, ...] = "ep",
    token_axes: tuple[str, ...] | None = None,
    tensor_axis: str | None = None,
    chunk_tokens: int | None = None,
    recv_capacity: int | None = None,
    backend: Backend = "native",
    after: jax.Array | None = None,
) -> tuple[jax.Array, MoeAux]:
    """Routes tokens to experts that live on other ranks and adds up what they return. Collective.

    With `mesh`, x and params are global arrays and the layer opens its own shard_map. Without, it works on what this
    rank holds: inside your own shard_map (name its axes in `token_axes`), or in a process that is a rank by itself.

    Works under jit, grad, jax.checkpoint and lax.scan. Its operations are ordered among themselves, forward and
    backward; two layers that do not depend on each other need `after=aux.order` of the first.

    Args:
      x: [..., H] tokens in `config.dtype`; with a mesh the first axis is sharded over `token_axes`.
      params: mapping with
        "gate" [H, L], optionally "gate_bias" [L] (added to the logits) and "score_bias" [L] (chooses, does not weigh);
        "wi_0" [S, H, F], "wo" [S, F, H], and optionally "wi_1" [S, H, F] (gated), "bi_0", "bi_1" [S, F], "bo" [S, H]:
        experts by physical slot, S = slots of this rank, or of the whole group with a mesh (sharded over `axis`);
        optionally "shared_wi_0", "shared_wi_1" [H, F'], "shared_wo" [F', H]: an expert that every token visits.
      config: the group's `EpConfig`.
      router: `Router` with L experts and `config.top_k`.
      placement: which slots serve which expert, as runtime arrays; None = expert e in slot e.
      activation: see `grouped_mlp`.
      token_mask: [...] bool, False for tokens that take no part; their result is zero.
      mesh: opens a shard_map over all its axes.
      axis: mesh axis, or axes, of the experts.
      token_axes: mesh axes over which tokens are spread; with a mesh default all but `tensor_axis`.
      tensor_axis: mesh axis that splits F (and F') of every expert; results are summed over it.
      chunk_tokens: most tokens of a rank in one exchange, default and at most `config.max_tokens_per_rank`; longer
        inputs are cut into chunks that are recomputed in the backward pass. All ranks must have as many chunks: where
        processes that are ranks by themselves bring different numbers of tokens, each must stay within one chunk, or
        fill up with tokens of `token_mask` False.
      recv_capacity: rows per exchange, see `dispatch`. Default: the worst case of the chunk where config has none.
      backend: "native": NIXL and shared memory. "xla": plain JAX collectives over `axis`, no group needed.
      after: `aux.order` or the result of an earlier layer; the layer runs after it.

    Returns:
      y like x, and `MoeAux`.

    Raises:
      ValueError, TypeError: at trace time; see also `dispatch`.
    """
    names = (axis,) if isinstance(axis, str) else tuple(axis)
    tokens = token_axes or tuple(name for name in (mesh.axis_names if mesh else ()) if name != tensor_axis)
    _check(x, params, config, router, placement, names, mesh, tokens, backend, chunk_tokens)
    if backend == "native" and (group := joined()):
        _check_group(group, config, router, placement, names, mesh)
    if placement is None:
        members = range(math.ceil(router.num_experts / config.experts_per_rank))
        placement = identity_placement(router.num_experts, members, config.experts_per_rank)
    layer = functools.partial(
        _layer,
        config=config,
        router=router,
        activation=activation,
        axis=names,
        tensor_axis=tensor_axis,
        chunk_tokens=chunk_tokens or config.max_tokens_per_rank,
        recv_capacity=recv_capacity,
        backend=backend,
    )
    if token_mask is not None:
        x = jnp.where(token_mask[..., None], x, 0)  # padding may be NaN, and 0 * NaN in a gradient is NaN
    if mesh is None:
        return layer(x, token_mask, dict(params), placement, after, token_axes=tokens)

    spread = P(tokens)
    everywhere = tuple(mesh.axis_names)
    aux_specs: Any = (*[P()] * 5, P(everywhere))
    after_spec = P(everywhere) if after is not None and after.shape == (mesh.size,) else spread
    specs = (spread, spread, _param_specs(params, names, tensor_axis), P(), after_spec)
    operands = (x, token_mask, dict(params), placement, after)
    if jax.sharding.AxisType.Explicit in mesh.axis_types:  # there a sharding is part of the type, and has to fit

        def fit(spec: P, values: Any) -> Any:
            return jax.tree.map(lambda value: jax.sharding.reshard(value, NamedSharding(mesh, spec)), values)

        operands = jax.tree.map(fit, specs, operands)
    mapped = jax.shard_map(
        functools.partial(layer, token_axes=tokens),
        mesh=mesh,
        in_specs=specs,
        out_specs=(spread, MoeAux(*aux_specs)),
    )
    return mapped(*operands)


def param_specs(params: Params, axis: str | tuple[str, ...] = "ep", tensor_axis: str | None = None) -> dict[str, P]:
    """PartitionSpec of each of `nixlep_moe`'s params on a mesh with these axes."""
    return _param_specs(params, (axis,) if isinstance(axis, str) else tuple(axis), tensor_axis)


def _param_specs(params: Params, axes: tuple[str, ...], tensor_axis: str | None) -> dict[str, P]:
    specs = {
        "wi_0": P(axes, None, tensor_axis),
        "wi_1": P(axes, None, tensor_axis),
        "wo": P(axes, tensor_axis, None),
        "bi_0": P(axes, tensor_axis),
        "bi_1": P(axes, tensor_axis),
        "bo": P(axes, None),
        "shared_wi_0": P(None, tensor_axis),
        "shared_wi_1": P(None, tensor_axis),
        "shared_wo": P(tensor_axis, None),
    }
    return {name: specs.get(name, P()) for name in params}


def _layer(
    x,
    mask,
    params,
    placement,
    after,
    *,
    config,
    router,
    activation,
    axis,
    token_axes,
    tensor_axis,
    chunk_tokens,
    recv_capacity,
    backend,
):
    """The layer on one rank's tokens [..., H]."""
    mask = jnp.ones(x.shape[:-1], bool) if mask is None else mask
    tokens, mask = vary_alike(x.reshape(-1, x.shape[-1]), mask.reshape(-1))
    with jax.named_scope("jax_nixlep.route"):
        logits = tokens.astype(jnp.float32) @ params["gate"].astype(jnp.float32)
        if "gate_bias" in params:
            logits = logits + params["gate_bias"].astype(jnp.float32)
        routing = route(router, logits, bias=params.get("score_bias"), token_mask=mask, axis_names=token_axes)
        slots = to_slots(placement, routing.expert_ids)

    manual = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    chunk_tokens = min(chunk_tokens, tokens.shape[0])
    if recv_capacity is None and config.recv_capacity is None and manual:
        # All ranks of a mesh bring equally many tokens. Processes of their own may not: there the config's worst case.
        recv_capacity = max(1, config.worst_case_rows(chunk_tokens))

    def exchange(x, mask, slots, weights, after):
        if backend == "xla":
            send = functools.partial(reference.dispatch, config=config, axis=_reference_axis(axis, manual))
        else:
            send = functools.partial(dispatch, config=config)
        received = send(x, slots, weights, recv_capacity=recv_capacity, after=after)
        experts = {name: params.get(name) for name in _EXPERT_PARAMS}
        if tensor_axis is not None and "bo" in params:  # results are summed over that axis: one part has the bias
            experts["bo"] = jnp.where(jax.lax.axis_index(tensor_axis) == 0, params["bo"], 0)
        with jax.named_scope("jax_nixlep.experts"):
            out = grouped_mlp(received.tokens, received.group_sizes, activation=activation, **experts)
        if backend == "xla":
            y = reference.combine(out, received.handle, config=config, axis=_reference_axis(axis, manual))
            order = received.status.order
        else:
            y, order = combine_ordered(out, received.handle, config=config, after=received.status.order)
        if "shared_wi_0" in params:
            y = y + jnp.where(mask[:, None], _shared_expert(x, params, activation), 0)
        return y, received.status.dropped, vary(order)

    inputs = (tokens, mask, slots, routing.weights)
    if tokens.shape[0] > chunk_tokens:
        y, dropped, order = _in_chunks(exchange, inputs, after, chunk_tokens)
    else:
        y, dropped, order = exchange(*inputs, after)

    if tensor_axis is not None:
        y = jax.lax.psum(y, tensor_axis)
    losses = (routing.aux_loss, routing.load_balance_loss, routing.z_loss)
    if token_axes:
        losses = jax.lax.pmean(losses, token_axes)
        dropped = jax.lax.psum(dropped, token_axes)
        if others := tuple(name for name in manual if name not in token_axes):
            dropped = jax.lax.pmax(dropped, others)
        # Along axes that spread neither tokens nor features all ranks hold the same y; say so to the types.
        if alike := tuple(name for name in manual if name not in (*token_axes, tensor_axis)):
            y = jax.lax.pmean(y, alike)
    return y.reshape(x.shape), MoeAux(*losses, routing.load, dropped, order.reshape(1))


def _reference_axis(axis: tuple[str, ...], manual: tuple[str, ...]) -> str | None:
    """The reference knows one mesh axis, or none in a process that is the only rank."""
    if len(axis) > 1:
        raise ValueError(f'nixlep_moe: axis must be one axis for backend="xla"; got {axis}; merge them in the mesh')
    return axis[0] if axis[0] in manual else None


def _in_chunks(exchange, inputs, after, chunk_tokens):
    """Exchanges `chunk_tokens` at a time, each recomputed in the backward pass: memory of one chunk, not of all."""
    count = inputs[0].shape[0]
    chunks = -(-count // chunk_tokens)

    def split(v):
        fill = -1 if v.dtype == jnp.int32 else 0  # the padding tokens go to no expert
        widths = ((0, chunks * chunk_tokens - count),) + ((0, 0),) * (v.ndim - 1)
        return jnp.pad(v, widths, constant_values=fill).reshape(chunks, chunk_tokens, *v.shape[1:])

    @jax.checkpoint
    def step(order, chunk):
        y, dropped, order = exchange(*chunk, order)
        return order, (y, dropped)

    order, (y, dropped) = jax.lax.scan(step, _order.edge(after), tuple(map(split, inputs)))
    return y.reshape(-1, y.shape[-1])[:count], dropped.sum(), order


def _shared_expert(x, params, activation):
    """The shared expert is one more group that all rows belong to."""
    stacked = [params[name][None] if name in params else None for name in _SHARED_PARAMS]
    sizes = vary_alike(jnp.full((1,), x.shape[0], jnp.int32), x)[0]
    return grouped_mlp(x, sizes, *stacked, activation=activation)


def _require(ok: bool, name: str, must: str, got: object, remedy: str) -> None:
    if not ok:
        raise ValueError(f"nixlep_moe: {name} must {must}; got {got}; {remedy}")


def _check(x, params, config, router, placement, axes, mesh, token_axes, backend, chunk_tokens) -> None:
    _require(backend in ("native", "xla"), "backend", 'be "native" or "xla"', repr(backend), "choose one of the two")
    _require(
        router.top_k == config.top_k,
        "router.top_k",
        f"be config.top_k = {config.top_k}",
        router.top_k,
        "make them equal",
    )
    _require(
        x.ndim >= 2 and x.shape[-1] == config.hidden, "x", f"be [..., {config.hidden}]", x.shape, "use config.hidden"
    )
    for name in ("gate", "wi_0", "wo"):
        _require(name in params, "params", f"contain {name!r}", sorted(params), "see the docstring")
    known = {"gate", "gate_bias", "score_bias", *_EXPERT_PARAMS, *_SHARED_PARAMS}
    _require(
        set(params) <= known, "params", f"only contain {sorted(known)}", sorted(set(params) - known), "rename them"
    )
    shape = (config.hidden, router.num_experts)
    _require(
        params["gate"].shape == shape, 'params["gate"]', f"be {shape}", params["gate"].shape, "transpose or resize it"
    )
    if placement is not None:
        got = placement.counts.shape[0]
        _require(got == router.num_experts, "placement", f"be of {router.num_experts} experts", got, "make them equal")
    slots, remedy = config.experts_per_rank, "stack one expert per slot"
    ranks = 0  # not known, in a process that is a rank by itself
    if mesh is None:
        remedy += ", or pass mesh= with arrays of all ranks"
        around = jax.sharding.get_abstract_mesh()
        if set(axes) <= set(around.manual_axes):
            ranks = math.prod(around.shape[name] for name in axes)
    else:
        for name in (*axes, *token_axes):
            _require(
                name in mesh.axis_names, "axis", f"name axes of the mesh {mesh.axis_names}", name, "rename one of them"
            )
        parts = math.prod(mesh.shape[name] for name in token_axes)
        _require(
            x.shape[0] % parts == 0,
            "x",
            f"have a first axis that can be cut in {parts}, for the mesh axes {token_axes}",
            x.shape,
            "flatten batch and sequence, or fill up with tokens of token_mask False",
        )
        ranks = math.prod(mesh.shape[name] for name in axes)
        _require(
            ranks <= config.max_ranks, "mesh", f"have at most max_ranks = {config.max_ranks} ranks", ranks, "raise it"
        )
        slots *= ranks
    if placement is None and ranks:
        check_experts("nixlep_moe", router.num_experts, range(ranks), config.experts_per_rank)
    for name in _EXPERT_PARAMS:
        if name in params:
            got = params[name].shape
            _require(got[0] == slots, f"params[{name!r}]", f"have {slots} slots in front", got, remedy)
    if chunk_tokens is not None:
        _require(
            0 < chunk_tokens <= config.max_tokens_per_rank,
            "chunk_tokens",
            f"be in [1, {config.max_tokens_per_rank}]",
            chunk_tokens,
            "raise max_tokens_per_rank",
        )


def _check_group(group: EpGroup, config, router, placement, axes, mesh) -> None:
    """Whether the group that this process has joined is the one that the arguments speak of."""
    for name in ("max_ranks", "experts_per_rank", "max_tokens_per_rank", "hidden", "top_k"):
        own, theirs = getattr(config, name), getattr(group.config, name)
        _require(
            own == theirs, f"config.{name}", f"be the group's {theirs}", own, "pass the config given to initialize"
        )
    if mesh is not None:
        where = group.misplaced(mesh, axes)
        _require(not where, "mesh", f"place devices along {axes} as the mesh of the group", where, "pass that mesh")
    elif placement is None and not jax.sharding.get_abstract_mesh().manual_axes and not group.is_elastic:
        ranks = math.ceil(router.num_experts / config.experts_per_rank)
        _require(
            set(range(ranks)) <= set(group.members),
            "router.num_experts",
            f"have slots on the ranks {list(group.members)}, from rank 0 on",
            f"{router.num_experts}, {config.experts_per_rank} for each rank",
            "raise experts_per_rank, or pass a placement",
        )
