"""Coefficients to responses to a choice."""
