"""Callbacks that log the experts' load, throughput and communication, show progress, keep predictions, sum up."""

from lightning_tex.callbacks.communication import CommunicationMonitor
from lightning_tex.callbacks.experts import ExpertMonitor
from lightning_tex.callbacks.late_progress import LateProgress
from lightning_tex.callbacks.predictions import PredictionWriter, read_predictions
from lightning_tex.callbacks.progress_bar import OneLineProgressBar
from lightning_tex.callbacks.routing_schedule import RoutingSchedule
from lightning_tex.callbacks.sequence_length import SequenceLengthSchedule
from lightning_tex.callbacks.source_losses import SourceLosses
from lightning_tex.callbacks.summary import RunSummary
from lightning_tex.callbacks.throughput import Throughput

__all__ = [
    "CommunicationMonitor",
    "ExpertMonitor",
    "LateProgress",
    "OneLineProgressBar",
    "PredictionWriter",
    "RoutingSchedule",
    "RunSummary",
    "SequenceLengthSchedule",
    "SourceLosses",
    "Throughput",
    "read_predictions",
]
