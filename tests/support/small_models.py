"""Small pretrained models in folders: random weights, made by transformers itself, so that nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clplat.streams.tokenizers import ByteTokenizer

VOCABULARY, END, CONTEXT = 60, 2, 32
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "eos_token_id": END, "bos_token_id": 1, "pad_token_id": 0}
LLAMA: dict[str, Any] = SIZES | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "initializer_range": 0.3,
}  # fmt: skip


class SixtyTokens(ByteTokenizer):
    """A tokenizer of as many tokens as the models here, for tests that read no text."""

    vocab_size, end_token, identity = VOCABULARY, END, "sixty"

    def encode_joined(self, texts: Sequence[str]) -> tuple[Any, Any, Any]:
        ids, lengths, sizes = super().encode_joined(texts)
        return ids % VOCABULARY, lengths, sizes

    def token_bytes(self) -> torch.Tensor:
        return torch.ones(VOCABULARY)


def model_folder(parent: Path, kind: str, **changes: Any) -> Path:
    """A folder with config.json and safetensors of a small model of a kind."""
    import transformers as library

    made = {
        "llama": lambda: library.LlamaConfig(**LLAMA | changes),
        "gpt2": lambda: library.GPT2Config(
            **SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, initializer_range=0.3, **changes
        ),
        "bert": lambda: library.BertConfig(
            **SIZES,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=CONTEXT,
            initializer_range=0.3,
            **changes,
        ),
        "phi3": lambda: library.Phi3Config(**LLAMA | changes),
        "mixtral": lambda: library.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2, **changes),
        "mamba": lambda: library.MambaConfig(**SIZES, hidden_size=32, state_size=4, num_hidden_layers=2, **changes),
    }
    folder = parent / kind
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        library.AutoModelForCausalLM.from_config(made[kind]()).save_pretrained(folder)
    return folder


def write_byte_tokenizer(folder: Path) -> None:
    """Files of a tokenizer of transformers: the 256 bytes, and an end token behind them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<end>").save_pretrained(folder)


def written_gguf(path: Path, model: Any, *, quantised: bool) -> None:
    """A Llama as llama.cpp writes it: its names, its order of rotary pairs, 4-bit blocks where asked for."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_eos_token_id(END)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "model.layers.": "blk.", "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        value = tensor.numpy()
        for part, count in (("q_proj", heads), ("k_proj", groups)):
            if part in name:
                value = value.reshape(count, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if quantised and value.ndim == 2 and value.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
