"""The ways to a spectrum, the plan that chooses one, and its execution."""
