"""Whether the numbers are true, and why not."""
