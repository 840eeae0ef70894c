"""What of Lightning is used here, imported without the metrics that it brings and nobody here uses.

Lightning wants two base classes of torchmetrics, whose package imports all its metrics of pictures, texts and sounds,
and with them torchvision, transformers and scipy.signal: half of the time that `clplat run` took to start. So the
package is there from the beginning, and its own code runs when somebody asks it for more than those two.
"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

PACKAGE = "torchmetrics"
HOMES = {"Metric": "metric", "MetricCollection": "collections", "__version__": "__about__"}
"""What Lightning asks for, and in which module of the package each is."""


class Waiting(ModuleType):
    """The package, before its own code has run."""

    def __getattr__(self, name: str) -> Any:
        if name == "_logger":
            return logging.getLogger(PACKAGE)
        if name in HOMES:
            try:
                return getattr(import_module(f"{PACKAGE}.{HOMES[name]}"), name)
            except (ImportError, AttributeError):
                pass  # a version that is built otherwise
        elif name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {PACKAGE!r} has no attribute {name!r}")
        self.__class__ = ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None and self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def let_metrics_wait() -> None:
    """The package waits from now on, unless it has been imported already."""
    spec = find_spec(PACKAGE) if PACKAGE not in sys.modules else None
    if spec is not None and spec.loader is not None:
        waits = module_from_spec(spec)
        waits.__class__ = Waiting
        sys.modules[PACKAGE] = waits
        with suppress(ImportError):
            # `metric` and this import one another, which goes well in one order alone.
            import_module(f"{PACKAGE}.utilities")


let_metrics_wait()

from lightning import LightningModule, Trainer  # noqa: E402
from lightning.pytorch.plugins.environments import LightningEnvironment  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy  # noqa: E402

__all__ = ["DDPStrategy", "LightningEnvironment", "LightningModule", "SingleDeviceStrategy", "Trainer"]
