"""TRC²: columns whose queries a thalamic signal modulates, and a hippocampal store of what was surprising."""
