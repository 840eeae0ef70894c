"""Studies a person can run: `clplat run quickstart`, or a copy of one of these files."""
