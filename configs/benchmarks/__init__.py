"""Studies on the benchmarks of the literature: `clplat run benchmarks/split_mnist`."""
