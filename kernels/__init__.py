"""Tensor operations of the memory layers: token-loop reference, chunked PyTorch, Triton. Knows no models."""
