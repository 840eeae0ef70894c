"""Greedy continuation of prompts, batched and cached."""

from __future__ import annotations

import torch

from clplat.architectures.base import Architecture, Decodes, device_of
from clplat.streams.batch import Batch


@torch.no_grad()
def greedy(model: Architecture, prompts: list[list[int]], *, max_new_tokens: int, stop: int | None) -> list[list[int]]:
    """The most likely continuation of each prompt, at most `max_new_tokens`, ended before the token `stop`.

    Prompts of unequal length are padded on the right and run side by side, each at its own positions, so that the
    result equals one by one. A model that decodes reads its prompt once and then one token at a time; another
    causal one reads everything again for each token. The model should be in evaluation mode. Ends as soon as every
    row has met `stop`. ValueError for an empty prompt and for a model that is not causal.
    """
    if not all(prompts):
        raise ValueError("prompts: a continuation needs at least one token to start from; give the end token")
    if not isinstance(model, Decodes) and model.causal is not True:
        raise ValueError(f"{type(model).__name__}: is not causal and cannot continue a text; use a causal architecture")
    if not prompts:
        return []
    device, count, width = device_of(model), len(prompts), max(map(len, prompts))
    padded = [prompt + [0] * (width - len(prompt) + max_new_tokens) for prompt in prompts]
    tokens, rows = torch.tensor(padded, device=device), torch.arange(count, device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    done = torch.zeros(count, dtype=torch.bool, device=device)
    state, read, unread = model.init_state(count), torch.zeros_like(lengths), tokens[:, :width]
    for number in range(max_new_tokens):
        ends = lengths + number
        if isinstance(model, Decodes):
            logits, state = model.decode(unread, state, read)
            chosen = logits[rows, ends - 1 - read].argmax(-1)
            read, unread = ends, chosen.unsqueeze(1)
        else:
            so_far = tokens[:, : width + number]
            chosen = model(Batch(inputs=so_far, targets=so_far)).logits[rows, ends - 1].argmax(-1)
        tokens[rows, ends] = chosen
        if stop is not None:
            done |= chosen == stop
            if bool(done.all()):
                break
    answers = [row[len(prompt) : len(prompt) + max_new_tokens] for row, prompt in zip(tokens.tolist(), prompts)]
    return [answer[: answer.index(stop)] if stop in answer else answer for answer in answers]
