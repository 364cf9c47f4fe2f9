"""What examples/moe_decoder reads from a folder, and what it refuses. The model's numbers: test_moe_decoder.py."""

import ctypes
import json
import math
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import moe_decoder
import numpy as np
import pytest
from checkpoints import (
    EXPERT,
    EXPERTS,
    HIDDEN,
    LAYERS,
    MIXTRAL,
    VOCAB,
    mixtral_tensors,
    write_chat_template,
    write_config,
    write_shards,
    write_tokenizer,
)
from moe_decoder.attention import frequencies
from moe_decoder.checkpoint import dequantize_fp8, dequantize_mxfp4
from moe_decoder.config import read_config

import jax_nixlep as nx
from jax_nixlep.elastic.weights import flatten

COMMON = {name: MIXTRAL[name] for name in MIXTRAL if not name.startswith(("model", "inter", "num_local"))}
DEEPSEEK = COMMON | {
    "model_type": "deepseek_v3", "intermediate_size": 40, "moe_intermediate_size": 8, "n_routed_experts": 16,
    "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "n_shared_experts": 2, "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5, "norm_topk_prob": True, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6, "v_head_dim": 10,
    "rope_scaling": {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32,
                     "beta_slow": 1, "original_max_position_embeddings": 4096},
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = write_config(tmp_path_factory.mktemp("mixtral"), MIXTRAL)
    tensors = mixtral_tensors()
    write_shards(folder, tensors)
    return folder, tensors


@pytest.fixture
def broken(mixtral, tmp_path):
    """A copy to damage."""
    return shutil.copytree(mixtral[0], tmp_path / "broken")


# --- Reading. ---


def test_each_rank_gets_its_experts_and_nothing_else(mixtral):
    folder, tensors = mixtral
    model = moe_decoder.load(folder)
    moe = model.place(model.load_experts([3, -1, 1]))["layers"]["1"]["moe"]
    assert set(moe) == {"wi_0", "wi_1", "wo"}
    for ours, theirs in (("wi_0", "w1"), ("wi_1", "w3"), ("wo", "w2")):
        name = "model.layers.1.block_sparse_moe.experts.{}." + theirs + ".weight"
        np.testing.assert_array_equal(moe[ours][0], tensors[name.format(3)].T)
        np.testing.assert_array_equal(moe[ours][1], 0 * tensors[name.format(3)].T)
        np.testing.assert_array_equal(moe[ours][2], tensors[name.format(1)].T)
    dense = flatten(model.place(model.load_dense()))
    np.testing.assert_array_equal(dense["lm_head"], tensors["lm_head.weight"].T)
    np.testing.assert_array_equal(dense["embed_tokens"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(
        dense["layers/0/self_attn/k_proj"], tensors["model.layers.0.self_attn.k_proj.weight"].T
    )
    assert not any("wi_0" in path for path in dense) and "layers/0/moe/gate" in dense
    total = sum(np.size(value) for value in dense.values()) + LAYERS * EXPERTS * 3 * HIDDEN * EXPERT
    assert total == sum(value.size for value in tensors.values())


def test_a_mesh_gets_its_parts(mixtral):
    folder, tensors = mixtral
    mesh = jax.make_mesh((2, 2, 2), ("dp", "ep", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    model = moe_decoder.load(folder, mesh=mesh, tensor_axis="tp")
    wo = model.place(model.load_experts(range(EXPERTS)))["layers"]["0"]["moe"]["wo"]
    assert wo.sharding.spec == jax.P("ep", "tp", None)
    want = np.stack([tensors[f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight"].T for e in range(EXPERTS)])
    for shard in wo.addressable_shards:
        assert shard.data.shape == (EXPERTS // 2, EXPERT // 2, HIDDEN)
        np.testing.assert_array_equal(shard.data, want[shard.index])
    head = model.place(model.load_dense())["lm_head"]
    assert head.sharding.spec == jax.P(None, "tp")
    np.testing.assert_array_equal(head, tensors["lm_head.weight"].T)
    cache = model.empty_cache(4, 10)
    assert cache[0].keys.sharding.spec == jax.P(("dp", "ep"), None, "tp")


def test_capacities_and_errors_of_a_group(mixtral):
    model = moe_decoder.load(mixtral[0], dtype="bfloat16")
    config = model.ep_config(max_ranks=3, experts_per_rank=2, tokens_per_rank=5)
    assert (config.hidden, config.top_k, config.dtype) == (HIDDEN, 2, jnp.bfloat16)
    with pytest.raises(ValueError, match=r"at least the model's 4 experts; got 1 \* 3 slots"):
        model.ep_config(1, 3, 5)
    with pytest.raises(ValueError, match=r"ids must be in \[-1, 4\); got \[4\]"):
        model.load_experts([0, 4])


def test_a_step_and_its_bounds(mixtral):
    """Two halves of a prompt are the whole; a row that takes no part changes nothing."""
    model = moe_decoder.load(mixtral[0], backend="xla")
    cache = model.empty_cache(2, 8)
    tokens, zero = np.array([[3, 1, 4, 1], [5, 9, 2, 6]], np.int32), np.zeros(2, np.int32)
    weights = model.place(model.load_dense()), model.place(model.load_experts(range(EXPERTS))), None
    step = jax.jit(model.forward)
    with pytest.raises(RuntimeError, match="call ep_config first"):
        step(*weights, tokens, zero, zero, cache)
    model.ep_config(1, EXPERTS, 8)
    whole, _ = step(*weights, tokens, zero, np.array([4, 4], np.int32), cache)
    _, part = step(*weights, tokens[:, :2], zero, np.array([2, 0], np.int32), cache)
    assert not np.asarray(part[0].keys[1]).any() and np.asarray(part[0].keys[0, :2]).all()
    second, _ = step(*weights, tokens[:, 2:], np.array([2, 0], np.int32), np.array([2, 0], np.int32), part)
    np.testing.assert_allclose(second[0], whole[0], rtol=1e-5, atol=1e-5)
    assert whole.shape == (2, VOCAB) and whole.dtype == jnp.float32
    with pytest.raises(ValueError, match=r"at most 8 tokens, the length of its cache; got 9; make the cache longer"):
        step(*weights, np.zeros((2, 9), np.int32), zero, zero, cache)


def resident_bytes():
    """Memory of this process. Pages of files that it maps are not its own."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(status[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))


def rank_memory(job, folder, shared):
    """By how much memory of this rank grows at most while it loads, and the size of its parameters, in bytes."""
    model, per_rank = moe_decoder.load(folder), EXPERTS // job.num_ranks
    group = job.initialize(model.ep_config(job.num_ranks, per_rank, 8), elastic=shared, timeout_s=60)
    experts = model.load_experts(range(job.rank * per_rank, (job.rank + 1) * per_rank))
    dense = model.load_dense()
    own = sum(value.nbytes for tree in (experts, dense) for value in flatten(tree).values())
    jax.block_until_ready(jnp.zeros(8))  # whatever jax needs at first
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would be used again, and not be seen to grow
    done, samples = threading.Event(), [resident_bytes()]

    def watch():
        while not done.wait(1e-3):
            samples.append(resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = group.load(experts, dense) if shared else (model.place(experts), model.place(dense))
    samples.append(resident_bytes())
    done.set()
    watcher.join()
    del kept
    return max(samples) - samples[0], own


@pytest.mark.parametrize("shared", [False, True], ids=["arrays", "elastic-group"])
def test_peak_memory_is_that_of_the_own_parameters(pools, tmp_path, shared):
    folder = write_config(tmp_path, MIXTRAL | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
                                               "torch_dtype": "bfloat16"})  # fmt: skip
    write_shards(folder, mixtral_tensors(ml_dtypes.bfloat16, 512, 1536, 8))
    for peak, own in pools(2).run(rank_memory, folder, shared):
        print(f"parameters {own / 1e6:.1f} MB, peak {peak / 1e6:.1f} MB, {peak / own - 1:+.1%}")
        assert own > 50e6
        assert 0.9 * own <= peak <= 1.1 * own


# --- Quantised tensors. ---


def test_fp8_blocks_have_their_scales():
    rng, block = np.random.default_rng(0), (4, 3)
    values = rng.standard_normal((10, 8)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.random((3, 3), np.float32)
    want = [[float(values[i, j]) * scales[i // 4, j // 3] for j in range(8)] for i in range(10)]
    np.testing.assert_allclose(dequantize_fp8(values, scales, block, np.dtype(np.float32)), want, rtol=1e-6)
    with pytest.raises(ValueError, match=r"be \[3, 3\] for \[10, 8\] in blocks of \[4, 3\]; got \(3, 2\)"):
        dequantize_fp8(values, scales[:, :2], block, np.dtype(np.float32))


def test_mxfp4_values_have_their_exponents():
    blocks = np.arange(32, dtype=np.uint8).reshape(1, 2, 16) * 7
    scales = np.array([[127, 130]], np.uint8)
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    want = []
    for i, byte in enumerate(blocks.reshape(-1).tolist()):
        want += [math.copysign(table[half & 7], -1 if half & 8 else 1) * 2.0 ** (3 * (i >= 16))
                 for half in (byte & 15, byte >> 4)]  # fmt: skip
    got = dequantize_mxfp4(blocks, scales, np.dtype(ml_dtypes.bfloat16))
    assert got.shape == (1, 64) and got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got[0].astype(np.float32), want)


# --- Text. ---


def test_text_and_conversations(mixtral, broken):
    write_tokenizer(broken)
    model = moe_decoder.load(broken)
    assert model.encode("hello user") == [0, 1, 2] and model.decode([0, 1, 2]) == "hello user"
    with pytest.raises(FileNotFoundError, match="must have a chat template"):
        model.apply_chat([])
    write_chat_template(broken)
    model = moe_decoder.load(broken)
    assert model.apply_chat([{"role": "user", "content": "hello"}]) == [0, 2, 3, 1, 4, 3]
    with pytest.raises(ValueError, match="apply_chat: messages must suit the model's template; got no system"):
        model.apply_chat([{"role": "system", "content": "hello"}])
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json must exist"):
        moe_decoder.load(mixtral[0]).encode("hello")


# --- Configs. ---


def test_config_of_deepseek(tmp_path):
    config = read_config(write_config(tmp_path, DEEPSEEK))
    assert config.router == nx.Router(
        num_experts=16, top_k=3, score="sigmoid", scale=2.5, num_groups=4, top_k_groups=2, normalize=True
    )
    assert config.moe_layers == (False, True) and (config.shared_dim, config.mlp_dim) == (16, 40)
    assert config.score_bias and config.quantization == "fp8" and config.block == (128, 128)
    assert config.latent.query_rank == 12 and config.head_dim == 10 and config.rope.dim == 4 and config.rope.interleaved
    sharpen = 0.1 * math.log(40) + 1
    assert config.attention_scale == pytest.approx(10**-0.5 * sharpen**2) and config.rope.magnitude == 1.0


def test_config_of_the_others(tmp_path):
    qwen = COMMON | {
        "model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 8, "intermediate_size": 40,
        "norm_topk_prob": True, "mlp_only_layers": [0], "head_dim": 12, "sliding_window": 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    }  # fmt: skip
    config = read_config(write_config(tmp_path / "a", qwen))
    assert config.router == nx.Router(num_experts=8, top_k=2) and config.moe_layers == (False, True)
    assert config.qk_norm == "head" and config.windows == (None, None) and config.rope.theta == 5000.0
    olmoe = COMMON | {"model_type": "olmoe", "num_experts": 8, "intermediate_size": 8, "clip_qkv": 8.0}
    config = read_config(write_config(tmp_path / "b", olmoe))
    assert config.router == nx.Router(num_experts=8, top_k=2, normalize=False)
    assert config.qk_norm == "all" and config.clip_qkv == 8.0
    gpt = MIXTRAL | {"model_type": "gpt_oss", "sliding_window": 8, "eos_token_id": 7}
    folder = write_config(tmp_path / "c", gpt)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    config = read_config(folder)
    assert config.windows == (8, None) and config.sinks and config.expert_bias and config.attention_bias
    assert config.activation == nx.ClampedSwiGLU(1.702, 7.0) and config.eos_ids == {7, 9}


def test_yarn_frequencies(tmp_path):
    """Fast pairs turn as before, slow ones `factor` times slower, those between in between (arXiv:2309.00071)."""
    rope = read_config(write_config(tmp_path, DEEPSEEK | {"qk_rope_head_dim": 64, "rope_theta": 10_000.0})).rope
    got, plain = frequencies(rope), 10_000.0 ** (-np.arange(0, 64, 2) / 64)
    turns = 4096 * plain / (2 * math.pi)
    np.testing.assert_allclose(got[turns > 45], plain[turns > 45], rtol=1e-5)
    np.testing.assert_allclose(got[turns < 0.7], plain[turns < 0.7] / 40, rtol=1e-5)
    assert (np.diff(got) < 0).all()


# --- What is refused. ---


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, r"model_type in .*config.json must be one of \['deepseek_v3'.*got 'llama'"),
        ({"hidden_size": None}, "hidden_size in .* must be a whole number from 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers in .*got -1"),
        ({"num_attention_heads": 1 << 40}, "num_attention_heads in .* must be a whole number from 1 to"),
        ({"num_key_value_heads": 3}, "num_key_value_heads in .* must divide num_attention_heads = 4; got 3"),
        ({"num_experts_per_tok": 9}, "routing of .* is refused: Router: top_k must be at most 4"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps in .* must be a positive number; got 'x'"),
        ({"hidden_act": "gelu"}, "hidden_act in .* must be \"silu\"; got 'gelu'"),
        ({"rope_scaling": {"type": "llama3"}}, "rope_type in .* got 'llama3'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method .*'awq'.*use the original weights"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_configs(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        moe_decoder.load(write_config(tmp_path, MIXTRAL | change))


def test_missing_files(broken):
    (broken / "model-00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard .*model-00001.safetensors must exist .*download"):
        moe_decoder.load(broken)
    (broken / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json must exist; .*folder of a Hugging Face checkpoint"):
        moe_decoder.load(broken)


@pytest.mark.parametrize("keep", [4, 40, 0.9])
def test_truncated_shard(broken, keep):
    shard = broken / "model-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[: keep if keep > 1 else int(keep * len(data))])
    with pytest.raises(ValueError, match=r"model-00002.safetensors must be a whole safetensors file; got .*download"):
        moe_decoder.load(broken)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]}, r"x as F32 \[2, 3\] in bytes 0 to 20"),
        ({"dtype": "F32", "shape": [-2, 3], "data_offsets": [0, 24]}, r"x as F32 \[-2, 3\]"),
        ({"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 0]}, "x as F32"),
        ({"dtype": "F7", "shape": [1], "data_offsets": [0, 1]}, "an entry"),
        ({"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}, "x ends at"),
    ],
)
def test_headers_are_not_trusted(tmp_path, entry, words):
    header = json.dumps({"x": entry}).encode()
    write_config(tmp_path, MIXTRAL)
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))
    with pytest.raises(ValueError, match=words):
        moe_decoder.load(tmp_path)


def test_shards_that_do_not_belong_to_the_config(broken):
    name = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    index = broken / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    write_config(broken, MIXTRAL | {"intermediate_size": EXPERT + 1})
    experts = moe_decoder.load(broken).load_experts([2])
    with pytest.raises(ValueError, match=rf"{name} in .*{where[name]} must be \[25, 16\] as read.*got \[24, 16\]"):
        np.asarray(experts["layers"]["0"]["moe"]["wo"])
    write_config(broken, MIXTRAL | {"num_hidden_layers": LAYERS + 1})
    dense = moe_decoder.load(broken).load_dense()
    with pytest.raises(ValueError, match=r"must hold the tensor model.layers.2.input_layernorm.weight"):
        np.asarray(dense["layers"]["2"]["input_layernorm"])
    index.write_text(json.dumps({"weight_map": where | {"gone": where[name]}}))
    with pytest.raises(ValueError, match=rf"{where[name]} must hold the tensor gone"):
        moe_decoder.load(broken)
    index.write_text(json.dumps({"weight_map": {"x": "../elsewhere"}}))
    with pytest.raises(FileNotFoundError, match=r"shard .*elsewhere must exist in"):
        moe_decoder.load(broken)


def test_float8_without_scales(broken):
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = mixtral_tensors()
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    write_shards(broken, tensors)
    q = moe_decoder.load(broken).load_dense()["layers"]["0"]["self_attn"]["q_proj"]
    with pytest.raises(ValueError, match=rf"{name} in .* must come with {name}_scale_inv.*convert the checkpoint"):
        np.asarray(q)
    tensors[f"{name}_scale_inv"] = np.ones((2, 2), np.float32)
    write_shards(broken, tensors)
    q = moe_decoder.load(broken).load_dense()["layers"]["0"]["self_attn"]["q_proj"]
    with pytest.raises(ValueError, match=rf"{name}_scale_inv in .* must be \[1, 1\] .*correct weight_block_size"):
        np.asarray(q)
