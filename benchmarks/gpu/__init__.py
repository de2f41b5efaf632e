"""What holds, and how fast it is, on a GPU: ``python -m benchmarks gpu FOLDER [--device cpu]``."""
