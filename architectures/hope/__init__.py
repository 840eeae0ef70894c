"""Hope: memories that make their own keys, values, step sizes and targets while they read. See docs/hope.md."""
