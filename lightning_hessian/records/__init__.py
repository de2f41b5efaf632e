"""Measurements as numpy arrays and metadata, on disk and in event files."""
