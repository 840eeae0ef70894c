"""Any causal language model of `transformers` as an architecture: whole, or frozen with low-rank adapters.

    clplat run pretrained/tiny      # a Llama of 260,000 weights on three tasks, two minutes on a CPU

Shapes: B rows, T tokens, C hidden size, L layers, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.adapters import AdapterHost
from clplat.architectures.base import Output, State
from clplat.architectures.layers import causal_document_mask, traced
from clplat.architectures.lora import EXPERTS, LoRA
from clplat.architectures.option_checks import check_choices
from clplat.architectures.pretrained import cache
from clplat.architectures.pretrained.layers import checkpoint_layers, compile_layers
from clplat.architectures.pretrained.loading import (
    Attention,
    Dtype,
    Source,
    check_causal,
    check_fits,
    context_length,
    need,
    reaches_back,
)
from clplat.streams.base import Spec
from clplat.streams.batch import IGNORE, Batch

Places = Literal["all", "targets"]
"""Which tokens the head reads."""
TARGETS = ["q_proj", "v_proj"]
"""Where adapters go by default, as in peft for models of Llama's kind."""


class Pretrained(AdapterHost):
    """A pretrained causal language model: tokens (B, T) to logits (B, T, V)."""

    causal = True

    def __init__(
        self,
        *,
        spec: Spec,
        name: str,
        revision: str | None = None,
        gguf_file: str | None = None,
        lora: LoRA | None = None,
        dtype: Dtype = "float32",
        attention: Attention = "sdpa",
        document_mask: bool = True,
        skip_padding: bool = True,
        logits: Places = "all",
        gradient_checkpointing: bool = False,
        compiled: bool = False,
        local_files_only: bool = False,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        """`name`: hub id, at `revision`, or a folder (variables are expanded); `gguf_file` names a file in it. With
        `lora` the model is frozen and low-rank adapters are trained beside `lora.targets` (default: q_proj, v_proj);
        without, all weights. `dtype` is what the weights are loaded as; adapters beside bfloat16 are float32.
        `document_mask` keeps documents of one row apart, each with positions of its own. `skip_padding` leaves out the
        columns behind the last target of a batch (their logits and hidden states are 0), for which it waits for the
        device once a forward pass; `logits: targets` leaves the head out wherever no target is (logits are 0 there),
        which spares most of a step's memory where answers are short. `gradient_checkpointing` trades time for memory in
        training. `compiled` puts every layer through torch.compile, for rows and tokens of any number (generation is
        not compiled); unlike `training.compile` it goes on leaving out padding, and the head where no target is.
        Weights are read from safetensors alone unless `allow_pickle`, and code from the hub is not run unless
        `trust_remote_code`."""
        source = Source(
            name=name, revision=revision, gguf_file=gguf_file, dtype=dtype, attention=attention,
            local_files_only=local_files_only, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        check_choices(source, dtype=Dtype, attention=Attention)
        if logits not in get_args(Places) or (logits == "targets" and not skip_padding):
            raise ValueError(f"logits: must be all, or targets beside skip_padding: true; got {logits!r}")
        if lora is not None:
            need("peft")
        backbone = source.load()
        check_fits(backbone.config, spec, name)
        check_causal(backbone, spec.num_outputs, name)
        super().__init__(backbone, lora, TARGETS)
        self.source, self.config = source, cast(Any, backbone.config)
        self.row_length, self.num_outputs = spec.input_shape[0], spec.num_outputs
        self.document_mask, self.skip_padding, self.logits_at = document_mask, skip_padding, logits
        # Asked once: it reads a signature, which takes longer than a layer of a small model.
        self.cache_name = cache.argument(backbone)
        self.masks = self._obeys_masks()
        if gradient_checkpointing:
            checkpoint_layers(backbone)
        self.compiled = compiled
        if compiled:
            compile_layers(backbone, name)

    def forward(self, batch: Batch, state: State = None, return_hidden: str | None = None) -> Output:
        """Logits (B, T, V). `hidden`: with `return_hidden` "last" the input of the head (B, T, C), with "all" the
        embeddings and what every layer adds up to (B, L + 1, T, C), the last of which is the input of the head.

        With `state`, every row continues after all the tokens it holds, and the state after them is returned.
        """
        if state is not None:
            if self.document_mask and batch.segment_ids is not None:
                raise ValueError("Pretrained.document_mask: a carried state knows no documents; pass no segment_ids")
            logits, state = self.decode(batch.inputs, state, torch.full_like(batch.inputs[:, 0], state[0].shape[1]))
            return Output(logits=logits, state=state)
        length = batch.inputs.shape[1]
        self._check_length(length)
        used = _used(batch.targets) if self.skip_padding else length
        predicted = _predicted(batch.targets) if self.logits_at == "targets" else None
        with self._head_at(predicted, length, used):
            found = self._read(
                batch.inputs[:, :used], use_cache=False, output_hidden_states=return_hidden is not None,
                **self._documents(batch.segment_ids, used),
            )  # fmt: skip
        logits = found.logits[..., : self.num_outputs]
        if predicted is None:
            logits = F.pad(logits, (0, 0, 0, length - used))
        else:
            everywhere = logits.new_zeros(batch.targets.numel(), self.num_outputs)
            logits = everywhere.index_copy_(0, predicted, logits[0]).view(*batch.targets.shape, -1)
        if return_hidden is None:
            return Output(logits=logits, predicted=predicted)
        hidden = torch.stack(found.hidden_states, dim=1) if return_hidden == "all" else found.hidden_states[-1]
        return Output(logits=logits, predicted=predicted, hidden=F.pad(hidden, (0, 0, 0, length - used)))

    def init_state(self, batch_size: int) -> cache.State:
        return cache.empty(batch_size, next(self.parameters()).device)

    def decode(self, tokens: Tensor, state: cache.State, lengths: Tensor) -> tuple[Tensor, cache.State]:
        """Logits (B, T, V) of `tokens` (B, T), which follow the `lengths` (B,) tokens that each row has in `state`.

        Rows of unequal length are padded on the right. ValueError beyond the model's context.
        """
        held, layers = state
        self._check_length(held.shape[1] + tokens.shape[1])
        self._need_masks("generation from prompts of unequal length")
        positions, new, mask = cache.continued(held, lengths, tokens.shape[1])
        grown = cache.as_library(layers)
        options = {self.cache_name: grown, "attention_mask": self._mask(mask), "position_ids": new}
        # Compiled, every layer's place in a cache would be a graph of its own.
        with torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
            found = self._read(tokens, use_cache=True, **options)
        return found.logits[..., : self.num_outputs], (positions, cache.as_tensors(grown))

    def flops_per_row(self) -> float:
        """Forward operations for a row of T tokens, padding included: 2 for every weight that a token passes through,
        head included and lookup not, and 4·C for each pair of tokens that attention compares and mixes."""
        weights = sum(p.numel() for p in self.parameters() if p.ndim >= 2) - self._idle()
        if not self.config.tie_word_embeddings:
            weights -= cast(Any, self.backbone).get_input_embeddings().weight.numel()
        pairs = self.row_length * (self.row_length + 1) / 2
        return 2.0 * self.row_length * weights + 4.0 * self.config.hidden_size * pairs * self.config.num_hidden_layers

    def active_parameters(self) -> int:
        """Parameters that one token passes through: without experts that it does not choose, and resting adapters."""
        return super().active_parameters() - self._idle() - self.resting_parameters()

    def facts(self) -> Mapping[str, str]:
        revision = getattr(self.config, "_commit_hash", None) or self.source.revision or "local"
        return {
            **super().facts(), "model": self.source.name, "revision": revision, "attention": self.source.attention,
            "weights": self.source.weights(self.config),
        }  # fmt: skip

    def _insert(self, adapter: str) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        assert self.lora is not None
        options = LoraConfig(
            r=self.lora.rank, lora_alpha=self.lora.alpha, lora_dropout=self.lora.dropout, target_modules=self.targets
        )
        with warnings.catch_warnings():
            # Several adapters are what is wanted.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            # Beside GPT-2's layers, whose weights are transposed, peft sets it of itself.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            inject_adapter_in_model(options, self.backbone, adapter)
        for layer in self._layers().values():
            for adapters in (layer.lora_A, layer.lora_B):
                kind = next(adapters[adapter].parameters()).dtype
                # So that small steps are not rounded away beside 16-bit weights.
                adapters[adapter].to(torch.promote_types(kind, torch.float32))

    def _read(self, tokens: Tensor, **options: Any) -> Any:
        return self.backbone(input_ids=tokens, **options)

    @contextmanager
    def _head_at(self, places: Tensor | None, length: int, used: int) -> Iterator[None]:
        """Within it the head reads these of the B · `length` tokens (all: None), of which the model has the first
        `used` columns, as one row of N."""
        if places is None:
            yield
            return
        among_used = places // length * used + places % length

        def chosen(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (given[0].flatten(0, 1).index_select(0, among_used).unsqueeze(0), *given[1:])

        hook = cast(Any, self.backbone).get_output_embeddings().register_forward_pre_hook(chosen)
        try:
            yield
        finally:
            hook.remove()

    def _documents(self, segment_ids: Tensor | None, used: int) -> dict[str, Tensor]:
        """Mask and positions that keep a row's documents apart; nothing where there is one document a row."""
        if segment_ids is None or not self.document_mask:
            return {}
        segment_ids = segment_ids[:, :used]
        mask = causal_document_mask(segment_ids)
        if mask is None:
            return {}
        self._need_masks("batch.segment_ids: several documents in a row")
        return {"attention_mask": self._mask(mask), "position_ids": cache.document_positions(segment_ids)}

    def _check_length(self, tokens: int) -> None:
        context = context_length(self.config)
        if context is not None and tokens > context:
            raise ValueError(
                f"Pretrained: {tokens} tokens do not fit the context of {self.source.name}, {context} tokens; shorten "
                "the rows, prompts or answers of the stream and its probes"
            )

    def _mask(self, seen: Tensor) -> Tensor:
        """Who may look where, as the attention in use takes it."""
        if self.source.attention == "sdpa":
            return seen
        kind = next(self.backbone.parameters()).dtype
        return torch.zeros_like(seen, dtype=kind).masked_fill(~seen, torch.finfo(kind).min)

    def _need_masks(self, what: str) -> None:
        if not self.masks:
            raise ValueError(
                f"{what} needs a mask that {type(self.backbone).__name__} does not take; use rows of one document "
                "(PromptAnswerStream) without generation, or document_mask: false"
            )

    @torch.no_grad()
    def _obeys_masks(self) -> bool:
        """Whether a document behind another is answered as if it stood alone, and without a look at its own later
        tokens, tried on six tokens."""
        tokens = torch.tensor([[1, 2, 3, 4, 5, 6], [3, 1, 2, 4, 5, 6], [1, 2, 3, 4, 5, 7]]) % self.num_outputs
        segments = torch.tensor([[0, 0, 0, 1, 1, 1]]).expand(3, -1)
        seen = causal_document_mask(segments)
        assert seen is not None
        options = {"attention_mask": self._mask(seen), "position_ids": cache.document_positions(segments)}
        try:
            packed = self._read(tokens, use_cache=False, **options)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
        first, second = packed.logits[:2, 3:].float()
        alone = bool((first - second).abs().max() <= 1e-3 * first.abs().max())
        return alone and not reaches_back(packed.logits[0, 3:5], packed.logits[2, 3:5])

    def _idle(self) -> int:
        """Weights of experts that a token does not choose."""
        total = next((n for n in map(self._size, ("num_local_experts", "num_experts", "n_routed_experts")) if n), 0)
        chosen = self._size("num_experts_per_tok")
        if not total or not chosen:
            return 0
        routed = sum(p.numel() for name, p in self.backbone.named_parameters() if EXPERTS in name.split("."))
        return round(routed * (1 - chosen / total))

    def _size(self, name: str) -> int:
        return int(getattr(self.config, name, None) or 0)


def _used(targets: Tensor) -> int:
    """Columns up to the last target of any row; all of them under a compiler or vmap."""
    if traced():
        return targets.shape[1]
    counted = (targets != IGNORE).any(0).nonzero()
    return int(counted[-1]) + 1 if len(counted) else targets.shape[1]


def _predicted(targets: Tensor) -> Tensor | None:
    """Places (N,) of the targets among B·T; None, for all, where there are none, and under a compiler or vmap."""
    if traced():
        return None
    found = (targets != IGNORE).flatten().nonzero().squeeze(1)
    return found if len(found) else None
