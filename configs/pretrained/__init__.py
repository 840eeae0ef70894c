"""Pretrained language models: `clplat run pretrained/tiny`, `book_tiny` and `dialogue_tiny` on a CPU."""
