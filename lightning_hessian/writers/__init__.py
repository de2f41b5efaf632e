"""From a record to files and to what loggers take: scalars for any, pictures for some, the rest for TensorBoard."""
