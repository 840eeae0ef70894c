"""What I-LoRA leaves to choose, and three choices of it by name (docs/pretrained.md says what each rests on)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clplat.strategies.consistency import Positions, Target

Arm = Literal["paper", "code_intent", "code_inert_ema"]
Space = Literal["hidden", "logits"]
Layers = Literal["all", "last"] | list[int]
Boundary = Literal["keep", "reset_slow", "reset_fast"]
Answers = Literal["fast", "slow", "interpolated"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """`decay`: λ of l ← λ l + (1 − λ) w, once an optimizer step; slow weights are half-way to fixed fast ones after
    ln ½ / ln λ steps: half a step at 0.25, 69 steps at 0.99.

    `target`, `positions`: as in `consistency`. `space`: hidden states are held to slow ones, of `layers` all, last, or
    of these numbers (0: embeddings, L: the head's input), or logits. `boundary`: when a task other than the first
    begins slow weights go on, become a copy of fast ones, or fast ones become a copy of slow ones. `answer_with`: what
    answers by default.
    """

    decay: float
    target: Target
    space: Space
    layers: Layers
    positions: Positions
    boundary: Boundary
    answer_with: Answers


PAPER = Options(
    decay=0.99, target="slow", space="hidden", layers="last", positions="tokens", boundary="keep", answer_with="slow"
)
CODE_INTENT = Options(
    decay=0.25, target="elementwise_max", space="hidden", layers="all", positions="all", boundary="reset_slow",
    answer_with="fast",
)  # fmt: skip
# Slow weights that are never moved stay where the first task began, with B = 0: they answer as the bare backbone.
CODE_INERT_EMA = Options(
    decay=1.0, target="elementwise_max", space="hidden", layers="all", positions="all", boundary="keep",
    answer_with="fast",
)  # fmt: skip

ARMS: dict[str, Options] = {"paper": PAPER, "code_intent": CODE_INTENT, "code_inert_ema": CODE_INERT_EMA}
