"""Pretrained weights from the hub, a folder or a GGUF file: what is loaded, and what is refused before training."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from clplat.streams.base import Spec

Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager"]
ORIGIN = "clplat_weights"
"""Entry of config.json with what the weights were before `dequantise` wrote them."""
PADDED_SHARE = 0.9
"""Least share of a model's vocabulary that its tokenizer fills; embeddings are padded by a few rows, not by a tenth."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model comes from, and how it is read."""

    name: str
    revision: str | None = None
    gguf_file: str | None = None
    dtype: Dtype = "float32"
    attention: Attention = "sdpa"
    local_files_only: bool = False
    allow_pickle: bool = False
    trust_remote_code: bool = False

    def path(self) -> str:
        """Hub id or folder, with variables expanded."""
        expanded = os.path.expandvars(self.name)
        if unset := re.search(r"\$\{?(\w+)", expanded):
            raise ValueError(f"name: {expanded} needs the environment variable {unset[1]}, which is not set")
        return expanded

    def load(self) -> nn.Module:
        """The causal language model, in evaluation mode, on the CPU; a ValueError says what cannot be read and why."""
        path = self.path()
        if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
            raise ValueError(f"name: there is no folder {path}")
        if self.local_files_only and not Path(path).is_dir():
            self._check_cached(path)
        if self.gguf_file is not None:
            need("gguf", "accelerate")
        from transformers import AutoModelForCausalLM

        try:
            with _without_bars():
                return AutoModelForCausalLM.from_pretrained(
                    path, revision=self.revision or "main", gguf_file=self.gguf_file, dtype=getattr(torch, self.dtype),
                    attn_implementation=self.attention, local_files_only=self.local_files_only,
                    use_safetensors=None if self.allow_pickle else True, trust_remote_code=self.trust_remote_code,
                )  # fmt: skip
        except (OSError, ValueError, KeyError) as error:
            reason = _first_line(error)
            if self.attention == "sdpa" and "attention implementation" in reason:
                raise ValueError(f"attention: {path!r} does not run with sdpa; use eager") from error
            raise ValueError(
                f"name: {path!r} cannot be loaded ({reason}); give a hub id, a folder with config.json and "
                "safetensors, or a folder and a gguf_file in it"
            ) from error

    def _check_cached(self, path: str) -> None:
        """ValueError where the hub's cache has not got the model: looking for adapters, the library would ask a server
        all the same."""
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(path, "config.json", revision=self.revision)
        except HFValidationError:
            cached = None
        if not isinstance(cached, str):
            raise ValueError(f"name: {path} is no folder and not in the hub's cache, and local_files_only asks no "
                             "server; download it before, or leave local_files_only out")  # fmt: skip

    def weights(self, config: Any) -> str:
        """What the weights are, in words: their dtype, and from what they were dequantised, now or by `dequantise`."""
        if self.gguf_file is None:
            origin = getattr(config, ORIGIN, None)
            return self.dtype if origin is None else f"{origin}, {self.dtype}"
        from gguf import GGUFReader

        file = Path(self.path()) / self.gguf_file
        if not file.is_file():
            return f"dequantised GGUF {self.gguf_file}, {self.dtype}"
        sizes: Counter[str] = Counter()
        for tensor in GGUFReader(file).tensors:
            sizes[tensor.tensor_type.name] += int(tensor.n_elements)
        kind = sizes.most_common(1)[0][0]
        return self.dtype if kind == "F32" else f"dequantised {kind}, {self.dtype}"


def need(*packages: str) -> None:
    """ValueError that says what to install for optional packages that are not there."""
    for package in packages:
        if find_spec(package) is None:
            raise ValueError(f"{package} is not installed; pip install 'clplat[pretrained]' brings it")


def context_length(config: Any) -> int | None:
    """Tokens that a row may have; None where the model names no bound."""
    return getattr(config, "max_position_embeddings", None)


def check_fits(config: Any, spec: Spec, name: str) -> None:
    """ValueError where stream and model do not belong together: rows, vocabulary, end token, sliding attention."""
    if spec.kind != "language":
        raise ValueError(f"Pretrained: reads token rows, but the stream is of kind {spec.kind!r}; use a text stream")
    length, context, vocabulary = spec.input_shape[0], context_length(config), int(config.vocab_size)
    if context is not None and length > context:
        raise ValueError(
            f"name: rows of {length} tokens do not fit the context of {name}, {context} tokens; lower the stream's "
            "block_size or max_tokens"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and length > window:
        raise ValueError(f"name: {name} attends within {window} tokens, and rows have {length}; lower the stream's "
                         "block_size or max_tokens")  # fmt: skip
    if not PADDED_SHARE * vocabulary <= spec.num_outputs <= vocabulary:
        raise ValueError(
            f"name: {name} knows {vocabulary} tokens, and the stream's tokenizer {spec.num_outputs}; give the stream "
            "the model's own tokenizer (PretrainedTokenizer with the same name)"
        )
    ends = _ends(config)
    if ends and spec.end_token is not None and spec.end_token not in ends:
        raise ValueError(
            f"name: texts of {name} end in token {' or '.join(map(str, ends))}, and the stream's in {spec.end_token}; "
            "give the stream the model's own tokenizer (PretrainedTokenizer with the same name)"
        )


def _ends(config: Any) -> list[int]:
    ends = getattr(config, "eos_token_id", None)
    return [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@contextmanager
def _without_bars() -> Iterator[None]:
    """Progress bars off while weights are loaded, and as they were afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
