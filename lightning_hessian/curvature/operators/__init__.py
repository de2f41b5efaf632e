"""Derivatives of a batch of targets, and symmetric operators known by their matrix-vector products."""
