"""examples/moe_decoder against `transformers`: random tiny checkpoints of every family, logits and greedy texts.

Needs the extra "parity" (see .ci/run). Without it the file is skipped, or fails with JAX_NIXLEP_REQUIRE_PARITY=1.
Errors are relative to the largest logit of a row.
"""

import dataclasses
import json
import os
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from greedy import NEW_TOKENS, PROMPTS, WIDTH, advance, on_ranks
from safetensors.numpy import load_file, save_file

import jax_nixlep as nx

try:
    import moe_decoder
    import torch
    import transformers
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors
except ImportError:
    if os.environ.get("JAX_NIXLEP_REQUIRE_PARITY"):
        raise
    pytest.skip("needs the extra parity: torch and transformers", allow_module_level=True)

# transformers tells the user of a renamed argument, from its own code.
pytestmark = pytest.mark.filterwarnings("default")

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
DEEPSEEK = SMALL | {
    "num_key_value_heads": 4, "num_hidden_layers": 3, "first_k_dense_replace": 1, "intermediate_size": 40,
    "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 20,
}  # fmt: skip
# Of each family the first runs on all numbers of ranks and on meshes, the others on one rank.
CASES = {
    "mixtral": ("Mixtral", SMALL | {"intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3": ("Qwen3Moe", SMALL | {
        "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3, "head_dim": 16, "norm_topk_prob": True,
    }),
    "olmoe": ("Olmoe", SMALL | {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 4}),
    "deepseek": ("DeepseekV3", DEEPSEEK | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.8}}),
    "gpt-oss": ("GptOss", SMALL | {
        "intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 4, "head_dim": 16, "sliding_window": 7,
        "rope_parameters": YARN | {"truncate": False},
    }),
    "mixtral-window": ("Mixtral", SMALL | {
        "intermediate_size": 40, "num_local_experts": 5, "num_experts_per_tok": 1, "sliding_window": 6, "head_dim": 12,
        "tie_word_embeddings": True,
    }),
    "qwen3-some-dense": ("Qwen3Moe", SMALL | {
        "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "intermediate_size": 40,
        "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "attention_bias": True,
        "use_sliding_window": True, "sliding_window": 5,
    }),
    "olmoe-clip": ("Olmoe", SMALL | {
        "intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.7, "norm_topk_prob": True,
    }),
    "deepseek-plain": ("DeepseekV3", DEEPSEEK | {
        "q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2, "rope_interleave": False,
        "attention_bias": True, "norm_topk_prob": False, "routed_scaling_factor": 1.5,
    }),
    "gpt-oss-full": ("GptOss", SMALL | {
        "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 1,
        "layer_types": ["full_attention"] * 2, "swiglu_limit": 0.5,
    }),
}  # fmt: skip
FAMILIES = list(CASES)[:5]
RANKS = [(case, 1) for case in CASES] + [(case, ranks) for case in FAMILIES for ranks in (2, 4)]


@dataclasses.dataclass
class Reference:
    """A checkpoint, and what transformers makes of it: logits [prompts, NEW_TOKENS, V] and the greedy tokens."""

    folder: str
    model: object
    logits: np.ndarray
    tokens: np.ndarray


def randomize(model, seed=0):
    """Values at which every term of the model counts, unlike the usual initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if "norm" in name:
            value.copy_(1 + 0.2 * noise)
        elif "embed" in name or "sinks" in name:
            value.copy_(noise)
        else:
            value.copy_(0.2 * noise)


def run_reference(folder, model):
    logits, tokens = [], []
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            out = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, attention_mask=torch.ones_like(ids))
            logits.append(model(out).logits[0, len(prompt) - 1 : -1].float().numpy())
            tokens.append(out[0, len(prompt) :].numpy())
    return Reference(str(folder), model, np.stack(logits), np.stack(tokens))


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    made = {}

    def reference(case):
        if case not in made:
            family, options = CASES[case]
            config = getattr(transformers, f"{family}Config")(**options)
            model = getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="eager")
            randomize(model.eval())
            folder = tmp_path_factory.mktemp(case)
            model.save_pretrained(folder, max_shard_size="40KB")
            made[case] = run_reference(folder, model)
        return made[case]

    return reference


def error(got, want):
    return (np.abs(got - want).max(-1) / np.abs(want).max(-1)).max()


def assert_parity(got, want):
    logits, tokens = got
    np.testing.assert_array_equal(tokens, want.tokens)
    assert error(logits, want.logits) <= 1e-4


@pytest.mark.parametrize(("case", "num_ranks"), RANKS)
def test_texts_and_logits_are_those_of_transformers(case, num_ranks, references, pools):
    want = references(case)
    assert_parity(on_ranks(pools, num_ranks, want.folder), want)


@pytest.mark.parametrize("case", FAMILIES)
def test_sharded_over_a_mesh(case, references):
    want = references(case)
    mesh = jax.make_mesh((2, 2, 2), ("dp", "ep", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    model = moe_decoder.load(want.folder, mesh=mesh, tensor_axis="tp")
    slots = -(-model.num_experts // 2) * 2
    nx.initialize(model.ep_config(2, slots // 2, 2 * WIDTH), mesh=mesh, timeout_s=120)
    try:
        experts = [e if e < model.num_experts else -1 for e in range(slots)]
        dense, experts = model.place(model.load_dense()), model.place(model.load_experts(experts))
        assert dense["layers"]["1"]["self_attn"]["o_proj"].sharding.spec == jax.P("tp", None)
        assert experts["layers"]["1"]["moe"]["wo"].sharding.spec == jax.P("ep", "tp", None)
        step = jax.jit(model.forward)
        assert_parity(advance(model, step, (dense, experts, None), PROMPTS, 8), want)
        assert step._cache_size() == 2
    finally:
        nx.shutdown()


@pytest.mark.parametrize("case", FAMILIES)
def test_bfloat16_is_as_near_as_that_of_transformers(case, references, pools):
    exact = references(case)
    (logits, tokens), theirs = on_ranks(pools, 1, exact.folder, "bfloat16"), exact.model.to(torch.bfloat16)
    try:
        with torch.no_grad():  # both on the texts that ours continued
            texts = [torch.tensor([[*p, *t]]) for p, t in zip(PROMPTS, tokens.tolist(), strict=True)]
            their_logits = [theirs(text).logits[0].float().numpy() for text in texts]
            exact_logits = [theirs.float()(text).logits[0].numpy() for text in texts]
    finally:
        theirs.float()
    cut = [slice(len(p) - 1, len(p) - 1 + NEW_TOKENS) for p in PROMPTS]
    want = np.stack([each[part] for each, part in zip(exact_logits, cut, strict=True)])
    their_error = np.abs(np.stack([each[part] for each, part in zip(their_logits, cut, strict=True)]) - want).mean()
    assert np.abs(logits - want).mean() <= 2 * their_error


def read_folder(folder):
    """The config and all tensors."""
    files = {}
    for path in Path(folder).glob("*.safetensors"):
        files |= load_file(path)
    return json.loads((Path(folder) / "config.json").read_text()), files


def write_folder(folder, config, files):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(value) for name, value in files.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    return str(folder)


def assert_quantized_parity(pools, tmp_path, config, quantization, files, exact):
    """Ours reads `files`; transformers gets the same values unquantised, `exact`."""
    folder = write_folder(tmp_path / "quantized", config | {"quantization_config": quantization}, files)
    plain = write_folder(tmp_path / "plain", config, exact)
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, attn_implementation="eager").eval()
    assert_parity(on_ranks(pools, 1, folder), run_reference(folder, model))


def test_fp8_blocks(references, pools, tmp_path):
    """DeepSeek's own format: matrices in float8, and a float32 scale for each block."""
    config, exact = read_folder(references("deepseek").folder)
    files, block = dict(exact), (16, 10)
    for name, value in exact.items():
        if "_proj" not in name:
            continue
        shape = tuple(-(-n // b) for n, b in zip(value.shape, block, strict=True))
        scales = np.random.default_rng(len(name)).uniform(4e-3, 8e-3, shape).astype(np.float32)
        spread = np.kron(scales, np.ones(block, np.float32))[: value.shape[0], : value.shape[1]]
        files[name] = (value / spread).astype(ml_dtypes.float8_e4m3fn)
        files[f"{name}_scale_inv"] = scales
        exact[name] = files[name].astype(np.float32) * spread
    quantization = {"quant_method": "fp8", "weight_block_size": list(block)}
    assert_quantized_parity(pools, tmp_path, config, quantization, files, exact)


def test_mxfp4_experts(references, pools, tmp_path):
    """gpt-oss' own format: the experts' matrices in 4 bits, and an exponent for 32 values."""
    config, exact = read_folder(references("gpt-oss-full").folder)
    files, rng = dict(exact), np.random.default_rng(0)
    for name in [name for name in exact if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = files.pop(name).shape
        blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), dtype=np.uint8)
        scales = rng.integers(121, 126, blocks.shape[:3], dtype=np.uint8)
        files |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        unpacked = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32)
        exact[name] = unpacked.numpy()
    assert_quantized_parity(pools, tmp_path, config, {"quant_method": "mxfp4"}, files, exact)
