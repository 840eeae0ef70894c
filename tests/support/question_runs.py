"""Runs on two question-answer tasks by a pretrained model that reads bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from studies import DIGITS

BYTES = 257


def run_of(places: tuple[Path, Path], cache: Path, **changes: Any) -> dict[str, Any]:
    root, model = places
    tasks = [{"name": name, "metric": "number", "max_new_tokens": 3} for name in ("plus", "minus")]
    return {
        "name": "adapters",
        "stream": {
            "class_path": "PromptAnswerStream",
            "init_args": {
                "root": str(root), "tasks": tasks, "max_tokens": 16, "max_answer_tokens": 4, "max_answers": 4,
                "max_eval_rows": 8, "cache_dir": str(cache),
            },
        },
        "architecture": {
            "class_path": "Pretrained",
            "init_args": {"name": str(model), "lora": {"rank": 4, "dropout": 0.1}},
        },
        "training": {
            "budget": {"steps": 6}, "batch_size": 8, "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-2}}
        },
        "checkpoint": DIGITS["checkpoint"], "tracking": DIGITS["tracking"],
    } | changes  # fmt: skip
