"""`python -m benchmarks`: what every op costs, beside its peers."""
