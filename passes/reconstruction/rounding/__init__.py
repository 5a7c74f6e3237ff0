"""Rounding rules."""
