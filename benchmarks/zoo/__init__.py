"""Operations, layers and networks of PyTorch and transformers, each measured and judged by differences of values."""
