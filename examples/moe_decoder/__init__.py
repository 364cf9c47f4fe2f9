"""Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3/R1 and gpt-oss from Hugging Face folders, with their experts on many ranks.

    model = moe_decoder.load("path/to/Mixtral-8x7B-v0.1")
    config = model.ep_config(max_ranks=4, experts_per_rank=2, tokens_per_rank=64)
    group = nx.initialize(config, rank=rank, members=range(4), store="tcp://127.0.0.1:7011")
    dense, experts = model.place(model.load_dense()), model.place(model.load_experts([2 * rank, 2 * rank + 1]))
    cache = model.empty_cache(batch=1, length=128)
    logits, cache = jax.jit(model.forward)(dense, experts, group.placement, tokens, start, lengths, cache)

`config.json` is read by `config`, the shards by `checkpoint`; `parameters` says what is where in them; `decoder` and
`attention` are the model.
"""

from moe_decoder.config import ModelConfig as ModelConfig
from moe_decoder.config import read_config as read_config
from moe_decoder.decoder import Decoder as Decoder
from moe_decoder.decoder import Layout as Layout
from moe_decoder.model import Model as Model
from moe_decoder.model import load as load
