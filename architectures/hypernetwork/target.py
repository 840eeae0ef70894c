"""A module whose weights come from outside, as one flat vector: the network that answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clplat.architectures.base import Architecture, Output
from clplat.streams.batch import Batch

CONSTANT_SCALE = 0.1
"""Standard deviation for tensors that begin as a constant (the scale and shift of a BatchNorm): our choice."""


class Target(nn.Module):
    """Any architecture without weights of its own, applied by `torch.func.functional_call`.

    Its trainable parameters are taken out in the order in which the module names them, which is the order of layers in
    all modules here; parameters that it freezes itself stay. Saved buffers (running statistics of BatchNorm) are kept
    once for each task. `lengths`, `offset` and `deviation` say how the module's own initialisation draws each tensor:
    its number of weights, their mean where they are all equal and 0 otherwise, and their standard deviation.
    """

    def __init__(self, model: Architecture) -> None:
        """Takes `model` over: it is of no use by itself afterwards."""
        super().__init__()
        self.flops = model.flops_per_row()
        named = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
        owners: dict[nn.Parameter, str] = {}
        for name, parameter in named:
            owners.setdefault(parameter, name)
        self.shapes = {name: parameter.shape for parameter, name in owners.items()}
        # Tied parameters are generated once and answer to all their names.
        self.owners = {name: owners[parameter] for name, parameter in named}
        self.lengths = [parameter.numel() for parameter in owners]
        self.offset, self.deviation = zip(*(_offset_and_deviation(parameter.detach()) for parameter in owners))
        self.statistics = self._take_buffers(model)
        for name, parameter in named:
            module, leaf = _place(model, name)
            del module._parameters[leaf]
            # What functional_call puts the generated tensor in place of.
            module.register_buffer(leaf, torch.empty_like(parameter, requires_grad=False), persistent=False)
        self.model = model

    @property
    def num_weights(self) -> int:
        return sum(self.lengths)

    def answer(
        self, weights_W: Tensor, statistics: Mapping[str, Tensor], batch: Batch, return_hidden: str | None = None
    ) -> Output:
        """The module's output with these weights and buffers; the buffers change where the module changes its own."""
        parts = weights_W.split(self.lengths)
        tensors = {name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)}
        named = {name: tensors[owner] for name, owner in self.owners.items()}
        return functional_call(self.model, {**named, **statistics}, (batch, None, return_hidden), tie_weights=False)

    def of_tasks(self, rows: Tensor | None = None) -> dict[str, Tensor]:
        """Buffers of the tasks `rows` (long), or of all, by the module's names, stacked over tasks."""
        kept = {name: self.get_buffer(own) for name, own in self.statistics.items()}
        return kept if rows is None else {name: tensor[rows] for name, tensor in kept.items()}

    def keep(self, row: Tensor, statistics: Mapping[str, Tensor]) -> None:
        """Write the buffers of one task back; `row` (1,)."""
        for name, own in self.statistics.items():
            self.get_buffer(own).index_copy_(0, row, statistics[name].detach().unsqueeze(0))

    def grow(self, num_tasks: int) -> None:
        """Buffers for `num_tasks` tasks, as the module begins with for those that are new."""
        for name, own in self.statistics.items():
            kept, first = self.get_buffer(own), self.model.get_buffer(name)
            fresh = first.expand(num_tasks - len(kept), *first.shape)
            setattr(self, own, torch.cat([kept, fresh.to(kept)]))

    def _take_buffers(self, model: nn.Module) -> dict[str, str]:
        """Names of the saved buffers, and those under which this module keeps them for every task."""
        names = [name for name in model.state_dict() if name in dict(model.named_buffers())]
        for number, name in enumerate(names):
            module, leaf = _place(model, name)
            self.register_buffer(f"statistics_{number}", getattr(module, leaf).clone().unsqueeze(0))
            module._non_persistent_buffers_set.add(leaf)
        return {name: f"statistics_{number}" for number, name in enumerate(names)}


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _offset_and_deviation(tensor: Tensor) -> tuple[float, float]:
    first = tensor.flatten()[0]
    if bool((tensor == first).all()):
        return float(first), CONSTANT_SCALE
    return 0.0, float(tensor.std(correction=0))


def segments(lengths: Sequence[int], chunk_size: int) -> list[tuple[int, int, int]]:
    """Where flat weights are cut by tensors as well as by chunks: (tensor, chunk, number of weights) of every piece."""
    found, position = [], 0
    for tensor, length in enumerate(lengths):
        stop = position + length
        while position < stop:
            chunk = position // chunk_size
            size = min(stop, (chunk + 1) * chunk_size) - position
            found.append((tensor, chunk, size))
            position += size
    return found


def check_chunk(chunk_size: int, num_weights: int) -> None:
    """Refuse a chunk of which most would be thrown away; up to the default of 1000 that costs nothing."""
    if chunk_size > max(2 * num_weights, 1000):
        raise ValueError(f"chunk_size: {chunk_size} is more than twice the target's {num_weights} weights; "
                         f"{num_weights} generate them all at once")  # fmt: skip
