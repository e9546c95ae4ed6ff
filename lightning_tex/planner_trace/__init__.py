"""A dry run of a recipe at any world size, in one process, without its memory."""

from lightning_tex.planner_trace.trace import Trace, trace

__all__ = ["Trace", "trace"]
