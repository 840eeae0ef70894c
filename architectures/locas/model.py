"""A frozen language model with Locas memories beside its feed-forward layers.

    clplat run pretrained/book_tiny      # reads a book, and is scored on every chunk before it learns it

The memories are adapters (`base.Adapters`): named, active or not, trained or not. What only they can do is in
`base.SideMemories`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from clplat.architectures.adapters import (
    FIRST,
    AdapterChoice,
    AdapterHost,
    backbone_checksum,
    check_may_be_backbone,
    leave_backbone_out,
    not_called,
)
from clplat.architectures.base import Architecture, Decodes, Output, State, StepOutcome
from clplat.architectures.locas.feed_forward import feed_forwards
from clplat.architectures.locas.memory import Bank, SidewayFFN
from clplat.architectures.locas.options import CLONES, SideMemory
from clplat.architectures.locas.writing import clone, write_gradients
from clplat.streams.base import Spec
from clplat.streams.batch import Batch


class LocasModel(AdapterChoice):
    """A causal language model that stays as it is, and memories of few slots that are trained beside it."""

    called = ("memory", "memories")
    causal = True
    paper = "Lu et al. 2026, arXiv:2602.05085"
    fidelity = "interpretation"

    def __init__(self, *, spec: Spec, model: Callable[[Spec], Architecture], memory: SideMemory | None = None) -> None:
        """`model` is an architecture as a component: `Pretrained` without `lora`, or one of this repository whose
        feed-forward layers are `SwiGLU` (`Adapted` brings trained weights for low-rank adapters, not for memories).
        State and checkpoints hold the memories and the checksum of the rest."""
        super().__init__()
        # By keyword, which is how components take it.
        backbone, self.memory = model(spec=spec), memory or SideMemory()  # type: ignore[call-arg]
        check_may_be_backbone(backbone, spec, "memories")
        if isinstance(backbone, AdapterHost) and backbone.lora is not None:
            raise ValueError(f"model: {type(backbone).__name__} has low-rank adapters; leave out its lora, and let "
                             "memories stand alone")  # fmt: skip
        layers = feed_forwards(backbone)
        self.backbone, self.checksum = backbone, backbone_checksum(backbone)
        leave_backbone_out(self)
        for path, layer in layers.items():
            holder, _, name = path.rpartition(".")
            setattr(backbone.get_submodule(holder), name, SidewayFFN(layer))
        gated = next(iter(self.sideways().values())).view().gated
        if gated and self.memory.start == "gradient":
            raise ValueError(f"memory.start: gradient writes into layers without a gate, and those of "
                             f"{type(backbone).__name__} have one; use clone")  # fmt: skip
        for side in self.sideways().values():
            self.memory.check_room(*side.view().keys().shape)
        self.permanent: tuple[str, ...] = ()
        self.add_adapter(FIRST)
        self.use_adapters([FIRST])
        if silent := not_called(backbone, self.sideways(), min(8, spec.input_shape[0])):
            raise ValueError(f"model: {type(backbone).__name__} does not call {silent[0]}, so that a memory beside it "
                             "would do nothing; choose another model")  # fmt: skip

    @property
    def needs_beginning(self) -> bool:
        return self.memory.start != "gaussian"

    def sideways(self) -> dict[str, SidewayFFN]:
        """The layers with memories, by their path in the backbone."""
        return {path: m for path, m in self.backbone.named_modules() if isinstance(m, SidewayFFN)}

    def forward(self, batch: Batch, state: State = None, return_hidden: str | None = None) -> Output:
        return self.backbone(batch, state, return_hidden)

    def init_state(self, batch_size: int) -> State:
        return self.backbone.init_state(batch_size)

    def decode(self, tokens: Tensor, state: State, lengths: Tensor) -> tuple[Tensor, State]:
        """As the backbone decodes; ValueError where it does not."""
        if not isinstance(self.backbone, Decodes):
            raise ValueError(f"LocasModel.model: {type(self.backbone).__name__} does not decode step by step")
        return self.backbone.decode(tokens, state, lengths)

    def step_end(self, outcome: StepOutcome) -> None:
        """Rows longer than 1 go back to 1."""
        if self.memory.clip:
            for bank in self._banks(self.trained):
                bank.clip()

    def adapter_names(self) -> list[str]:
        """The memories that can be taken away; permanent ones cannot."""
        names = list(next(iter(self.sideways().values())).side_banks)
        return [name for name in names if name not in self.permanent]

    def adapter_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """The tensors of one memory; those of another have the same names."""
        self._check_known([adapter])
        return {f"{path}.{name}": tensor for path, side in self.sideways().items()
                for name, tensor in side.bank(adapter).named_parameters()}  # fmt: skip

    def add_adapter(self, adapter: str) -> None:
        """One more memory that changes nothing yet. Draws from torch's global random source."""
        self._check_new(adapter, (*self.permanent, *self.adapter_names()))
        for side in self.sideways().values():
            view, rank = side.view(), self.memory.rank
            made = Bank(
                rank, view.keys().shape[1], gated=view.gated, scale=self.memory.factor(side.value_norm, rank),
                like=view.keys(),
            )  # fmt: skip
            side.side_banks[adapter] = made.requires_grad_(False)

    def use_adapters(self, active: Sequence[str], trained: Sequence[str] | None = None) -> None:
        super().use_adapters(active, trained)
        for side in self.sideways().values():
            side.permanent = list(self.permanent)
            for name, bank in side.side_banks.items():
                bank.requires_grad_(name in self.trained)
        # A class attribute by contract; here it depends on what is trained.
        self.__dict__["frozen"] = tuple(name for name, p in self.named_parameters() if not p.requires_grad)

    def writes_memory(self) -> bool:
        """Memories are added as a run goes on."""
        return True

    def without_writes(self) -> AbstractContextManager[None]:
        """Within it no memory answers, as if nothing had been written."""
        return self.answering()

    def begin_memory(self, memory: str, batch: Batch, generator: torch.Generator) -> None:
        """What `memory.start` says, from one batch; `gaussian` memories are begun as they were added."""
        self._check_known([memory])
        training = self.training
        self.eval()
        if self.memory.start in CLONES:
            clone(self.sideways(), memory, self.backbone, batch, self.memory.start, generator)
        elif self.memory.start == "gradient":
            write_gradients(self.sideways(), memory, self.backbone, batch, self.memory)
        self.train(training)

    @torch.no_grad()
    def forget_memory(self, memory: str) -> None:
        """Values 0 again."""
        self._check_known([memory])
        for bank in self._banks([memory]):
            bank.V.zero_()

    def make_permanent(self, memory: str) -> None:
        """The memory answers from now on in every view, frozen, and goes by no name that can be switched. `dense` makes
        it rows of the layers' own matrices; until then it is computed beside them, so that its float32 rows and the
        backbone's checksum stay as they are."""
        self._check_known([memory])
        active = [name for name in self.active if name != memory]
        self.permanent = (*self.permanent, memory)
        self.use_adapters(active, [name for name in self.trained if name != memory])

    def structure(self) -> Mapping[str, Any]:
        return {"memories": self.adapter_names(), "permanent": list(self.permanent), "active": list(self.active),
                "trained": list(self.trained)}  # fmt: skip

    def restructure(self, structure: Mapping[str, Any]) -> None:
        with torch.random.fork_rng(devices=[]):
            for memory in (*structure["permanent"], *structure["memories"]):
                if memory not in (*self.permanent, *self.adapter_names()):
                    self.add_adapter(memory)
        self.permanent = tuple(structure["permanent"])
        self.use_adapters(structure["active"], structure["trained"])
        for memory in set(self.adapter_names()) - set(structure["memories"]):
            for side in self.sideways().values():
                del side.side_banks[memory]

    def measurements(self) -> Mapping[str, float]:
        """How much has been written: the mean norm of values, of all layers and slots, and the numbers a memory has."""
        banks = self._banks((*self.permanent, *self.active))
        norms = [float(bank.V.detach().norm(dim=1).mean()) for bank in banks]
        return {"memory_value_norm": sum(norms) / max(1, len(norms)),
                "memory_parameters": float(sum(p.numel() for bank in banks for p in bank.parameters()))}  # fmt: skip

    def facts(self) -> Mapping[str, str]:
        return {"backbone_sha256": self.checksum, "model": type(self.backbone).__name__, **self.backbone.facts()}

    def flops_per_row(self) -> float:
        """The backbone's, which counts the memories among its weights."""
        return self.backbone.flops_per_row()

    def active_parameters(self) -> int:
        return self.backbone.active_parameters() - self.resting_parameters()

    def _banks(self, names: Sequence[str]) -> list[Bank]:
        return [side.bank(name) for side in self.sideways().values() for name in names]

    def _let_answer(self, names: Sequence[str]) -> None:
        for side in self.sideways().values():
            side.active = list(names)
