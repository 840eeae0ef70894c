"""Exact recursive least squares: the linear memory that no step rule can beat on what it has read."""

from clplat.kernels.least_squares.interface import least_squares
from clplat.kernels.least_squares.reference import SquaresState, ridge_solution

__all__ = ["SquaresState", "least_squares", "ridge_solution"]
