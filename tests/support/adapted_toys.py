"""The toy stream's text, read by small frozen models with adapters: ours, and one of transformers with peft's."""

from __future__ import annotations

from pathlib import Path

import torch
from small_models import model_folder

from clplat.architectures.adapted import Adapted
from clplat.architectures.adapters import AdapterHost
from clplat.architectures.base import Architecture
from clplat.architectures.locas import LocasModel
from clplat.architectures.locas.options import SideMemory
from clplat.architectures.lora import LoRA
from clplat.architectures.pretrained.model import Pretrained
from clplat.architectures.pretrained.prompted import Prompted
from clplat.architectures.transformer import Transformer
from clplat.objective import Objective
from clplat.strategies.base import Strategy
from clplat.strategies.toy_run import VOCABULARY, ToyRun
from clplat.streams.base import Spec

RANK = 2


def toy_folder(parent: Path) -> Path:
    """A Llama for the toy stream's vocabulary."""
    return model_folder(parent, "llama", vocab_size=VOCABULARY)


def ours(spec: Spec, dropout: float = 0.0) -> AdapterHost:
    """A frozen Transformer of ours with adapters, always from the same draw."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Adapted(spec=spec, model=small_transformer, lora=LoRA(rank=RANK, alpha=RANK, dropout=dropout))


def theirs(folder: Path, spec: Spec) -> AdapterHost:
    """A frozen Llama with peft's adapters, always from the same draw."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Pretrained(spec=spec, name=str(folder), lora=LoRA(rank=RANK, alpha=RANK, dropout=0.0))


def prompted(folder: Path, spec: Spec) -> Prompted:
    """A frozen Llama that takes prompts."""
    return Prompted(spec=spec, name=str(folder))


def remembering(spec: Spec) -> LocasModel:
    """A frozen Transformer of ours with memories, always from the same draw."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LocasModel(spec=spec, model=small_transformer, memory=SideMemory(rank=RANK))


def adapted_run(*strategies: Strategy, model: AdapterHost | None = None) -> ToyRun:
    """A toy run on text with adapters."""
    return ToyRun(list(strategies), Objective, "language", model=ours if model is None else lambda _: model)


def small_transformer(spec: Spec) -> Architecture:
    return Transformer(spec=spec, hidden_size=8, num_layers=2, num_heads=2, initial_std=0.3, tie_head=False)
