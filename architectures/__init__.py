"""Models: an `nn.Module` from a batch to logits, auxiliary losses and carried state."""
