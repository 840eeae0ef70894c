"""Models that are meant for `training.compile: cudagraphs`, small, and a step of them: on any device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from clplat.architectures.associative_memory.presets import GatedDeltaNet, LayerKind, TitansLMM
from clplat.architectures.base import Architecture, StepOutcome
from clplat.architectures.continuum_memory.options import CMSLevel
from clplat.architectures.hope.model import Hope
from clplat.architectures.hope.presets import SelfModifyingTitans
from clplat.architectures.mamba import Mamba
from clplat.architectures.memory_transformer import MemoryTransformer
from clplat.architectures.transformer import Transformer
from clplat.architectures.trc2.model import TRC2
from clplat.architectures.trc2.options import ColumnOptions, HippocampusOptions
from clplat.compilation import answerer
from clplat.objective import Objective
from clplat.recording import Recorded
from clplat.streams.base import Spec
from clplat.streams.batch import CURRENT, REPLAY, Batch

TOKENS, VOCABULARY, WIDTH = 20, 19, 32
SPEC = Spec(kind="language", input_shape=(TOKENS,), num_outputs=VOCABULARY)


def of(layer: LayerKind, dropout: float = 0.0) -> MemoryTransformer:
    """A decoder of one layer."""
    return MemoryTransformer(spec=SPEC, hidden_size=WIDTH, layers=[layer], dropout=dropout)


MODELS: dict[str, Callable[[], Architecture]] = {
    "Titans, depth 2": lambda: of(TitansLMM(num_heads=2, chunk=8)),
    "Titans, depth 4": lambda: of(TitansLMM(num_heads=2, chunk=8, depth=4, expand=1)),
    "self-modifying, depth 1": lambda: of(SelfModifyingTitans(num_heads=2, chunk=8, generator_chunk=8, depth=1)),
    "self-modifying, depth 2": lambda: of(SelfModifyingTitans(num_heads=2, chunk=8, generator_chunk=4, depth=2)),
    "GatedDeltaNet": lambda: of(GatedDeltaNet(num_heads=2, chunk=8)),
    "Hope": lambda: Hope(
        spec=SPEC, hidden_size=WIDTH, num_layers=1, layer=SelfModifyingTitans(num_heads=2, chunk=8, generator_chunk=8),
        levels=[CMSLevel(period=1), CMSLevel(period=4), CMSLevel(period=8, clock="token")],
    ),
    "Transformer": lambda: Transformer(spec=SPEC, hidden_size=WIDTH, num_layers=1, num_heads=2),
    "TRC2": lambda: TRC2(
        spec=SPEC, hidden_size=WIDTH, num_layers=2, column=ColumnOptions(num_heads=2, heads_per_kv=2, inner_size=8),
        hippocampus=HippocampusOptions(slots=32, k_read=4), dropout=0.0,
    ),
    "Mamba": lambda: Mamba(spec=SPEC, hidden_size=WIDTH, num_layers=1, state_size=4),
}  # fmt: skip


def rows(count: int, device: torch.device | str, *, mixed: bool = False, seed: int = 0) -> Batch:
    """Rows of random tokens; `mixed`: with half as many replayed ones behind them."""
    drawn = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (count, TOKENS + 1), generator=drawn)
    batch = Batch(inputs=tokens[:, :-1].contiguous(), targets=tokens[:, 1:].contiguous())
    if mixed:
        batch = batch.with_origin(CURRENT).joined(batch.rows(slice(count // 2)).with_origin(REPLAY, 0.5))
    return batch.to(device)


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a course of training gave."""

    losses: Tensor
    weights: dict[str, Tensor]
    seconds: list[float]
    """Of each step."""

    def seconds_a_step(self) -> float:
        """The median of its second half."""
        return statistics.median(self.seconds[len(self.seconds) // 2 :])


def trained(
    model: Architecture, batches: Sequence[Batch], *, recorded: bool,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer], dtype: torch.dtype | None = None,
) -> Course:  # fmt: skip
    """Steps as the learner takes them; `dtype` of mixed precision."""
    device, objective = batches[0].inputs.device, Objective(SPEC, [])
    torch.manual_seed(0)
    model, chosen = model.to(device).train(), optimizer(list(model.parameters()))
    plain = answerer(model, objective.to(device), None, with_inputs=False, open_logits=False)
    answer, losses, seconds = Recorded(plain, model) if recorded else plain, [], []
    for number, batch in enumerate(batches):
        begun = time.perf_counter()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False):
            _, output, parts = answer(batch, None)
            loss = torch.stack([parts.sum(), *output.losses.values()]).sum()
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        chosen.step()
        chosen.zero_grad()
        losses.append(loss.detach().clone())
        row_loss = objective.row_loss(output, batch).detach()
        model.step_end(
            StepOutcome(step=number + 1, batch=batch, output=output, row_loss=partial(Tensor.clone, row_loss))
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return Course(losses=torch.stack(losses), weights=dict(model.state_dict()), seconds=seconds)
