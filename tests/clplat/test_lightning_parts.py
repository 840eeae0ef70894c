"""Lightning comes without the libraries that its metrics would bring, and with them whole when somebody wants them."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIGHT = """
import sys
import clplat.trainer, clplat.learner
assert not {"torchvision", "transformers", "scipy.signal"} & set(sys.modules)
import lightning.pytorch.core.module as lightning_module
import torchmetrics
assert torchmetrics.__version__ and type(torchmetrics).__name__ == "Waiting"
assert lightning_module.Metric is torchmetrics.Metric
assert lightning_module.MetricCollection is torchmetrics.MetricCollection
assert not hasattr(torchmetrics, "__no_such_thing__") and type(torchmetrics).__name__ == "Waiting"
"""
WHOLE = """
from torchmetrics.classification import MulticlassAccuracy
assert issubclass(MulticlassAccuracy, lightning_module.Metric)
assert torchmetrics.Accuracy is not None and type(torchmetrics).__name__ == "module"
assert torchmetrics.Metric is lightning_module.Metric and set(torchmetrics.__all__) <= set(dir(torchmetrics))
assert torchmetrics.utilities.checks and torchmetrics.text.BLEUScore
"""
BEFORE = """
import torchmetrics
import clplat.trainer
assert type(torchmetrics).__name__ == "module" and torchmetrics.Accuracy is not None
"""
OTHERWISE = """
import importlib, sys
class Moved:
    def find_spec(self, name, path=None, target=None):
        if name == "torchmetrics.__about__" and not moved:
            moved.append(name)
            raise ImportError(name)
moved = []
sys.meta_path.insert(0, Moved())
import clplat.trainer, torchmetrics
assert moved and type(torchmetrics).__name__ == "module" and torchmetrics.Accuracy is not None
"""


@pytest.mark.parametrize("script", [LIGHT + WHOLE, BEFORE, OTHERWISE], ids=["light, then whole", "before", "otherwise"])
def test_metrics_wait_until_somebody_wants_them(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
