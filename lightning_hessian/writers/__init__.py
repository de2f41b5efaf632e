"""From a record to what loggers take: scalars for any logger, pictures for some, the rest for TensorBoard; and files."""
