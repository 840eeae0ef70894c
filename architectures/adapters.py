"""What models with adapters share: adapters by name on a backbone that stays as it is, saved without the backbone."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from clplat.architectures.base import Architecture
from clplat.architectures.lora import LoRA, check_rank, check_targets
from clplat.streams.base import Spec
from clplat.streams.batch import Batch

FIRST = "default"
"""The adapter that a model begins with: active and trained."""
CHECKSUM = "backbone_sha256"


class AdapterLayer(Protocol):
    """A linear layer with adapters, peft's or ours."""

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict

    def set_adapter(self, adapters: list[str]) -> None: ...

    def enable_adapters(self, enabled: bool) -> None: ...


class AdapterChoice(Architecture, ABC):
    """Parts by name beside a backbone: which of them answer, and which of these are trained."""

    called: ClassVar[tuple[str, str]] = ("adapter", "adapters")
    """What one of them and several are called in errors."""

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.trained: tuple[str, ...] = ()

    @abstractmethod
    def adapter_names(self) -> list[str]:
        """Those that can be chosen."""

    @abstractmethod
    def adapter_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """The tensors of one of them; those of another have the same names."""

    @abstractmethod
    def _let_answer(self, active: Sequence[str]) -> None:
        """Let these answer, while `trained` stays as it is."""

    def use_adapters(self, active: Sequence[str], trained: Sequence[str] | None = None) -> None:
        """Which of them answer, their changes added up, and which of these are trained (None: all of them)."""
        self._check_known(active)
        chosen = tuple(active if trained is None else trained)
        if not set(chosen) <= set(active):
            raise ValueError(f"{self.called[1]} {sorted(set(chosen) - set(active))}: trained, but not active: no "
                             "gradient would reach them")  # fmt: skip
        self.active, self.trained = tuple(active), chosen
        self._let_answer(self.active)

    def resting_parameters(self) -> int:
        """Parameters of those that do not answer now."""
        resting = [name for name in self.adapter_names() if name not in self.active]
        return sum(p.numel() for name in resting for p in self.adapter_parameters(name).values())

    @contextmanager
    def answering(self, *adapters: str) -> Iterator[None]:
        """Within it others answer (none: the backbone, with what cannot be taken from it); what is trained stays so.
        Leave it before `backward`: gradient checkpointing reads layers again, with what is active then."""
        self._check_known(adapters)
        self._let_answer(adapters)
        try:
            yield
        finally:
            self._let_answer(self.active)

    def _check_known(self, names: Sequence[str]) -> None:
        if unknown := [name for name in names if name not in self.adapter_names()]:
            raise ValueError(f"{self.called[0]} {unknown[0]!r}: there is none of that name; there are "
                             f"{self.adapter_names()}")  # fmt: skip

    def _check_new(self, name: str, taken: Sequence[str]) -> None:
        if not name.isidentifier():
            raise ValueError(f"{self.called[0]} {name!r}: a name is made of letters, digits and '_'")
        if name in taken:
            raise ValueError(f"{self.called[0]} {name!r}: is there already; there are {self.adapter_names()}")


class AdapterHost(AdapterChoice, ABC):
    """A backbone, and adapters beside its layers where `lora` is given (`base.Adapters`); else all of it is trained.

    With adapters the state dict holds their tensors and the backbone's checksum (uint8, 32 bytes of SHA-256) alone:
    loading one that was made beside another backbone is a ValueError. A subclass says in `_insert` how its layers get
    an adapter, and in `takes_fused` whether those that hold several matrices may.
    """

    takes_fused: ClassVar[bool] = False

    def __init__(self, backbone: nn.Module, lora: LoRA | None, default_targets: list[str]) -> None:
        """`default_targets` are the layers with adapters where `lora` names none."""
        super().__init__()
        self.backbone, self.lora = backbone, lora
        self.targets = default_targets if lora is None or lora.targets is None else lora.targets
        self.checksum = backbone_checksum(backbone)
        if lora is None:
            return
        check_targets(backbone, self.targets, fused=self.takes_fused)
        check_rank(backbone, self.targets, lora.rank)
        leave_backbone_out(self)
        self.add_adapter(FIRST)
        self.use_adapters([FIRST])

    @abstractmethod
    def _insert(self, adapter: str) -> None:
        """Give every target one more adapter that changes nothing."""

    def adapter_names(self) -> list[str]:
        layer = next(iter(self._layers().values()), None)
        return [] if layer is None else list(layer.lora_A)

    def adapter_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """The tensors of one adapter; those of another have the same names."""
        self._check_known([adapter])
        named: dict[str, nn.Parameter] = {}
        for path, layer in self._layers().items():
            for part, adapters in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                named[f"{path}.{part}"] = cast(nn.Linear, adapters[adapter]).weight
        return named

    def add_adapter(self, adapter: str) -> None:
        """One more that changes nothing yet, neither active nor trained. Draws from torch's global random source."""
        if self.lora is None:
            raise ValueError(f"{type(self).__name__}.lora: all weights are trained; give lora options for adapters")
        self._check_new(adapter, self.adapter_names())
        self._insert(adapter)
        self._let_answer(self.active)

    def structure(self) -> Mapping[str, Any]:
        if self.lora is None:
            return {}
        return {"adapters": self.adapter_names(), "active": list(self.active), "trained": list(self.trained)}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        if self.lora is None or not structure:
            super().restructure(structure)
            return
        with torch.random.fork_rng(devices=[]):
            for adapter in structure["adapters"]:
                if adapter not in self.adapter_names():
                    self.add_adapter(adapter)
        self.use_adapters(structure["active"], structure["trained"])
        # What came later goes: a copy of the model, made to be as it was after an earlier task, has it.
        for adapter in set(self.adapter_names()) - set(structure["adapters"]):
            for layer in self._layers().values():
                del layer.lora_A[adapter], layer.lora_B[adapter]

    def facts(self) -> Mapping[str, str]:
        return {"backbone_sha256": self.checksum}

    def _layers(self) -> dict[str, AdapterLayer]:
        """The layers with adapters, by their path in the backbone."""
        found = ((path, module) for path, module in self.backbone.named_modules() if hasattr(module, "lora_A"))
        return {path: cast(AdapterLayer, module) for path, module in found}

    def _let_answer(self, active: Sequence[str]) -> None:
        """Let these adapters answer, and gradients reach the trained ones alone: peft moves both at once, and would
        leave the trained ones without a gradient when others have answered last."""
        for layer in self._layers().values():
            layer.enable_adapters(bool(active))
            layer.set_adapter(list(active))
            for adapters in (layer.lora_A, layer.lora_B):
                for name, part in adapters.items():
                    part.requires_grad_(name in self.trained)
        # A class attribute by contract; here it depends on what is trained.
        self.__dict__["frozen"] = tuple(name for name, p in self.named_parameters() if not p.requires_grad)


class OnBackbone(Protocol):
    """A module whose `backbone` is frozen, with parts beside its layers."""

    backbone: nn.Module
    checksum: str


def leave_backbone_out(host: nn.Module) -> None:
    """Freeze the backbone of a host (`OnBackbone`), and let its state hold the other tensors and the checksum alone."""
    checksum = cast(OnBackbone, host).checksum
    host.register_buffer(CHECKSUM, torch.tensor(list(bytes.fromhex(checksum)), dtype=torch.uint8))
    host.register_state_dict_post_hook(_leave_out_backbone)
    host.register_load_state_dict_pre_hook(_check_backbone)
    host.register_load_state_dict_post_hook(_expect_no_backbone)
    cast(OnBackbone, host).backbone.requires_grad_(False)


def check_may_be_backbone(backbone: Architecture, spec: Spec, parts: str) -> None:
    """ValueError for a model beside which such parts cannot stand: no language model, or one that changes itself."""
    name = type(backbone).__name__
    if backbone.causal is not True or spec.kind != "language":
        raise ValueError(f"model: {name} is no causal language model, or the stream no text; {parts} need both")
    for hook in ("task_start", "step_end"):
        if getattr(type(backbone), hook) is not getattr(Architecture, hook):
            raise ValueError(f"model: {name} changes itself while it is trained ({hook}), and a backbone does not")


@torch.no_grad()
def not_called(backbone: Architecture, layers: Mapping[str, nn.Module], length: int) -> list[str]:
    """Those layers, by name, that a row of `length` tokens does not call: what stands beside them would do nothing."""
    silent = set(layers)

    def called(name: str) -> Callable[..., None]:
        return lambda *_: silent.discard(name)

    hooks = [layer.register_forward_hook(called(name)) for name, layer in layers.items()]
    tokens = torch.zeros(1, length, dtype=torch.long)
    with torch.random.fork_rng(devices=[]):
        backbone(Batch(inputs=tokens, targets=tokens))
    for hook in hooks:
        hook.remove()
    return sorted(silent)


def backbone_checksum(backbone: nn.Module) -> str:
    """SHA-256 (hex) over name, dtype, shape and bytes of every tensor that is no adapter's or side memory's, in order
    of names."""
    state = hashlib.sha256()
    tensors = {_plain(name): tensor for name, tensor in backbone.state_dict().items() if not _of_adapter(name)}
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def _plain(name: str) -> str:
    """The name that a tensor has without adapters or memories beside its layer."""
    return name.replace(".base_layer.", ".").replace(".base_ffn.", ".")


def _of_adapter(name: str) -> bool:
    return any(part in name for part in (".lora_A.", ".lora_B.", ".side_banks."))


def _of_backbone(name: str, prefix: str = "") -> bool:
    return name.startswith(f"{prefix}backbone.") and not _of_adapter(name)


def _leave_out_backbone(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if _of_backbone(name, prefix)]:
        del state[name]


def _check_backbone(module: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    saved, own = state.get(f"{prefix}{CHECKSUM}"), cast(OnBackbone, module).checksum
    found = "no checksum" if saved is None else bytes(saved.tolist()).hex()
    if found != own:
        raise ValueError(
            f"{type(module).__name__}: these adapters were trained beside another backbone ({found[:16]}, and this one "
            f"is {own[:16]}); bring back the model and its revision, or start a new run"
        )


def _expect_no_backbone(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if "backbone." not in name or _of_adapter(name)]
