"""Pretrained language models: `clplat run pretrained/tiny` on a CPU."""
