"""Task sequences: text, images, diagnostics. Knows nothing of training."""
