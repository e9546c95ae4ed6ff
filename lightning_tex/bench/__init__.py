"""Measuring a recipe where it runs: ``lightning-tex bench``."""
