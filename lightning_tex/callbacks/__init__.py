"""Callbacks: sight of expert load, throughput, and a closing summary."""

from lightning_tex.callbacks.experts import ExpertMonitor
from lightning_tex.callbacks.summary import RunSummary
from lightning_tex.callbacks.throughput import Throughput

__all__ = ["ExpertMonitor", "RunSummary", "Throughput"]
