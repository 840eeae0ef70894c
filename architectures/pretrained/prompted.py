"""A frozen pretrained model with soft prompts: trained vectors before the embeddings of a text.

Either named prompts, shown to every text (Razdaibiedina et al. 2023, arXiv:2301.12314), or a pool from which each text
gets its own (Wang et al. 2022, arXiv:2112.08654). Without either it answers as the backbone, bit for bit.

Shapes: B rows, T tokens, P vectors of the prompts shown, C hidden size, N first tokens that choose, K prompts chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.adapters import leave_backbone_out
from clplat.architectures.base import Output
from clplat.architectures.option_checks import check_at_least
from clplat.architectures.pretrained import cache
from clplat.architectures.pretrained.loading import Attention, Dtype, context_length
from clplat.architectures.pretrained.model import Pretrained, _used
from clplat.streams.base import Spec
from clplat.streams.batch import Batch

State = tuple[Tensor, *cache.State]
"""The first tokens (B, N) of each row, and the state of the backbone behind P columns of prompts."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Options of a pool, as in `base.Prompts.add_pool`."""

    size: int
    length: int
    top_k: int
    query_tokens: int
    matching: float

    def __post_init__(self) -> None:
        check_at_least(self, 1, "size", "length", "top_k", "query_tokens")
        check_at_least(self, 0, "matching")
        if self.top_k > self.size:
            raise ValueError(f"top_k: {self.top_k} prompts cannot be chosen from {self.size}")


class Prompted(Pretrained):
    """A pretrained causal language model behind soft prompts (`base.Prompts`), of which nothing else is trained."""

    def __init__(
        self,
        *,
        spec: Spec,
        name: str,
        revision: str | None = None,
        gguf_file: str | None = None,
        dtype: Dtype = "float32",
        attention: Attention = "sdpa",
        skip_padding: bool = True,
        local_files_only: bool = False,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        """Options as in `Pretrained`; prompts come from a strategy, and are float32 beside 16-bit weights."""
        super().__init__(
            spec=spec, name=name, revision=revision, gguf_file=gguf_file, dtype=dtype, attention=attention,
            skip_padding=skip_padding, local_files_only=local_files_only, allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        self._need_masks("Prompted: a prompt before the text")
        leave_backbone_out(self)
        self.prompts, self.pool, self.options = nn.ParameterDict(), nn.ParameterDict(), cast("Pool | None", None)
        self.shown: tuple[str, ...] = ()
        self.use_prompts([])

    def prompt_names(self) -> list[str]:
        return list(self.prompts)

    def add_prompt(self, prompt: str, length: int) -> None:
        """Begins at embeddings of tokens drawn from torch's global random source."""
        if not prompt.isidentifier() or prompt in self.prompts or length < 1:
            raise ValueError(f"prompt {prompt!r} of {length} vectors: give a new name made of letters, digits and '_', "
                             "and at least 1 vector")  # fmt: skip
        self.prompts[prompt] = nn.Parameter(self._embeddings(length), requires_grad=False)
        self._note_frozen()

    def prompt_room(self) -> int | None:
        context = context_length(self.config)
        return None if context is None else context - self.row_length

    def use_prompts(self, shown: Sequence[str], trained: Sequence[str] | None = None) -> None:
        chosen = shown if trained is None else trained
        if unknown := [name for name in [*shown, *chosen] if name not in self.prompts]:
            raise ValueError(f"prompt {unknown[0]!r}: there is none of that name; there are {self.prompt_names()}")
        if not set(chosen) <= set(shown):
            raise ValueError(f"prompts {sorted(set(chosen) - set(shown))}: trained, but not shown")
        if shown and self.options is not None:
            raise ValueError("Prompted: a pool shows each text its own prompts; use named ones without it")
        self.shown = tuple(shown)
        for name, prompt in self.prompts.items():
            prompt.requires_grad_(name in chosen)
        self._check_length(self._prefix_length() + self.row_length)
        self._note_frozen()

    def add_pool(self, *, size: int, length: int, top_k: int, query_tokens: int, matching: float) -> None:
        """Prompts begin at embeddings of tokens and keys at normal numbers, from torch's global random source."""
        if self.shown or self.options is not None:
            raise ValueError("Prompted: there are prompts already, and a pool stands alone")
        options = Pool(size=size, length=length, top_k=top_k, query_tokens=query_tokens, matching=matching)
        if query_tokens > self.row_length:
            raise ValueError(f"query_tokens: rows have {self.row_length} tokens, fewer than {query_tokens}")
        self._check_length(top_k * length + self.row_length)
        vectors = self._embeddings(size * length)
        self.pool["prompt"] = nn.Parameter(vectors.view(size, length, -1))
        self.pool["key"] = nn.Parameter(torch.randn(size, vectors.shape[1], device=vectors.device))
        self.options = options

    def forward(self, batch: Batch, state: Any = None, return_hidden: str | None = None) -> Output:
        """As `Pretrained`; with a pool, `losses` has the distance of the chosen keys (`prompt_matching`)."""
        if not self._prefix_length():
            return super().forward(batch, state, return_hidden)
        if batch.segment_ids is not None and bool((batch.segment_ids != batch.segment_ids[:, :1]).any()):
            raise ValueError("Prompted: prompts stand before a whole row, and this one holds several documents; use "
                             "rows of one document (PromptAnswerStream)")  # fmt: skip
        if state is not None:
            held = state[1].shape[1] - self._prefix_length() if state[1].shape[1] else 0
            logits, state = self.decode(batch.inputs, state, torch.full_like(batch.inputs[:, 0], held))
            return Output(logits=logits, state=state)
        length = batch.inputs.shape[1]
        used = _used(batch.targets) if self.skip_padding else length
        tokens, fill = batch.inputs[:, :used], (0, 0, 0, length - used)
        prefix, matching = self._prefix(tokens[:, : self._query_length()])
        width = prefix.shape[1]
        self._check_length(width + length)
        found = self.backbone(
            inputs_embeds=torch.cat([prefix, self._embed(tokens)], dim=1), use_cache=False,
            output_hidden_states=return_hidden is not None, **self._row_mask(width, used, tokens.device),
        )  # fmt: skip
        output = Output(logits=F.pad(found.logits[:, width:, : self.num_outputs], fill), losses=matching)
        if return_hidden is not None:
            hidden = found.hidden_states
            kept = torch.stack(hidden, dim=1) if return_hidden == "all" else hidden[-1]
            output.hidden = F.pad(kept[..., width:, :], fill)
        return output

    def init_state(self, batch_size: int) -> Any:
        empty = super().init_state(batch_size)
        if not self._prefix_length():
            return empty
        return torch.zeros(batch_size, self._query_length(), dtype=torch.long, device=empty[0].device), *empty

    def decode(self, tokens: Tensor, state: Any, lengths: Tensor) -> tuple[Tensor, Any]:
        """As `Pretrained`. Prompts of a row are chosen anew until its first N tokens are known."""
        if not self._prefix_length():
            return super().decode(tokens, state, lengths)
        first, held, layers = state
        count, width = self._query_length(), self._prefix_length()
        self._check_length(max(width, held.shape[1]) + tokens.shape[1])
        if not held.shape[1] or bool((lengths < count).any()):
            places = lengths.unsqueeze(1) + torch.arange(tokens.shape[1], device=tokens.device)
            # Behind the last of the first N lies a column for what comes later.
            first = F.pad(first, (0, 1)).scatter(1, places.clamp(max=count), tokens)[:, :count]
            layers = self._begun(first, layers)
            held = held if held.shape[1] else torch.arange(width, device=tokens.device).expand(len(tokens), -1)
        positions, new, seen = cache.continued(held, lengths + width, tokens.shape[1])
        seen = seen & self._sees_prompts(new - width, positions.shape[1], width).unsqueeze(1)
        grown = cache.as_library(layers)
        options = {self.cache_name: grown, "attention_mask": self._mask(seen), "position_ids": new}
        found = self._read(tokens, use_cache=True, **options)
        return found.logits[..., : self.num_outputs], (first, positions, cache.as_tensors(grown))

    def flops_per_row(self) -> float:
        """The backbone's, with the prompts as tokens of the row."""
        return super().flops_per_row() * (1 + self._prefix_length() / self.row_length)

    def structure(self) -> Mapping[str, Any]:
        trained = [name for name, prompt in self.prompts.items() if prompt.requires_grad]
        return {
            "prompts": {name: len(prompt) for name, prompt in self.prompts.items()}, "shown": list(self.shown),
            "trained": trained, "pool": None if self.options is None else asdict(self.options),
        }  # fmt: skip

    def restructure(self, structure: Mapping[str, Any]) -> None:
        with torch.random.fork_rng(devices=[]):
            for name, length in structure["prompts"].items():
                if name not in self.prompts:
                    self.add_prompt(name, length)
            if structure["pool"] is not None and self.options is None:
                self.add_pool(**structure["pool"])
        self.use_prompts(structure["shown"], structure["trained"])
        for name in self.prompts.keys() - structure["prompts"].keys():
            del self.prompts[name]

    def _prefix_length(self) -> int:
        if self.options is not None:
            return self.options.top_k * self.options.length
        return sum(len(self.prompts[name]) for name in self.shown)

    def _query_length(self) -> int:
        return 0 if self.options is None else self.options.query_tokens

    def _prefix(self, first: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The prompts (B, P, C) that rows with these first tokens (B, N) are shown, and the loss of the keys."""
        kind = self._table().dtype
        if self.options is None:
            whole = torch.cat([self.prompts[name] for name in self.shown])
            return whole.to(kind).expand(len(first), -1, -1), {}
        keys = F.normalize(self.pool["key"].float(), dim=-1)
        near = F.normalize(self._embed(first).float().mean(1), dim=-1) @ keys.T
        chosen = near.topk(self.options.top_k, dim=-1)
        prefix = self.pool["prompt"][chosen.indices].flatten(1, 2)
        return prefix.to(kind), {"prompt_matching": self.options.matching * (1 - chosen.values).sum(-1).mean()}

    def _begun(self, first: Tensor, layers: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values with those of the prompts in front; prompts see no token, so that theirs can be replaced."""
        prefix, _ = self._prefix(first)
        fresh, width = cache.as_library([]), prefix.shape[1]
        self.backbone(inputs_embeds=prefix, use_cache=True, **{self.cache_name: fresh})
        made = cache.as_tensors(fresh)
        if not layers:
            return made
        pairs = zip(made, layers, strict=True)
        return [(torch.cat([k, old_k[:, :, width:]], 2), torch.cat([v, old_v[:, :, width:]], 2))
                for (k, v), (old_k, old_v) in pairs]  # fmt: skip

    def _row_mask(self, width: int, used: int, device: torch.device) -> dict[str, Tensor]:
        """Mask of a whole row; none where the backbone's own says the same."""
        if self.options is None:
            return {}
        places = torch.arange(-width, used, device=device).unsqueeze(0)
        causal = places.unsqueeze(1) <= places.unsqueeze(2)
        return {"attention_mask": self._mask((causal & self._sees_prompts(places, width + used, width)).unsqueeze(1))}

    def _sees_prompts(self, places: Tensor, columns: int, width: int) -> Tensor:
        """Whether the token at each place (B, R) may look at each column (B, R, S): at prompts that its text has chosen
        once it is one of those behind the choice, or the last that it depends on; prompts see each other."""
        late = (places < 0) | (places >= self._query_length() - 1)
        text = torch.arange(columns, device=places.device) >= width
        return late.unsqueeze(2) | text

    def _embed(self, tokens: Tensor) -> Tensor:
        return cast(Any, self.backbone).get_input_embeddings()(tokens)

    def _table(self) -> Tensor:
        return cast(Any, self.backbone).get_input_embeddings().weight

    def _embeddings(self, count: int) -> Tensor:
        """Embeddings (count, C) of tokens drawn at random, in float32 where the table is coarser."""
        table = self._table().detach()
        drawn = table[torch.randint(self.num_outputs, (count,)).to(table.device)]
        return drawn.to(torch.promote_types(table.dtype, torch.float32)).clone()

    def _note_frozen(self) -> None:
        # A class attribute by contract; here it depends on what is trained.
        self.__dict__["frozen"] = tuple(name for name, p in self.named_parameters() if not p.requires_grad)
