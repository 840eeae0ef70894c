"""Soft prompts before a frozen pretrained language model: one more for each task, or a pool that texts choose from."""

from __future__ import annotations

from typing import ClassVar, cast

from clplat.architectures.base import Prompts
from clplat.strategies.adapters import drawn_by_strategy
from clplat.strategies.base import Context, Fidelity, Strategy
from clplat.streams.base import Task


class ProgressivePrompts(Strategy):
    """Every task trains `length` new vectors in front of those of all tasks before it, which stay as they are.

    The paper shows a row the prompts up to its own task's, by the task's name; here answers are written without it, and
    every text is shown all prompts so far. Its residual network on the prompts is left out.
    """

    paper = "Razdaibiedina et al. 2023, arXiv:2301.12314"
    fidelity: ClassVar[Fidelity] = "mechanism"

    def __init__(self, *, length: int = 20) -> None:
        """`length` as in I-LoRA's baseline code."""
        if length < 1:
            raise ValueError(f"length: must be at least 1, got {length}")
        self.length = length

    def setup(self, context: Context) -> None:
        super().setup(context)
        _with_prompts(self, context)
        if any(isinstance(other, PromptPool) for other in context.strategies.values()):
            raise ValueError("ProgressivePrompts: PromptPool shows each text its own prompts; leave one of the two out")
        _check_room(self, context, self.length * len(context.tasks), f"of {len(context.tasks)} tasks: lower length")

    def task_start(self, task: Task) -> None:
        model, name = _with_prompts(self, self.context), f"task{task.index}"
        with drawn_by_strategy(self.context):
            model.add_prompt(name, self.length)
        model.use_prompts([name, *(other for other in reversed(model.prompt_names()) if other != name)], [name])


class PromptPool(Strategy):
    """L2P: a pool of `size` prompts of `length` vectors, of which each text is shown the `top_k` whose keys are nearest
    to what it begins with. Chosen keys are drawn to their texts, with the weight `matching`.

    The paper's query is a frozen vision model's summary of the whole input. A causal model must not look ahead, so that
    ours is the mean embedding of the first `query_tokens` tokens, and prompts are seen from the last of them on. Rows
    choose one by one, where the paper's code lets a batch choose together.
    """

    paper = "Wang et al. 2022, arXiv:2112.08654"
    fidelity: ClassVar[Fidelity] = "mechanism"

    def __init__(
        self, *, size: int = 10, length: int = 5, top_k: int = 3, matching: float = 0.5, query_tokens: int = 16
    ) -> None:
        """The first four as in I-LoRA's baseline code; `query_tokens` is ours: the beginning of an instruction."""
        self.size, self.length, self.top_k = size, length, top_k
        self.matching, self.query_tokens = matching, query_tokens

    def setup(self, context: Context) -> None:
        super().setup(context)
        model = _with_prompts(self, context)
        _check_room(self, context, self.top_k * self.length, "shown at once: lower top_k or length")
        with drawn_by_strategy(context):
            model.add_pool(
                size=self.size, length=self.length, top_k=self.top_k, query_tokens=self.query_tokens,
                matching=self.matching,
            )  # fmt: skip


def _check_room(strategy: Strategy, context: Context, vectors: int, what: str) -> None:
    """Refuse prompts that will not fit before the rows, be it in the last task."""
    room = _with_prompts(strategy, context).prompt_room()
    if room is not None and vectors > room:
        raise ValueError(f"{type(strategy).__name__}: the model's context has room for {room} vectors before a row, "
                         f"and there would be {vectors} {what}, or shorten the rows")  # fmt: skip


def _with_prompts(strategy: Strategy, context: Context) -> Prompts:
    """The model, where it takes prompts."""
    model = context.architecture
    if not isinstance(model, Prompts):
        raise ValueError(f"{type(strategy).__name__}: {type(model).__name__} takes no prompts; use Prompted")
    return cast(Prompts, model)
