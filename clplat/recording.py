"""A training step's kernels recorded as they are and replayed: what `training.compile: cudagraphs` does.

Nothing is traced: the step's function runs once under a recorder (CUDA graphs on a GPU, `cuda_graphs.py`), forward and
backward apart, and what it launched is replayed on other rows. Of a step Python sees nothing more then; so it is
rehearsed first, and whatever could not be replayed rightly is found before anything is recorded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from clplat.architectures.base import Output, State
from clplat.recordable import NotRecordable, leaves_of, of_its_own, rehearsing, why
from clplat.streams.batch import Batch

T = TypeVar("T")
Answer = Callable[[Batch, State], tuple[Tensor | None, Output, Tensor | None]]

_NUMBERS = (bool, int, float)
MOST_SHAPES = 4
"""Shapes of rows and state that are recorded in one task. Each holds a step's activations on the device."""


class Recorder(Protocol):
    """Runs parts of a step so that what they launch can be launched again."""

    def rehearse(self, part: Callable[[], None]) -> None:
        """Runs a part whose results nobody wants, as it will be recorded; RuntimeError where it waits for the device.
        Random numbers are drawn again afterwards."""
        ...

    def record(self, part: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """What the part returns, in memory that each replay writes anew, and the replay; the first one is still to
        come. RuntimeError where it cannot be recorded, which leaves the device as it was."""
        ...


def recorder_for(device: torch.device) -> Recorder | None:
    """A recorder for one task; None where there is none, as on a CPU."""
    if device.type != "cuda":
        return None
    from clplat.cuda_graphs import CudaGraphs

    return CudaGraphs(device)


class Recorded:
    """The step's function, replayed for rows and states of shapes that were seen before.

    The first step of a shape in a task runs as it is, which makes ready whatever makes itself ready once; the second is
    recorded. What cannot be replayed runs as it is ever after, with one warning that says why. Results lie where the
    next replay writes, but for gradients, which are the caller's own. One backward pass has to follow each forward one.
    """

    def __init__(self, answer: Answer, module: nn.Module) -> None:
        """`module`: whose weights, buffers and options `answer` reads; where they are others than when a shape was
        recorded, it is recorded again."""
        self.answer, self.module = answer, module
        self._refused = self._warned = False
        self.forget()

    def forget(self) -> None:
        """Give all recordings up, and the memory that they hold. A new task may have changed what nobody looks at."""
        self._recorder: Recorder | None = None
        self._recordings: dict[Any, Recording | None] = {}
        self._held: list[dict[str, Any]] = []
        self._options: list[dict[str, Any]] = []
        self._moves = 0

    def __call__(self, batch: Batch, state: State) -> tuple[Tensor | None, Output, Tensor | None]:
        """As the function itself."""
        if self._refused or not torch.is_grad_enabled() or not self._begun(batch.inputs.device):
            return self.answer(batch, state)
        tensors, shape = _flattened(batch, state)
        if shape not in self._recordings:
            if len(self._recordings) < MOST_SHAPES:
                self._recordings[shape] = None
            elif not self._warned:
                self._warned = True
                self._warn(f"a task's steps have rows of more than {MOST_SHAPES} shapes; further ones run as they are")
            return self.answer(batch, state)
        recording, premises = self._recordings[shape], self._premises()
        if recording is None or recording.premises != premises:
            recording = self._recordings[shape] = self._record(batch, state, premises, again=recording is not None)
        return self.answer(batch, state) if recording is None else recording(tensors)

    def _begun(self, device: torch.device) -> bool:
        if self._recorder is None and (recorder := recorder_for(device)) is not None:
            self._recorder = recorder
            modules = list(self.module.modules())
            self._held = [held for m in modules for held in (m._parameters, m._buffers) if held]
            self._options = [vars(m) for m in modules if not type(m).__module__.startswith("torch.")]
        return self._recorder is not None

    def _premises(self) -> list[Any]:
        """Where weights and buffers lie, which of them are trained, and what layers hold as numbers and names."""
        present = (tensor for held in self._held for tensor in held.values() if tensor is not None)
        places = [(id(tensor), tensor.data_ptr(), tensor.requires_grad) for tensor in present]
        options = (value for held in self._options for value in held.values() if _is_option(value))
        return [*places, *(tuple(value) if isinstance(value, list) else value for value in options)]

    def _record(self, batch: Batch, state: State, premises: list[Any], *, again: bool) -> Recording | None:
        assert self._recorder is not None
        try:
            self._moves += again
            if self._moves > MOST_SHAPES:
                raise NotRecordable("its weights, buffers or options are others again and again")
            made = Recording(self.answer, self.module, batch, state, self._recorder)
        except RuntimeError as error:
            self.forget()
            self._refused = True
            self._warn(f"steps run as they are, launched one kernel at a time, because {why(error)}")
            return None
        made.premises = premises
        return made

    def _warn(self, what: str) -> None:
        warnings.warn(f"training.compile: cudagraphs: {type(self.module).__name__}: {what}", stacklevel=4)


class Recording:
    """One shape's step: rows and state are copied in, both passes replayed."""

    def __init__(self, answer: Answer, module: nn.Module, batch: Batch, state: State, recorder: Recorder) -> None:
        """Rehearses and records; RuntimeError where that does not go."""
        tensors, _ = _flattened(batch, state)
        if any(tensor.requires_grad for tensor in tensors):
            raise NotRecordable("a gradient is asked for its rows or its carried state")
        self.answer, self.turn = answer, 0
        self.premises: list[Any] = []
        self.weights = [p for p in module.parameters() if p.requires_grad]
        if any(weight._backward_hooks for weight in self.weights):
            raise NotRecordable("a weight has a hook, which would change its gradient twice")
        self.batch = {name: tensor.clone() for name, tensor in batch.tensors().items()}
        self.state = pytree.tree_map_only(Tensor, torch.clone, state)
        self.given = [*self.batch.values(), *(t for t in pytree.tree_leaves(self.state) if isinstance(t, Tensor))]
        with of_its_own(module, self.weights) as self._own:
            with rehearsing(module):
                recorder.rehearse(self._rehearsal)
            leaves, self._replay_forward = recorder.record(self._forward)
            open_leaves = [leaf for leaf in leaves if leaf.requires_grad]
            self.slopes = [torch.zeros_like(leaf) for leaf in open_leaves]
            found, self._replay_backward = recorder.record(partial(self._backward, open_leaves))
        self.is_open = [leaf.requires_grad for leaf in leaves]
        # Without the graph of autograd, which would keep all that the two passes held for each other.
        self.results, self.gradients = [leaf.detach() for leaf in leaves], found

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor | None, Output, Tensor | None]:
        """The step on other rows."""
        with torch.no_grad():
            torch._foreach_copy_(self.given, list(tensors))
        results = iter(_Replay.apply(self, *self.weights))
        leaves = [next(results) if is_tensor else constant for is_tensor, constant in self.leaves]
        inputs, named, loss = pytree.tree_unflatten(leaves, self.spec)
        return inputs, self.kind(**named), loss

    def forward(self) -> tuple[Tensor, ...]:
        """Replays the forward pass; its results as tensors of their own in the same memory."""
        self.turn += 1
        self._replay_forward()
        return tuple(result.detach() for result in self.results)

    def backward(self, turn: int, slopes: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The weights' gradients, for those of the results; None where a weight has none."""
        if turn != self.turn:
            raise RuntimeError("training.compile: cudagraphs: another step came between a forward and a backward pass")
        arrived = [slope for slope, is_open in zip(slopes, self.is_open, strict=True) if is_open]
        for kept, slope in zip(self.slopes, arrived, strict=True):
            if slope is None:
                kept.zero_()
            else:
                kept.copy_(slope)
        self._replay_backward()
        # Copies, so that nobody who keeps a gradient finds the next step's in its place; all at once, where autograd
        # would copy them one by one.
        own = [None if g is None else torch.empty_like(g) for g in self.gradients]
        pairs = [(mine, g) for mine, g in zip(own, self.gradients, strict=True) if mine is not None]
        torch._foreach_copy_([mine for mine, _ in pairs], [g for _, g in pairs])
        return own

    def _rehearsal(self) -> None:
        open_leaves = [leaf for leaf in self._forward() if leaf.requires_grad]
        if not open_leaves:
            raise NotRecordable("no result of it has a gradient")
        if not leaves_of(open_leaves) <= set(map(id, self._own)):
            raise NotRecordable("it reads a weight from elsewhere than the module that has it")
        self.slopes = [torch.zeros_like(leaf) for leaf in open_leaves]
        self._backward(open_leaves)

    def _forward(self) -> list[Tensor]:
        """The results that are tensors. What nobody takes a gradient of loses it: state and stash."""
        with _cast_anew(self.given[0].device):
            inputs, output, loss = self.answer(Batch.from_tensors(self.batch), self.state)
        self.kind = type(output)
        named = {field.name: getattr(output, field.name) for field in fields(output)}
        named |= {name: pytree.tree_map_only(Tensor, torch.detach, named[name]) for name in ("state", "stash")}
        leaves, self.spec = pytree.tree_flatten((inputs, named, loss))
        self.leaves = [(isinstance(leaf, Tensor), None if isinstance(leaf, Tensor) else leaf) for leaf in leaves]
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def _backward(self, open_leaves: list[Tensor]) -> list[Tensor | None]:
        """Gradients that lie as one copying kernel takes them all."""
        with _cast_anew(self.given[0].device):
            found = torch.autograd.grad(open_leaves, self._own, self.slopes, allow_unused=True)
        return [None if slope is None else slope.contiguous() for slope in found]


class _Replay(torch.autograd.Function):
    """The recorded step as one node of autograd: weights in, results out."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, *weights: Tensor) -> tuple[Tensor, ...]:
        results = recording.forward()
        closed = [one for one, is_open in zip(results, recording.is_open, strict=True) if not is_open]
        ctx.mark_non_differentiable(*closed)
        ctx.set_materialize_grads(False)
        ctx.recording, ctx.turn = recording, recording.turn
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Any, ...]:
        return (None, *ctx.recording.backward(ctx.turn, slopes))


def _flattened(batch: Batch, state: State) -> tuple[list[Tensor], Any]:
    """The tensors of both, and all else on which a recording depends."""
    named = batch.tensors()
    leaves, spec = pytree.tree_flatten(state)
    tensors = [*named.values(), *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
    constants = tuple(None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves)
    return tensors, (tuple(named), spec, constants, tuple((one.shape, one.dtype) for one in tensors))


def _is_option(value: object) -> bool:
    """Numbers, and lists of numbers and names; a name alone is what a layer has noted of itself."""
    if isinstance(value, list | tuple):
        return all(type(item) in (*_NUMBERS, str) for item in value)
    return type(value) in _NUMBERS


def _cast_anew(device: torch.device) -> torch.autocast:
    """Autocast as it is, without its memory of weights that were cast: a replay has to cast them as they now are."""
    kind = device.type
    return torch.autocast(
        kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
    )
