"""Proof that a module trains alike on every layout."""
