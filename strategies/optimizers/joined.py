"""Several optimizers as one: parameters with their names, shared out among optimizers that step together."""

from __future__ import annotations

import fnmatch
from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
"""Makes an optimizer of the parameters it is given; in YAML a component, `class_path` and `init_args`."""


class NamedWeights(list[tuple[str, Tensor]]):
    """Trainable parameters with their names, and the `module` they are of (None where nobody said).

    As a list of pairs it goes into any optimizer of torch.
    """

    def __init__(self, pairs: Iterable[tuple[str, Tensor]], module: nn.Module | None = None) -> None:
        super().__init__(pairs)
        self.module = module

    @classmethod
    def of(cls, module: nn.Module) -> NamedWeights:
        """Those of a module that are trained."""
        return cls(((name, p) for name, p in module.named_parameters() if p.requires_grad), module)

    @classmethod
    def given(cls, params: Iterable[Any]) -> NamedWeights:
        """Those in what an optimizer is built from: tensors, which are named by their numbers, or pairs."""
        if isinstance(params, cls):
            return params
        pairs = [(one if isinstance(one, tuple) else (str(number), one)) for number, one in enumerate(params)]
        if not all(isinstance(tensor, Tensor) for _, tensor in pairs):
            raise ValueError(
                "params: this optimizer makes its own groups; give it tensors, or pairs of name and tensor"
            )
        return cls(pairs)

    def where(self, wanted: Callable[[str, Tensor], bool]) -> NamedWeights:
        """Those of which `wanted(name, tensor)` is true."""
        return NamedWeights(((name, tensor) for name, tensor in self if wanted(name, tensor)), self.module)

    def embeddings(self) -> set[int]:
        """Identities of the tables of embeddings, as far as the module is known."""
        modules = () if self.module is None else self.module.modules()
        return {id(one.weight) for one in modules if isinstance(one, nn.Embedding)}


class Joined(Optimizer, ABC):
    """Base of optimizers that are made of others: one step of it is one of each.

    The groups and the state of its `children` are its own, the same objects, so that learning-rate schedules, loss
    scalers and `state_dict` see them all and need to know of nothing.
    """

    def __init__(self, params: NamedWeights, children: Sequence[Optimizer]) -> None:
        super().__init__(list(params), {})
        self.children = list(children)
        self._sizes = [len(child.param_groups) for child in children]
        self.param_groups = [group for child in children for group in child.param_groups]
        self._link()

    @classmethod
    def for_module(cls, module: nn.Module, **options: Any) -> Joined:
        """The optimizer of a module's trainable parameters."""
        return cls(NamedWeights.of(module), **options)

    def _link(self) -> None:
        """Hand groups and state down again; loading, and a look ahead on copies, put others in their place."""
        start = 0
        for child, size in zip(self.children, self._sizes, strict=True):
            child.param_groups, child.state = self.param_groups[start : start + size], self.state
            start += size
            if isinstance(child, Joined):
                child._link()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every child."""
        loss = evaluated(closure)
        self._link()
        self._step_children()
        return loss

    def _step_children(self) -> None:
        for child in self.children:
            child.step()


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """What an optimizer's optional closure gives, with gradients on."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def built(factory: OptimizerFactory, params: NamedWeights, key: str) -> Optimizer:
    """The optimizer of those parameters; what is wrong with it is said under its key."""
    try:
        return factory(params)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{key}: {error}") from error


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns (`*`, `?`, `[abc]`; a `*` also stands for dots) is the whole name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def shared_out(
    params: NamedWeights, others: OptimizerFactory | None, exclude: Sequence[str], owner: str
) -> tuple[NamedWeights, list[Optimizer]]:
    """The matrices that `owner` takes, and the optimizer of all others where there are any.

    Not taken are parameters without exactly two dimensions, tables of embeddings, and names in `exclude`.
    """
    for pattern in exclude:
        if not any(matches(name, [pattern]) for name, _ in params):
            raise ValueError(f"exclude: {pattern!r} is the name of no parameter; they are called {some_names(params)}")
    tables = params.embeddings()
    matrices = params.where(lambda name, p: p.ndim == 2 and id(p) not in tables and not matches(name, exclude))
    taken = {name for name, _ in matrices}
    rest = params.where(lambda name, _: name not in taken)
    if not matrices:
        raise ValueError(f"exclude: no matrix is left for {owner} among {some_names(params)}")
    if not rest:
        return matrices, []
    if others is None:
        name, tensor = rest[0]
        raise ValueError(
            f"others: {owner} takes matrices, and {name} {tuple(tensor.shape)} is none or is left out; name the "
            "optimizer that takes such parameters, for example {class_path: AdamW, init_args: {lr: 1e-3}}"
        )
    return matrices, [built(others, rest, "others")]


def some_names(params: NamedWeights) -> str:
    """The first few names, for messages."""
    names = [name for name, _ in params]
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "")


def check_numbers(**numbers: float) -> None:
    """Refuse a negative number, by its option's name."""
    for name, value in numbers.items():
        if not value >= 0:
            raise ValueError(f"{name}: must not be negative, got {value}")


def check_shares(**shares: float) -> None:
    """Refuse what is not at least 0 and below 1, by its option's name."""
    for name, value in shares.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}: must be at least 0 and below 1, got {value}")


def with_gradient(group: Mapping[str, Any]) -> list[Tensor]:
    """A group's parameters that have a gradient now."""
    return [p for p in group["params"] if p.grad is not None]
