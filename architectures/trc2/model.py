"""TRC²: a decoder of cortical columns with a thalamic loop from each column to the next, and a hippocampal loop.

    H = embedding(x);  Z = 0;  F_hip = 0
    for l in 1..L:   H = column_l(H, Z + F_hip)      queries of the column are modulated; column 1 gets no signal
                     Z = thalamus_l(H)
                     F_hip = hippocampus(H)          once, behind column l_inj; later columns all get the same
    logits = norm(H) · embeddingᵀ

Rows of replay pass the columns alone (`replay_path`). The store is read in the forward pass and written when an
optimizer step is done, from the rows of that step: a read never sees its own future. It lives for the run, in
registered buffers.

Shapes: B rows, T tokens, C hidden size, V vocabulary, N slots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.base import Architecture, Output, State, StepOutcome
from clplat.architectures.layers import causal_document_mask, rotary_angles
from clplat.architectures.mixture_of_experts import idle_weights
from clplat.architectures.option_checks import check_choices, check_dropout, check_sizes
from clplat.architectures.trc2.column import Column, num_heads
from clplat.architectures.trc2.hippocampus import Hippocampus
from clplat.architectures.trc2.options import (
    ColumnOptions,
    HippocampusOptions,
    ReplayPath,
    ThalamusOptions,
    WriteOptions,
)
from clplat.architectures.trc2.reading import Passed, Reading, added, goes_on, only, places_in_documents
from clplat.architectures.trc2.store import Experience, Store
from clplat.architectures.trc2.thalamus import Thalamus
from clplat.architectures.trc2.wiring import Wiring
from clplat.streams.base import Spec
from clplat.streams.batch import CURRENT, IGNORE, Batch


class TRC2(Architecture):
    """Thalamically routed cortical columns: tokens (B, T) to logits (B, T, V), with an episodic store."""

    causal = True
    paper = "Thalamically Routed Cortical Columns, arXiv:2602.22479 (v2 to v5)"
    fidelity = "mechanism"

    def __init__(
        self,
        *,
        spec: Spec,
        hidden_size: int = 256,
        num_layers: int = 4,
        column: ColumnOptions | None = None,
        thalamus: ThalamusOptions | None = None,
        hippocampus: HippocampusOptions | None = None,
        write: WriteOptions | None = None,
        replay_path: ReplayPath = "bare",
        dropout: float = 0.1,
        document_mask: bool = True,
    ) -> None:
        """`num_layers` columns. The four groups of options are described in `options.py`. `replay_path`: replayed rows
        pass the columns alone (`bare`), with the thalamic signal, or as current rows do (`full`); they are never
        written into the store. `dropout` acts on the embedding and on what each layer adds. `document_mask` keeps the
        documents of one row from seeing each other, where the stream marks them.
        """
        super().__init__()
        self.column_options, self.thalamus_options = column or ColumnOptions(), thalamus or ThalamusOptions()
        self.hippocampus_options, self.write_options = hippocampus or HippocampusOptions(), write or WriteOptions()
        self.replay_path, self.document_mask, self.row_length = replay_path, document_mask, spec.input_shape[0]
        if spec.kind != "language":
            raise ValueError(f"TRC2: predicts the next token of rows, but the stream is of kind {spec.kind!r}")
        check_sizes("TRC2", hidden_size=hidden_size, num_layers=num_layers)
        check_dropout("TRC2", dropout)
        check_choices(self, replay_path=ReplayPath)
        self.wiring = Wiring(
            num_layers=num_layers,
            hidden_size=hidden_size,
            thalamus=self.thalamus_options,
            hippocampus=self.hippocampus_options,
        )
        self.wiring.check(self.write_options)
        # Columns first, so that models with and without loops draw the same ones from one seed.
        self._build_columns(spec.num_outputs, dropout)
        self._build_loops()

    def _build_columns(self, vocab_size: int, dropout: float) -> None:
        width, options = self.wiring.hidden_size, self.column_options
        heads = num_heads(width, options)
        self.head_size, self.num_kv_heads = width // heads, heads // options.heads_per_kv
        self.embedding = nn.Embedding(vocab_size, width)
        self.dropout = nn.Dropout(dropout)
        modulation = self.thalamus_options.modulation
        self.columns = nn.ModuleList(
            Column(
                hidden_size=width,
                options=options,
                dropout=dropout,
                modulation=modulation if self.wiring.is_modulated(number) else None,
            )
            for number in self.wiring.numbers
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self._initialise()

    def _build_loops(self) -> None:
        width, options = self.wiring.hidden_size, self.hippocampus_options
        relayed = (number for number in self.wiring.numbers if self.wiring.is_relayed(number))
        self.routers = nn.ModuleDict(
            {str(number): Thalamus(hidden_size=width, options=self.thalamus_options) for number in relayed}
        )
        self.hippocampus: Hippocampus | None = None
        self.store: Store | None = None
        if options.read:
            self.hippocampus = Hippocampus(hidden_size=width, options=options, surprised=self.wiring.surprises)
            self.store = Store(
                hidden_size=width, slots=options.slots, parts=self.wiring.parts, options=self.write_options
            )
            # A class attribute by contract; which parameters get no gradient depends on the options.
            untaught = ("hippocampus.key", "hippocampus.value") if options.stored == "projected" else ()
            self.__dict__["frozen"] = ("store.", *untaught)

    def _initialise(self) -> None:
        """Normal 0.02, and less for layers that add to the residual stream (Radford et al. 2019, GPT-2). What modulates
        queries stays zero."""
        for name, weight in self.named_parameters():
            if weight.ndim > 1 and ".modulation." not in name:
                adds = name.endswith(("attention.out.weight", "mlp.down", "mlp.down.weight", "shared.down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * self.wiring.num_layers) if adds else 0.02)

    def forward(self, batch: Batch, state: State = None, return_hidden: str | None = None) -> Output:
        """Logits (B, T, V); `hidden` (B, T, C) is the input of the head.

        With `state`, every row continues after all the tokens it holds, and the state after them is returned.
        """
        if state is not None:
            return self._continue(batch, state)
        tokens, segments = batch.inputs, batch.segment_ids if self.document_mask else None
        places = torch.arange(tokens.shape[1], device=tokens.device)
        mask = None if segments is None else causal_document_mask(segments)
        several = mask is not None
        passed = self._through(
            tokens,
            Reading(
                position=places_in_documents(segments) if segments is not None and several else places,
                several=several,
                angles=rotary_angles(places, self.head_size, self.column_options.rope_base),
                mask=mask,
                current=None if batch.origin is None else batch.origin == CURRENT,
            ),
        )
        hidden = self.norm(passed.x)
        logits = F.linear(hidden, self.embedding.weight)
        return Output(logits=logits, losses=passed.losses, hidden=hidden, stash=passed.stash)

    def _through(self, tokens: Tensor, reading: Reading) -> Passed:
        """All columns with both loops."""
        passed = Passed(x=self.dropout(self.embedding(tokens)), losses={}, stash={}, caches=[], traces={})
        signal = feedback = surprise = None
        for number, column in enumerate(self.columns, start=1):
            cache = None if reading.caches is None else reading.caches[number - 1]
            passed.x, balance, cache = column(
                passed.x, added(signal, feedback), reading.angles, reading.mask, cache, reading.places
            )
            passed.caches.append(cache)
            if balance is not None:
                passed.lose({"balance": balance})
            signal = surprise = None
            if str(number) in self.routers:
                signal, surprise = self._relay(str(number), passed, reading)
            if self.hippocampus is not None and number == self.wiring.after_column:
                feedback = self._recall(passed, reading, surprise)
        return passed

    def _relay(self, name: str, passed: Passed, reading: Reading) -> tuple[Tensor, Tensor | None]:
        """A router's signal, which replayed rows may not get, and its surprise."""
        before = None if reading.traces is None else reading.traces[name]
        kept = reading.current if self.replay_path == "bare" else None
        relay = self.routers[name](passed.x, reading.position, several=reading.several, before=before, kept=kept)
        passed.lose(relay.losses)
        passed.traces[name] = relay.trace
        return only(relay.signal, kept), relay.surprise

    def _recall(self, passed: Passed, reading: Reading, surprise: Tensor | None) -> Tensor | None:
        """F_hip for later columns; None where it went into the stream."""
        assert self.hippocampus is not None and self.store is not None
        content, used = self.store.content, self.store.used
        writes = self.training and self.write_options.signal != "none"
        if writes and self.write_options.delay == "immediate":
            content, used = self.store.with_pieces_of(passed.x.detach(), reading.current, self.hippocampus.parts)
        recall = self.hippocampus(passed.x, content, used, surprise)
        if writes:
            passed.stash = {"hidden": passed.x.detach(), "mass": recall.mass[:, : len(self.store.content)]}
        feedback = only(recall.feedback, None if self.replay_path == "full" else reading.current)
        if self.wiring.feeds_queries:
            return feedback
        passed.x = passed.x + feedback
        return None

    def step_end(self, outcome: StepOutcome) -> None:
        """The delayed write. Replayed rows leave nothing."""
        if self.hippocampus is None or self.store is None or self.write_options.signal == "none":
            return
        batch, stash = outcome.batch, outcome.output.stash
        if not stash:
            raise ValueError(
                "TRC2.write: the step's output is not one of this model's in training, so there is nothing to write; a "
                "strategy that takes the step itself must return such a one, or set write.signal to none"
            )
        counted, mass = batch.targets != IGNORE, stash["mass"]
        if batch.origin is not None:
            current = batch.origin == CURRENT
            counted, mass = counted & current.unsqueeze(1), mass * current.unsqueeze(1)
        loss, follows = outcome.row_loss(), goes_on(batch)
        seen = Experience(hidden=stash["hidden"], loss=loss, counted=counted, follows=follows, mass=mass.sum(0))
        self.store.flush(seen, step=outcome.step, parts=self.hippocampus.parts)

    def init_state(self, batch_size: int) -> dict[str, Any]:
        """Nothing read: empty caches and traces; `base` counts the tokens that rows held before the last call."""
        weight = self.embedding.weight
        empty = weight.new_empty(batch_size, 0, self.num_kv_heads, self.head_size)
        traces = {name: router.empty_trace(weight[:1].expand(batch_size, -1)) for name, router in self.routers.items()}
        base = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
        return {"caches": [(empty, empty) for _ in self.columns], "traces": traces, "base": base}

    def decode(self, tokens: Tensor, state: dict[str, Any], lengths: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Logits (B, T, V) of `tokens` (B, T), which follow the `lengths` (B,) tokens that each row has in `state`.

        Rows of unequal length are padded on the right; what follows is written over a row's padding.
        """
        hidden, state = self._read(tokens, state, lengths)
        return F.linear(hidden, self.embedding.weight), state

    def _read(self, tokens: Tensor, state: dict[str, Any], lengths: Tensor) -> tuple[Tensor, dict[str, Any]]:
        places = lengths.unsqueeze(1) + torch.arange(tokens.shape[1], device=tokens.device)
        columns = torch.arange(state["caches"][0][0].shape[1] + tokens.shape[1], device=tokens.device)
        # A trace holds what was known after each token of the last call; a row's padding there is passed over.
        taken, rows = lengths - state["base"], torch.arange(len(tokens), device=tokens.device)
        traces = {
            name: {part: values[rows, taken].unsqueeze(1) for part, values in trace.items()}
            for name, trace in state["traces"].items()
        }
        passed = self._through(
            tokens,
            Reading(
                position=places,
                several=False,
                angles=rotary_angles(places, self.head_size, self.column_options.rope_base),
                mask=(columns <= places.unsqueeze(-1)).unsqueeze(1),
                caches=state["caches"],
                traces=traces,
                places=places,
            ),
        )
        return self.norm(passed.x), {"caches": passed.caches, "traces": passed.traces, "base": lengths}

    def _continue(self, batch: Batch, state: dict[str, Any]) -> Output:
        if self.document_mask and batch.segment_ids is not None:
            raise ValueError("TRC2.document_mask: a carried state does not know documents; pass no segment_ids")
        lengths = torch.full_like(batch.inputs[:, 0], state["caches"][0][0].shape[1])
        hidden, state = self._read(batch.inputs, state, lengths)
        return Output(logits=F.linear(hidden, self.embedding.weight), state=state, hidden=hidden)

    def measurements(self) -> Mapping[str, float]:
        """How full and how used the store is, and how much of it comes back."""
        if self.store is None or self.hippocampus is None:
            return {}
        used = self.store.used
        return {
            "store_used": float(used.double().mean()),
            "store_megabytes": self.store.content.nbytes / 1e6,
            "store_utility": float((self.store.utility * used).sum() / used.sum().clamp(min=1)),
            "feedback_strength": float(self.hippocampus.strength.detach().sigmoid()),
            "leaks_its_future": float(self.write_options.delay == "immediate"),
        }

    def flops_per_row(self) -> float:
        """Forward operations for a row of T tokens: 2 per weight and token that passes it, 4·C for every pair that
        attention compares and mixes, and 4·C for every token and slot. The delayed write is not counted."""
        passed = sum(p.numel() for name, p in self.named_parameters() if p.ndim > 1 and self._meets_tokens(name))
        tokens, width = self.row_length, self.wiring.hidden_size
        slots = 0 if self.store is None else len(self.store.content)
        attention = 2.0 * self.wiring.num_layers * width * tokens * (tokens + 1)
        return 2.0 * tokens * (passed - idle_weights(self)) + attention + 4.0 * tokens * slots * width

    def active_parameters(self) -> int:
        kept = sum(p.numel() for name, p in self.named_parameters() if not name.startswith("store."))
        return kept - idle_weights(self)

    def _meets_tokens(self, name: str) -> bool:
        """Critics are not in the forward pass; the projections of slots meet slots, once a batch."""
        return not name.startswith(("store.", "hippocampus.key", "hippocampus.value"))
