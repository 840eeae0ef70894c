"""Pretrained weights from the hub, a folder or a GGUF file: what is loaded, and what is refused before training."""

from __future__ import annotations

import os
import re
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from clplat.streams.base import Spec

Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager"]
ORIGIN = "clplat_weights"
"""Entry of config.json with what the weights were before `dequantise` wrote them."""
PADDED_SHARE = 0.9
"""Least share of a model's vocabulary that its tokenizer fills; embeddings are padded by a few rows, not by a tenth."""

HUB_ADVICE = "give a hub id that exists and can be reached, or a folder with config.json and safetensors"
NAMES_SHOWN = 6
"""Missing tensors that a message names; the rest are counted."""
HUB = "huggingface.co"
"""Where models come from that are in no folder, unless HF_ENDPOINT names another server."""


def hub_is_away() -> bool:
    """Whether the hub's name leads nowhere, so that asking it would take the library's retries, most of a minute."""
    if {"HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_ENDPOINT"} & os.environ.keys():
        return False
    try:
        socket.getaddrinfo(HUB, 443)
    except OSError:
        return True
    return False


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
        remote = not Path(path).is_dir()
        if self.revision is not None and not remote:
            raise ValueError(f"revision: the folder {path} has none; leave revision out, or give a hub id as name")
        away = remote and not self.local_files_only and hub_is_away()
        if remote and (self.local_files_only or away):
            why = f"{HUB} cannot be reached" if away else "local_files_only asks no server"
            self._check_cached(path, why)
        if self.gguf_file is not None:
            need("gguf", "accelerate")
        backbone, info = self._read(path, local=self.local_files_only or away)
        _check_complete(path, info)
        _check_numbers(path, backbone)
        return backbone

    def _read(self, path: str, *, local: bool) -> tuple[nn.Module, Mapping[str, Any]]:
        """The model, and what the library says of its loading; a ValueError says which file is at fault."""
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

        try:
            with _without_bars():
                return AutoModelForCausalLM.from_pretrained(
                    path, revision=self.revision or "main", gguf_file=self.gguf_file, dtype=getattr(torch, self.dtype),
                    attn_implementation=self.attention, local_files_only=local,
                    use_safetensors=None if self.allow_pickle else True, trust_remote_code=self.trust_remote_code,
                    output_loading_info=True,
                )  # fmt: skip
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = _first_line(error)
            if self.attention == "sdpa" and "attention implementation" in reason:
                raise ValueError(f"attention: {path!r} does not run with sdpa; use eager") from error
            advice = self._advice(Path(path)) if Path(path).is_dir() else HUB_ADVICE
            raise ValueError(f"name: {path!r} cannot be loaded ({reason}); {advice}") from error

    def _advice(self, folder: Path) -> str:
        """What to do about a folder that cannot be loaded: what it lacks, or which file in it is damaged."""
        quantised = sorted(file.name for file in folder.glob("*.gguf"))
        if self.gguf_file is not None:
            if self.gguf_file in quantised:
                return f"{self.gguf_file} is cut short, damaged or of a kind that transformers cannot read"
            return f"gguf_file: the folder has no {self.gguf_file}; its GGUF files are {', '.join(quantised) or 'none'}"
        if not (folder / "config.json").is_file():
            hint = f", or set gguf_file to one of {', '.join(quantised)}" if quantised else ""
            return f"the folder has no config.json; give the one that save_pretrained wrote{hint}"
        files = sorted(folder.glob("*.safetensors"))
        if damaged := [file.name for file in files if not _opens(file)]:
            return f"{', '.join(damaged)} is cut short or damaged; copy or download it again"
        if files:
            return (
                "config.json and the safetensors beside it do not make a causal language model that transformers knows"
            )
        pickled = sorted(file.name for file in [*folder.glob("*.bin"), *folder.glob("*.pt")])
        if pickled and not self.allow_pickle:
            return (f"its weights are pickled ({', '.join(pickled)}), and reading them can run code: set allow_pickle: "
                    "true if you trust them, or save the model again as safetensors")  # fmt: skip
        return "the folder has a config.json, but no weights; put model.safetensors beside it"

    def _check_cached(self, path: str, why: str) -> None:
        """ValueError where the hub's cache has not got the model: looking for adapters, the library would ask a server
        all the same."""
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(path, "config.json", revision=self.revision)
        except HFValidationError:
            cached = None
        if not isinstance(cached, str):
            raise ValueError(f"name: {path} is no folder and not in the hub's cache, and {why}; give a folder, or "
                             "download it before")  # fmt: skip

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


def check_causal(backbone: nn.Module, vocabulary: int, name: str) -> None:
    """ValueError where a model looks at later tokens, tried without a mask, as rows of one document are read: the
    answers that it learns to write would be shown to it."""
    length = min(6, context_length(cast(Any, backbone).config) or 6)
    row = torch.arange(1, length + 1) % vocabulary
    other = row.clone()
    other[-1] = (row[-1] + 1) % vocabulary
    with torch.no_grad():
        logits = backbone(input_ids=torch.stack([row, other]), use_cache=False).logits[:, :-1]
    if reaches_back(logits[0], logits[1]):
        raise ValueError(
            f"name: {name} ({type(backbone).__name__}) looks at later tokens: its logits at earlier positions change "
            "with a row's last token; give a causal language model (for a model of BERT's kind that was trained as "
            "one: is_decoder: true in its config.json)"
        )


def reaches_back(one: Tensor, other: Tensor) -> bool:
    """Whether logits differ by more than the rounding of their number format."""
    least = max(1e-5, 2 * torch.finfo(one.dtype).eps)
    return bool((one.float() - other.float()).abs().max() > least * one.float().abs().max())


def need(*packages: str) -> None:
    """ValueError that says what to install for optional packages that are not there."""
    for package in packages:
        if find_spec(package) is None:
            raise ValueError(f"{package} is not installed; pip install 'clplat[pretrained]' brings it")


def context_length(config: Any) -> int | None:
    """Tokens that a row may have; None where the model names no bound."""
    return getattr(config, "max_position_embeddings", None)


SHORTER = "shorten the stream's rows (block_size, max_tokens or window, as the stream calls it)"


def check_fits(config: Any, spec: Spec, name: str) -> None:
    """ValueError where stream and model do not belong together: rows, vocabulary, end token, sliding attention."""
    if spec.kind != "language":
        raise ValueError(f"Pretrained: reads token rows, but the stream is of kind {spec.kind!r}; use a text stream")
    length, context, vocabulary = spec.input_shape[0], context_length(config), int(config.vocab_size)
    if context is not None and length > context:
        raise ValueError(f"name: rows of {length} tokens do not fit the context of {name}, {context} tokens; {SHORTER}")
    window = getattr(config, "sliding_window", None)
    if window is not None and length > window:
        raise ValueError(f"name: {name} attends within {window} tokens, and rows have {length}; {SHORTER}")
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


def _check_complete(path: str, info: Mapping[str, Any]) -> None:
    """ValueError where weights are not in the files, in whose place the library draws random ones. Tied weights, which
    files hold once, are not among those that it calls missing."""
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - NAMES_SHOWN} more" if len(missing) > NAMES_SHOWN else ""
        raise ValueError(
            f"name: the weights of {path!r} lack {', '.join(missing[:NAMES_SHOWN])}{more}, which would be random; "
            "give the complete files of a causal language model, and the config.json that belongs to them"
        )


def _check_numbers(path: str, backbone: nn.Module) -> None:
    """ValueError where weights are infinite or no numbers."""
    wrong = [name for name, weight in backbone.named_parameters() if not bool(torch.isfinite(weight).all())]
    if wrong:
        raise ValueError(
            f"name: weights of {path!r} are NaN or infinite ({', '.join(wrong[:NAMES_SHOWN])}); copy or download the "
            "files again, or save the model from a training that did not diverge"
        )


def _opens(file: Path) -> bool:
    """Whether a file of safetensors is whole, by its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


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
