"""Test-time memories: layers that learn pairs of keys and values while they read. See docs/memories.md."""
