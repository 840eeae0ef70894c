"""The selective scan of Mamba: a linear recurrence whose decay and inputs depend on the token."""

from clplat.kernels.selective_scan.op import selective_scan
from clplat.kernels.selective_scan.reference import token_loop

__all__ = ["selective_scan", "token_loop"]
