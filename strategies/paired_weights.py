"""Slow weights that follow fast ones: pairs of tensors by name, and nothing about where they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class SlowFast:
    """Fast tensors w, which somebody else trains, and slow ones l of the same names, which follow them.

    One that takes names by a rule of its own and finds none would change nothing and say nothing: two published
    programs of I-LoRA do. So pairs that are not pairs are refused when they are made, and `check_moved` afterwards.
    All changes are in place and reach no gradient.
    """

    def __init__(self, fast: Mapping[str, Tensor], slow: Mapping[str, Tensor]) -> None:
        """ValueError, with the names, where the two differ in names, shapes or kinds of number, share memory, or are
        none."""
        _check_pairs(fast, slow)
        self.names = list(fast)
        self.fast = [fast[name].detach() for name in self.names]
        self.slow = [slow[name].detach() for name in self.names]
        self.updates = 0
        self._marked: tuple[list[Tensor], list[Tensor]] | None = None

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """l ← `decay` · l + (1 − `decay`) · w: at 0 they are equal afterwards, at 1 slow weights stay."""
        self.updates += 1
        if decay == 0:  # rounding would leave some of them apart
            self.slow_from_fast()
        elif decay != 1:
            torch._foreach_lerp_(self.slow, self.fast, 1 - decay)

    def slow_from_fast(self) -> None:
        """l ← w."""
        torch._foreach_copy_(self.slow, self.fast)

    def fast_from_slow(self) -> None:
        """w ← l."""
        torch._foreach_copy_(self.fast, self.slow)

    def swap(self) -> None:
        """w and l change places."""
        fast = [tensor.clone() for tensor in self.fast]
        self.fast_from_slow()
        torch._foreach_copy_(self.slow, fast)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within it w and l have changed places."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def lerp(self, share: float) -> list[Tensor]:
        """(1 − `share`) · w + `share` · l, new tensors in the order of `names`: 0 gives the fast ones, 1 the slow."""
        return list(torch._foreach_lerp(self.fast, self.slow, share))

    @contextmanager
    def interpolated(self, share: float) -> Iterator[None]:
        """Within it `lerp(share)` stands in w's place; w is back afterwards, bit for bit."""
        own = [tensor.clone() for tensor in self.fast]
        torch._foreach_copy_(self.fast, self.lerp(share))
        try:
            yield
        finally:
            torch._foreach_copy_(self.fast, own)

    def distance(self) -> Tensor:
        """‖l − w‖ over all tensors, () on their device."""
        wide = torch.promote_types(self.fast[0].dtype, torch.float32)
        apart = torch._foreach_sub([tensor.to(wide) for tensor in self.slow], [tensor.to(wide) for tensor in self.fast])
        return torch.stack(torch._foreach_norm(apart)).norm()

    def mark(self) -> None:
        """Remember how things stand, for `check_moved`."""
        self.updates = 0
        self._marked = ([tensor.clone() for tensor in self.fast], [tensor.clone() for tensor in self.slow])

    def check_moved(self) -> None:
        """RuntimeError where, in several updates since `mark`, nothing was trained, or a slow tensor stayed although
        its fast one moved. Waits for the device. For updates with a decay below 1."""
        if self._marked is None or self.updates < 2:
            return
        # Both sides' answers in one vector, so that it waits once.
        pairs = zip((*self.fast, *self.slow), (*self._marked[0], *self._marked[1]), strict=True)
        moved = torch.stack([(now != before).any() for now, before in pairs]).tolist()
        fast, slow = moved[: len(self.names)], moved[len(self.names) :]
        if not any(fast):
            raise RuntimeError(f"slow weights: in {self.updates} updates none of the {len(self.names)} fast tensors "
                               "moved, so nothing is trained; check which adapter is")  # fmt: skip
        if stayed := [name for name, of_fast, of_slow in zip(self.names, fast, slow) if of_fast and not of_slow]:
            raise RuntimeError(f"slow weights: {len(stayed)} of {len(self.names)} tensors, such as {stayed[0]}, did "
                               f"not move in {self.updates} updates although their fast ones did")  # fmt: skip


def _check_pairs(fast: Mapping[str, Tensor], slow: Mapping[str, Tensor]) -> None:
    if not fast:
        raise ValueError("slow weights: there is no fast tensor to follow")
    if alone := sorted(fast.keys() ^ slow.keys()):
        side = "fast" if alone[0] in fast else "slow"
        raise ValueError(f"slow weights: {len(alone)} tensors have no partner, such as {alone[0]!r}, which is {side} "
                         "alone; both must go by the same names")  # fmt: skip
    places = {tensor.untyped_storage().data_ptr() for tensor in fast.values()}
    for name, tensor in fast.items():
        partner = slow[name]
        if (tensor.shape, tensor.dtype) != (partner.shape, partner.dtype):
            raise ValueError(f"slow weights: {name!r} is {tuple(tensor.shape)} of {tensor.dtype} fast and "
                             f"{tuple(partner.shape)} of {partner.dtype} slow; they must be alike")  # fmt: skip
        if partner.untyped_storage().data_ptr() in places:
            raise ValueError(f"slow weights: the slow {name!r} lies in the memory of a fast tensor, and would be "
                             "trained with it; give it a copy")  # fmt: skip
