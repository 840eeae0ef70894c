"""How long the units of a network remember: exponentials fitted to the autocorrelation of their activity.

Source: Khajehabdollahi et al. 2024 (arXiv:2309.12927), τ_net; docs/timescales.md says why the two constants of a double
exponential are averaged here and not the slower one taken.
Shapes: T time steps, B trials, H units, L lags, G time constants, P pairs of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

FITTED_LAGS = 30
"""Largest lag that is fitted: short beside a trial, whose own mean biases long lags."""
SHORTEST, LONGEST, CONSTANTS = 0.1, 100.0, 150
"""Time constants that are tried, in steps, each 4.7 % above the one before. The upper bound is the source's."""


def autocorrelations(activity: Tensor, lags: int = FITTED_LAGS) -> Tensor:
    """Autocorrelation (lags + 1, H) of `activity` (T, B, H), each trial about its own mean, averaged over trials and
    divided by the variance; NaN for units that never change."""
    centred, steps = activity - activity.mean(0), len(activity)
    power = torch.fft.rfft(centred, n=steps + lags, dim=0).abs().square().mean(1)
    sums = torch.fft.irfft(power, n=steps + lags, dim=0)[: lags + 1]
    found = sums / torch.arange(steps, steps - lags - 1, -1, device=sums.device).unsqueeze(1)
    return found / found[0].where(found[0] > 1e-9 * activity.square().mean((0, 1)), torch.nan)


def network_timescales(activity: Tensor) -> Tensor:
    """τ_net (H,) in steps: the time constant of one exponential, or the mean of two weighted by their amplitudes where
    Akaike's criterion finds their sum better; NaN for units that never change.

    Least squares over a grid of time constants, whose best amplitudes, none of them negative, have a closed form.
    """
    curves_LH = autocorrelations(activity).double()
    ends = torch.tensor([SHORTEST, LONGEST], dtype=torch.float64).log10().tolist()
    taus_G = torch.logspace(*ends, CONSTANTS, dtype=torch.float64, device=activity.device)
    decays_GL = torch.exp(-torch.arange(len(curves_LH), device=taus_G.device) / taus_G.unsqueeze(1))
    alike_GG, match_GH, size_H = decays_GL @ decays_GL.T, decays_GL @ curves_LH, curves_LH.square().sum(0)
    one_H, place_H = (size_H - match_GH.clamp(min=0).square() / alike_GG.diagonal().unsqueeze(1)).min(0)
    two_H, mean_H = _two(taus_G, alike_GG, match_GH, size_H)
    # Akaike: n log(misfit / n) + 2k, with two parameters and four.
    better = len(curves_LH) * (two_H / one_H).log() + 2 * (4 - 2) < 0
    return torch.where(better, mean_H, taus_G[place_H]).where(size_H.isfinite(), torch.nan)


def _two(taus_G: Tensor, alike_GG: Tensor, match_GH: Tensor, size_H: Tensor) -> tuple[Tensor, Tensor]:
    """Least misfit (H,) of a sum of two exponentials, and their mean time constant weighted by amplitude (H,)."""
    first, second = torch.triu_indices(*alike_GG.shape, 1, device=alike_GG.device)
    own_first, own_second = (alike_GG.diagonal()[part].unsqueeze(1) for part in (first, second))
    shared, of_first, of_second = alike_GG[first, second].unsqueeze(1), match_GH[first], match_GH[second]
    scale = own_first * own_second - shared.square()
    amount_first_PH = (own_second * of_first - shared * of_second) / scale
    amount_second_PH = (own_first * of_second - shared * of_first) / scale
    misfit_PH = size_H - amount_first_PH * of_first - amount_second_PH * of_second
    allowed = (amount_first_PH >= 0) & (amount_second_PH >= 0)
    best_H, pair_H = misfit_PH.clamp(min=1e-12).where(allowed, torch.inf).min(0)
    amounts = torch.stack([amount.gather(0, pair_H.unsqueeze(0))[0] for amount in (amount_first_PH, amount_second_PH)])
    taus = taus_G[torch.stack([first[pair_H], second[pair_H]])]
    return best_H, (amounts * taus).sum(0) / amounts.sum(0)
