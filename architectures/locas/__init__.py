"""Locas: side memories beside the feed-forward layers of a frozen language model (Lu et al. 2026, arXiv:2602.05085)."""

from clplat.architectures.locas.export import dense, export
from clplat.architectures.locas.model import LocasModel

__all__ = ["LocasModel", "dense", "export"]
