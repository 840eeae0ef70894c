"""Lightning's Trainer for one task, and how its steps go through one process or several."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from clplat.config import TrainingConfig
from clplat.errors import ConfigError
from clplat.lightning_parts import DDPStrategy, LightningEnvironment, SingleDeviceStrategy, Trainer
from clplat.precision import of_trainer
from clplat.streams.batch import Batch


def new_trainer(training: TrainingConfig, device: Any, processes: int, idle: bool = False) -> Trainer:
    """One Trainer for one task: a second `fit` on the same one would run no step and say nothing. `idle`: a step may
    leave parameters without a gradient, for which several processes have to look in every graph."""
    if device.type == "cpu":
        # Lightning's import sets it, and each optimizer step would open the GPU driver's library to count no GPUs.
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # Gradients lie where they are averaged, and are not copied there.
    together = _Processes(process_group_backend=backend, find_unused_parameters=idle, gradient_as_bucket_view=True)
    strategy = together if processes > 1 else _OneProcess(device)
    return Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=([device.index] if device.type == "cuda" and processes == 1 else processes),
        strategy=strategy,
        precision=of_trainer(training.precision),
        # Our processes and their ranks exist already: inside a Slurm job Lightning would take the job's for them.
        plugins=LightningEnvironment(),
        max_epochs=1,
        use_distributed_sampler=False,
        barebones=True,
    )


class _AllBatches(ABC):
    """Takes all steps of a task inside one batch of Lightning's.

    From one batch to the next Lightning calls what loggers, progress bars and schedulers would need, which costs half
    as much as the arithmetic of a small model; and of several processes it asks the device whether one was told to
    stop, for whose answer every step would wait.
    """

    lightning_module: Any
    root_device: torch.device

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        return batch

    def training_step(self, batches: Iterator[Batch], batch_idx: int) -> None:
        learner = self.lightning_module
        for number, batch in enumerate(batches):
            learner.batch_start()
            self.one_batch(batch.to(self.root_device, non_blocking=True), number)
            learner.batch_done()
            if learner.trainer.should_stop:
                break

    @abstractmethod
    def one_batch(self, batch: Batch, number: int) -> None:
        """Train on one batch, which lies on the device."""


class _OneProcess(_AllBatches, SingleDeviceStrategy):
    """Leaves model and optimizer where they are: when training ends Lightning moves everything to the CPU and empties
    the GPU's cache of free memory, to begin again with the next task."""

    def one_batch(self, batch: Batch, number: int) -> None:
        # Entered anew at each step: mixed precision keeps 16-bit copies of the weights until it is left.
        with self.precision_plugin.train_step_context():
            self.lightning_module.training_step(batch, number)

    def backward(self, closure_loss: Tensor, *_: Any, **__: Any) -> None:
        """Without the hooks around it, which nobody here has."""
        scaler = getattr(self.precision_plugin, "scaler", None)
        (closure_loss if scaler is None else scaler.scale(closure_loss)).backward()

    def teardown(self) -> None:
        self.precision_plugin.teardown()
        self.checkpoint_io.teardown()


class _Processes(_AllBatches, DDPStrategy):
    """Several processes that average their gradients."""

    def _setup_model(self, model: torch.nn.Module) -> DistributedDataParallel:
        """In the stream of the steps: gradients that were made ready in another one, as Lightning does, are waited for
        in each backward pass."""
        return DistributedDataParallel(model, device_ids=self.determine_ddp_device_ids(), **self._ddp_kwargs)

    def one_batch(self, batch: Batch, number: int) -> None:
        """Through a forward call of its own, which makes the processes ready for one backward pass."""
        try:
            DDPStrategy.training_step(self, batch, number)
        except RuntimeError as error:
            if "Expected to have finished reduction" not in str(error):
                raise
            name = type(self.lightning_module.architecture).__name__
            raise ConfigError(
                f"architecture: a step of {name} left parameters without a gradient, which several processes have to "
                "be told of; set `may_idle = True` in its class, or training.devices: 1"
            ) from error
