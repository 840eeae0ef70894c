"""Greedy continuation of prompts, batched and cached."""

from __future__ import annotations

import torch
from torch import Tensor

from clplat.architectures.base import Architecture, Decodes, device_of
from clplat.streams.batch import Batch


@torch.no_grad()
def greedy(
    model: Architecture, prompts: list[list[int]], *, max_new_tokens: int, stop: int | None
) -> list[list[int]]:
    """The most likely continuation of each prompt (not empty), at most `max_new_tokens`, ended before `stop`.

    Prompts of different lengths run side by side, each at its own positions; the result equals one by one.
    """
    device = device_of(model)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = int(lengths.max())
    tokens = torch.zeros(len(prompts), width + max_new_tokens, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
    step = _Cached(model, tokens[:, :width], lengths) if isinstance(model, Decodes) else _Whole(model, tokens, lengths)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    chosen = step(None)
    for number in range(max_new_tokens):
        tokens.scatter_(1, (lengths + number)[:, None], chosen[:, None])
        done |= chosen == (-1 if stop is None else stop)
        if number + 1 == max_new_tokens or bool(done.all()):
            break
        chosen = step(chosen)
    new = number + 1
    found = [row[length : length + new].tolist() for row, length in zip(tokens, lengths.tolist(), strict=True)]
    return [answer[: answer.index(stop)] if stop in answer else answer for answer in found]


class _Cached:
    """Next tokens with carried state: the prompt once, then one token at a time."""

    def __init__(self, model: Architecture, prompt: Tensor, lengths: Tensor) -> None:
        assert isinstance(model, Decodes)
        self.model, self.prompt, self.lengths = model, prompt, lengths
        self.state = model.init_state(len(prompt))

    def __call__(self, chosen: Tensor | None) -> Tensor:
        if chosen is None:
            start = torch.zeros_like(self.lengths)
            logits, self.state = self.model.decode(self.prompt, self.state, start)
            # Padding behind a short prompt has been read too; the tokens to come overwrite it in the cache.
            return logits[torch.arange(len(logits)), self.lengths - 1].argmax(-1)
        logits, self.state = self.model.decode(chosen[:, None], self.state, self.lengths)
        self.lengths = self.lengths + 1
        return logits[:, -1].argmax(-1)


class _Whole:
    """Next tokens by a full pass over everything so far, for causal models that cannot decode step by step."""

    def __init__(self, model: Architecture, tokens: Tensor, lengths: Tensor) -> None:
        if model.causal is not True:
            raise ValueError(f"{type(model).__name__} is not causal and cannot continue a text")
        self.model, self.tokens, self.lengths, self.done = model, tokens, lengths, 0

    def __call__(self, chosen: Tensor | None) -> Tensor:
        end = int(self.lengths.max()) + self.done
        logits = self.model(Batch(inputs=self.tokens[:, :end], targets=self.tokens[:, :end])).logits
        place = self.lengths + self.done - 1
        self.done += 1
        return logits[torch.arange(len(logits)), place].argmax(-1)
