"""Studies of what a memory can hold and rewrite, on generated rows: `clplat run diagnostics/mqar`."""
