"""clplat: train on a sequence of tasks, measure what is forgotten, compare strategies in MLflow.

From Python: `clplat.run(config)`, `clplat.results(study)`, `clplat.load_model(run)`, and as the commands of the same
names `clplat.tune(config)`, `clplat.resume(folder)`, `clplat.evaluate(run, stream)`, `clplat.reproduce(run)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clplat.api import evaluate, load_model, reproduce, results, resume, run, tune

__all__ = ["evaluate", "load_model", "reproduce", "results", "resume", "run", "tune"]


def __getattr__(name: str) -> Any:
    """The functions above, imported when asked for: `clplat --help` must not wait for torch."""
    if name in __all__:
        from clplat import api

        return getattr(api, name)
    raise AttributeError(f"module 'clplat' has no attribute {name!r}")
