"""From a record to what loggers take: scalars for any logger, the rest for TensorBoard."""
