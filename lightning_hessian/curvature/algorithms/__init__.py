"""Numerical linear algebra on operators: no network is known here."""
