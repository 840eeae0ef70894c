"""What a training step may read and change so that its kernels can be replayed; held while they are recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb
from typing import Any

import torch
from torch import Tensor, nn

OURS = ("recording", "recordable", "cuda_graphs")
"""Modules through which every recorded pass goes, and which say nothing of where it failed."""


class NotRecordable(RuntimeError):
    """Why a step cannot be replayed, in words that follow "because"."""


@contextmanager
def of_its_own(module: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Within it the modules have other leaves of autograd for these weights, in the same memory.

    What accumulates the gradient of a weight belongs to the stream on which the weight was first used and lives as long
    as any step's results do; a recording that met the one of an earlier step would have to wait for that stream.
    """
    own = {id(weight): nn.Parameter(weight.detach()) for weight in weights}
    places = [(part, name, p) for part in module.modules() for name, p in part._parameters.items() if id(p) in own]
    try:
        for part, name, weight in places:
            setattr(part, name, own[id(weight)])
        yield list(own.values())
    finally:
        for part, name, weight in places:
            setattr(part, name, weight)


def leaves_of(results: Sequence[Tensor]) -> set[int]:
    """The ids of all tensors that autograd would give a gradient."""
    seen = {result.grad_fn for result in results if result.grad_fn is not None}
    found, waiting = {id(result) for result in results if result.grad_fn is None}, list(seen)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
                if hasattr(node, "variable"):
                    found.add(id(node.variable))
    return found


@contextmanager
def rehearsing(module: nn.Module) -> Iterator[None]:
    """Within it a step is rehearsed: buffers get their values back, and NotRecordable says what else it changed. A
    replay changes no attribute of Python's."""
    before, buffers = dict(_attributes(module)), list(module.buffers())
    values = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)
    for name, value in _attributes(module):
        old = before.get(name)
        if value is not old and (isinstance(value, Tensor) or value != old):
            raise NotRecordable(f"each of its passes sets `{name}`, which replaying does not")


def why(error: BaseException) -> str:
    """What went wrong first, and where in our code or the user's."""
    while error.__context__ is not None:
        error = error.__context__
    if isinstance(error, NotRecordable):
        return str(error)
    inside = torch.__path__[0]
    frames = [
        frame for frame in extract_tb(error.__traceback__)
        if not frame.filename.startswith(inside) and Path(frame.filename).stem not in OURS
    ]  # fmt: skip
    where = f" at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    return f"a pass cannot be recorded: {(str(error) or type(error).__name__).splitlines()[0]}{where}"


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """By name the tensors and numbers that modules hold as attributes or buffers."""
    for path, part in module.named_modules():
        for name, value in (*vars(part).items(), *part._buffers.items()):
            if isinstance(value, Tensor | int | float):
                yield f"{path}.{name}".lstrip("."), value
