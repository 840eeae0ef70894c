"""Pretrained causal language models of `transformers`."""
