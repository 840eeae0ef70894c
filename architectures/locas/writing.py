"""What a memory begins as: rows cloned from the layer by their activity, or slots written from gradients.

Shapes: B rows, T tokens, N counted tokens (those whose target counts), d hidden size, m inner size, r slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.architectures.base import Output
from clplat.architectures.locas.compression import Slots, compressed
from clplat.architectures.locas.memory import SidewayFFN
from clplat.architectures.locas.options import SideMemory
from clplat.streams.batch import IGNORE, Batch

Sideways = Mapping[str, SidewayFFN]
Answer = Callable[[Batch], Output]
ROWS = 16
"""Copies of a row that `detach_future` reads at once."""


@torch.no_grad()
def clone(sideways: Sideways, name: str, answer: Answer, batch: Batch, how: str, generator: torch.Generator) -> None:
    """Keys and gates of the memory `name` from each layer's own rows, at unit length; values 0.

    Which rows: by α_j = mean over counted tokens of |φ(G a)_j · (K a)_j|, the largest (`clone`) or smallest
    (`bottom`), or any (`random_clone`); the paper's α without the absolute value would let signs cancel.
    """
    counted, activity = batch.targets != IGNORE, dict[str, Tensor]()

    def listen(path: str, side: SidewayFFN) -> Callable[..., None]:
        def seen(module: SidewayFFN, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            kept = inputs[0][counted[:, : inputs[0].shape[1]]]
            activity[path] = _wide(side.view().inner(kept)).abs().mean(0)

        return seen

    with _listening(sideways, listen):
        answer(batch)
    for path, side in sideways.items():
        bank, view = side.bank(name), side.view()
        rows, alpha = len(bank.K), activity[path]
        if how == "random_clone":
            chosen = torch.randperm(len(alpha), generator=generator)[:rows].to(alpha.device)
        else:
            chosen = alpha.topk(min(rows, len(alpha)), largest=how == "clone").indices
        gates = F.normalize(_wide(view.gates()[chosen]), dim=1) if view.gated else None
        bank.set_slots(F.normalize(_wide(view.keys()[chosen]), dim=1), gates, None)


def write_gradients(sideways: Sideways, name: str, answer: Answer, batch: Batch, options: SideMemory) -> None:
    """A slot for every counted token, reduced to the memory's r: key A/‖A‖, value ε G / √(Σ_layers ‖G‖²), with A the
    layer's input and G the gradient of the token's log-probability by the layer's answer. ε makes what a token's slots
    add to its own answers `write_share` of what the layers add, in norm over all layers."""
    inputs, outputs, gradients = (_alone if options.detach_future else _together)(sideways, answer, batch)
    with torch.no_grad():
        whole = torch.stack([g.square().sum(1) for g in gradients.values()]).sum(0).sqrt().clamp(min=1e-30)
        unit = {path: g / whole.unsqueeze(1) for path, g in gradients.items()}
        added, own = torch.zeros_like(whole), torch.zeros_like(whole)
        for path, side in sideways.items():
            fired = side.view().activation(inputs[path].norm(dim=1)) * side.bank(name).scale
            added += (fired.unsqueeze(1) * unit[path]).square().sum(1)
            own += outputs[path].square().sum(1)
        step = options.write_share * (own / added.clamp(min=1e-30)).sqrt()
        for path, side in sideways.items():
            slots = Slots(F.normalize(inputs[path], dim=1), step.unsqueeze(1) * unit[path])
            bank = side.bank(name)
            kept = compressed(slots, len(bank.K), options.compression, side.view().activation, inputs[path])
            bank.set_slots(kept.keys, None, kept.values)
            if options.clip:
                bank.clip()


Found = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]
"""By layer, (N, d) each: inputs, answers, gradients by the answers."""


def _together(sideways: Sideways, answer: Answer, batch: Batch) -> Found:
    """All tokens from one backward pass of Σ_t log p: a token's gradient holds what it changes in later ones, too."""
    probes: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def listen(path: str, side: SidewayFFN) -> Callable[..., Tensor]:
        def seen(module: SidewayFFN, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs[path], outputs[path] = given[0].detach(), output.detach()
            probes[path] = torch.zeros_like(output, requires_grad=True)
            return output + probes[path]

        return seen

    with torch.enable_grad(), _listening(sideways, listen):
        logits = answer(batch).logits
        nats = F.cross_entropy(
            _wide(logits.flatten(0, 1)), batch.targets.flatten(), reduction="sum", ignore_index=IGNORE
        )
        slopes = dict(zip(probes, torch.autograd.grad(-nats, list(probes.values())), strict=True))
    counted = (batch.targets != IGNORE)[:, : next(iter(inputs.values())).shape[1]]

    def kept(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {path: _wide(tensor[counted]) for path, tensor in tensors.items()}

    return kept(inputs), kept(outputs), kept(slopes)


def _alone(sideways: Sideways, answer: Answer, batch: Batch) -> Found:
    """Every token from a copy of its row in which it alone counts."""
    places = (batch.targets != IGNORE).nonzero()
    found: list[Found] = []
    for part in places.split(ROWS):
        copies = batch.rows(part[:, 0])
        only = torch.full_like(copies.targets, IGNORE)
        only.scatter_(1, part[:, 1:], copies.targets.gather(1, part[:, 1:]))
        found.append(_together(sideways, answer, copies.replaced(targets=only)))
    first, second, third = ({path: torch.cat([one[n][path] for one in found]) for path in sideways} for n in range(3))
    return first, second, third


def _wide(tensor: Tensor) -> Tensor:
    """In float32, or in what is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def _listening(sideways: Sideways, listen: Callable[[str, SidewayFFN], Callable[..., Tensor | None]]) -> Iterator[None]:
    """Within it `listen(path, layer)` hears, and may change, what every layer answers."""
    handles = [side.register_forward_hook(listen(path, side)) for path, side in sideways.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
