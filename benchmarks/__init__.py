"""Times this package against what one would otherwise use; ``python -m benchmarks`` runs everything."""
