"""The continuum memory system: feed-forward levels that learn at their own periods (docs/continuum_memory.md)."""
