"""Checkpoints of models that learned nothing."""

import json
from pathlib import Path

import numpy as np
import tokenizers
from flax import nnx
from model import ByteLM, Layout, ModelConfig, save_checkpoint
from safetensors.numpy import save_file

HIDDEN, EXPERT, VOCAB, LAYERS, EXPERTS = 16, 24, 20, 2, 4
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": EXPERT, "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    "torch_dtype": "float32", "eos_token_id": 2,
}  # fmt: skip


def random_checkpoint(folder: Path) -> Path:
    """A small byte-level model with random weights, in the form that train_lm.py writes."""
    config = ModelConfig(layers=2, hidden=64, heads=2, experts=8, top_k=2, mlp_dim=64, window=64)
    model = ByteLM(config, Layout(1, 1, rank=0), nnx.Rngs(0))
    path = folder / "checkpoint.safetensors"
    save_checkpoint(path, config, nnx.state(model, nnx.Param))
    return path


def write_config(folder, values):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def mixtral_tensors(dtype=np.float32, hidden=HIDDEN, expert=EXPERT, layers=LAYERS):
    """Every value differs from the others of its layer."""
    rng = np.random.default_rng(0)

    def make(*shape):
        return rng.standard_normal(shape, np.float32).astype(dtype)

    tensors = {
        "model.embed_tokens.weight": make(VOCAB, hidden), "model.norm.weight": make(hidden),
        "lm_head.weight": make(VOCAB, hidden),
    }  # fmt: skip
    for i in range(layers):
        layer, half = f"model.layers.{i}.", hidden // 2
        shapes = {"q_proj": (hidden, hidden), "k_proj": (half, hidden), "v_proj": (half, hidden)}
        for name, shape in {**shapes, "o_proj": (hidden, hidden)}.items():
            tensors[f"{layer}self_attn.{name}.weight"] = make(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}{name}.weight"] = make(hidden)
        tensors[f"{layer}block_sparse_moe.gate.weight"] = make(EXPERTS, hidden)
        for e in range(EXPERTS):
            for name, shape in (("w1", (expert, hidden)), ("w2", (hidden, expert)), ("w3", (expert, hidden))):
                tensors[f"{layer}block_sparse_moe.experts.{e}.{name}.weight"] = make(*shape)
    return tensors


def write_shards(folder, tensors, count=3):
    where = {name: f"model-{i % count:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: value for name, value in tensors.items() if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return where


def write_tokenizer(folder):
    """One that knows the words hello, user, assistant and the colon, and begins every text with <s>."""
    words = {"<s>": 0, "hello": 1, "user": 2, ":": 3, "assistant": 4, "?": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_chat_template(folder):
    """For users only: a system message is refused."""
    template = """{{ bos_token }}{% for m in messages %}
        {% if m.role not in ["user"] %}{{ raise_exception("no " + m.role) }}{% endif %}
        {{ m.role }} : {{ m.content + " " }}{% endfor %}
        {% if add_generation_prompt %}assistant :{% endif %}"""
    values = {"chat_template": template, "bos_token": {"content": "<s>"}, "unk_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


def random_mixtral(folder):
    """A folder of Hugging Face with all but a chat template."""
    write_config(folder, MIXTRAL)
    write_shards(folder, mixtral_tensors())
    write_tokenizer(folder)
    return folder
