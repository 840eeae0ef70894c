"""How a test on the CPU finds what would make an accelerator be waited for."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class NoQuestions(TorchDispatchMode):
    """Fails where a value, or a size that depends on values, has to come to the host."""

    asking = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.asking, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))
