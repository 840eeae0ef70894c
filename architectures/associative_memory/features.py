"""The feature map φ of queries and keys: a memory that is linear in φ(k) may still be a polynomial of the key.

Polynomials let a matrix hold about as many pairs as φ has numbers (Behrouz et al. 2025, ATLAS, arXiv:2505.23735, where
φ holds the monomials of a key). Here a degree's features are products of linear forms: every product of `degree`
numbers of the key, or `rank` products of learned forms, so that the width stays bounded (low rank: our choice).

    poly     φ(k) = unit([x, p_2(x), …, p_degree(x)])                 x = unit(k)
    taylor   φ(k) = unit([c_0, c_1 x, c_2 p_2(x), …])                 c_i learned, 1 / √i! at first

With all products, ⟨p_i(x), p_i(y)⟩ = ⟨x, y⟩^i, so that before the last unit `taylor` begins as the Taylor polynomial of
exp(⟨x, y⟩). With `rank`, p_i(x) = (A_1 x) ⊙ … ⊙ (A_i x) / √rank equals it on average over normal A (Kar and Karnick
2012, arXiv:1201.6530), where A begins; the outer loss trains it. Shapes: see `state.py`; R features of a degree.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.architectures.associative_memory.rule import MemoryRule


class FeatureMap(nn.Module):
    """φ of every head, by a rule's `feature` and `polynomial`; has parameters where it learns."""

    def __init__(self, *, rule: MemoryRule, num_heads: int, key_size: int) -> None:
        super().__init__()
        self.kind, self.options = rule.feature, rule.polynomial
        powers, rank = self.kind in ("poly", "taylor"), self.options.rank
        count = self.options.degree if powers and rank and self.options.degree > 1 else 0
        self.factors = nn.ParameterList(nn.Parameter(torch.empty(num_heads, key_size, rank or 0)) for _ in range(count))
        terms = torch.empty(num_heads, self.options.degree + 1) if self.kind == "taylor" else None
        self.coefficients = None if terms is None else nn.Parameter(terms)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Normal forms, and the coefficients of the exponential function."""
        for factor in self.factors:
            nn.init.normal_(factor)
        if self.coefficients is not None:
            self.coefficients.copy_(torch.tensor([math.factorial(i) ** -0.5 for i in range(self.options.degree + 1)]))

    def forward(self, x_BHTD: Tensor) -> Tensor:
        """φ (B, H, T, width), width as `MemoryRule.feature_width` tells."""
        if self.kind == "elu":
            return F.elu(x_BHTD) + 1
        if self.kind == "identity":
            return x_BHTD
        x = F.normalize(x_BHTD, dim=-1)
        if self.kind == "unit":
            return x
        parts = self._powers(x)
        if self.coefficients is not None:
            weights = self.coefficients[:, :, None, None].to(x.dtype).unbind(1)
            parts = [weight * part for weight, part in zip(weights, [torch.ones_like(x[..., :1]), *parts], strict=True)]
        return F.normalize(torch.cat(parts, dim=-1), dim=-1)

    def _powers(self, x: Tensor) -> list[Tensor]:
        """x, p_2(x), … to the degree."""
        if not self.factors:
            powers = [x]
            for _ in range(1, self.options.degree):
                powers.append((powers[-1].unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2))
            return powers
        powers, product = [x], torch.ones_like(x[..., :1])
        for degree, factor in enumerate(self.factors, start=1):
            product = product * (x @ factor.to(x.dtype))
            if degree > 1:
                powers.append(product / math.sqrt(factor.shape[-1]))
        return powers
