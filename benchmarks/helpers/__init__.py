"""What the benchmarks share: weights on disk, the two sides, the machine, the table."""
