"""Which experts a token goes to, and with which weight: the routers of the published MoE families."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router:
    """How router logits become experts and weights. Frozen and hashable.

    Families (fields that differ from the defaults):
      Mixtral, Qwen3-MoE:  none (softmax, then the chosen weights are normalised)
      gpt-oss:             none (a softmax over the chosen logits is the same); its bias is part of the logits
      OLMoE:               normalize=False
      DeepSeek-V2:         normalize=False, scale, num_groups, top_k_groups, group_score_experts=1
      DeepSeek-V3:         score="sigmoid", scale=2.5, num_groups=8, top_k_groups=4, and `bias` given to `route`

    Attributes:
      num_experts: logical experts.
      top_k: experts per token.
      score: "softmax" over all experts, or "sigmoid" of each logit.
      normalize: divide the weights of a token by their sum.
      scale: multiplies the weights, after normalising.
      num_groups: equal groups of consecutive experts.
      top_k_groups: groups a token may choose experts from, those with the highest group score.
      group_score_experts: a group's score is the sum of its this many best (biased) scores.
      load_balance_coef, z_loss_coef: weights of the two terms of `Routing.aux_loss`.

    Raises:
      ValueError: values that do not fit together.
    """

    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_k_groups: int = 1
    group_score_experts: int = 2
    load_balance_coef: float = 0.0
    z_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, must: str, remedy: str) -> None:
            if not ok:
                raise ValueError(f"Router: {name} must {must}; got {getattr(self, name)!r}; {remedy}")

        for name in ("num_experts", "top_k", "num_groups", "top_k_groups", "group_score_experts"):
            require(getattr(self, name) > 0, name, "be positive", "leave out what the model does not use")
        require(self.score in ("softmax", "sigmoid"), "score", 'be "softmax" or "sigmoid"', "choose one of the two")
        require(self.num_experts % self.num_groups == 0, "num_groups", "divide num_experts", "use equal groups")
        require(self.top_k_groups <= self.num_groups, "top_k_groups", "be at most num_groups", "keep fewer groups")
        eligible = self.num_experts // self.num_groups * self.top_k_groups
        require(self.top_k <= eligible, "top_k", f"be at most {eligible}, the eligible experts", "choose fewer")


class Routing(NamedTuple):
    """What `route` decides.

    Attributes:
      expert_ids: [T, K] int32 logical experts, best first; -1 for masked tokens.
      weights: [T, K] float32; 0 for masked tokens. Differentiable in the logits.
      aux_loss: [] float32, `load_balance_coef * load_balance_loss + z_loss_coef * z_loss`.
      load: [E] int32, tokens per expert, summed over `axis_names`.
      load_balance_loss, z_loss: [] float32, unweighted.
    """

    expert_ids: jax.Array
    weights: jax.Array
    aux_loss: jax.Array
    load: jax.Array
    load_balance_loss: jax.Array
    z_loss: jax.Array


def route(
    router: Router,
    logits: jax.Array,
    *,
    bias: jax.Array | None = None,
    token_mask: jax.Array | None = None,
    axis_names: tuple[str, ...] = (),
) -> Routing:
    """Chooses experts and weights for each token. Ties go to the expert with the lowest id.

    Losses, over tokens that are not masked:
      load_balance_loss = E * sum_e(f_e * P_e), with f_e = tokens that chose e / tokens and P_e = mean score of e
        (sigmoid scores are first divided by their sum). Switch Transformer (arXiv:2101.03961, eq. 4-6), summed over
        the K choices as in the Hugging Face models: a perfect balance gives K.
      z_loss = mean(logsumexp(logits)**2). ST-MoE (arXiv:2202.08906, eq. 5).

    Inside shard_map, `axis_names` make f_e and the token count global. Only counts cross ranks: each rank's losses are
    scaled so that their mean over `axis_names` is the loss of the whole batch, and so are their gradients.

    Args:
      logits: [T, E] float32, with the model's own logit bias added if it has one.
      bias: [E] float32 or None: added to the scores for choosing, not for weighing (DeepSeek-V3,
        arXiv:2412.19437, eq. 16). Gets no gradient.
      token_mask: [T] bool or None; False for tokens that go nowhere.
      axis_names: mesh axes over which the batch is spread.

    Raises:
      ValueError: wrong shapes or dtypes.
    """
    experts, k = router.num_experts, router.top_k
    checks: tuple[tuple[str, jax.Array | None, int, tuple[int, ...], str], ...] = (
        ("logits", logits, 2, (logits.shape[0] if logits.ndim else 0, experts), "float32"),
        ("bias", bias, 1, (experts,), "float32"),
        ("token_mask", token_mask, 1, logits.shape[:1], "bool"),
    )
    for name, value, ndim, shape, dtype in checks:
        if value is not None and (value.ndim != ndim or value.shape != shape or value.dtype != dtype):
            raise ValueError(
                f"route: {name} must be {dtype} {shape}; got {value.dtype} {value.shape}; reshape or cast it"
            )

    mask = jnp.ones(logits.shape[0], bool) if token_mask is None else token_mask
    logits = jnp.where(mask[:, None], logits, 0)
    scores = jax.nn.softmax(logits) if router.score == "softmax" else jax.nn.sigmoid(logits)
    choose_by = lax.stop_gradient(scores if bias is None else scores + bias)
    if router.top_k_groups < router.num_groups:
        grouped = choose_by.reshape(-1, router.num_groups, experts // router.num_groups)
        best = lax.top_k(grouped, min(router.group_score_experts, grouped.shape[-1]))[0].sum(-1)
        kept = jax.nn.one_hot(lax.top_k(best, router.top_k_groups)[1], router.num_groups, dtype=bool).any(1)
        choose_by = jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(choose_by.shape)
    ids = lax.top_k(choose_by, k)[1]
    weights = jnp.take_along_axis(scores, ids, axis=1)
    if router.normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    ids = jnp.where(mask[:, None], ids, -1).astype(jnp.int32)
    weights = jnp.where(mask[:, None], weights * router.scale, 0)

    load = jnp.zeros(experts, jnp.int32).at[jnp.where(ids < 0, experts, ids)].add(1, mode="drop")
    count = mask.sum(dtype=jnp.int32)
    ranks = 1
    if axis_names:
        load, count = lax.psum((load, count), axis_names)
        ranks = lax.psum(1, axis_names)
    tokens = jnp.maximum(count, 1).astype(jnp.float32)
    shares = scores if router.score == "softmax" else scores / (scores.sum(-1, keepdims=True) + 1e-20)
    mean_share = jnp.where(mask[:, None], shares, 0).sum(0) * (ranks / tokens)
    load_balance_loss = experts * jnp.sum(load / tokens * mean_share)
    z_loss = jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) ** 2, 0).sum() * (ranks / tokens)
    aux_loss = router.load_balance_coef * load_balance_loss + router.z_loss_coef * z_loss
    return Routing(ids, weights, aux_loss, load, load_balance_loss, z_loss)
