"""TRC² beside its rivals: `clplat run trc2/tiny` on a CPU, the other studies on a GPU."""
