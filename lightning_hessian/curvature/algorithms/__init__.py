"""Numerical linear algebra on operators: independent of any network."""
