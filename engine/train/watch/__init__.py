"""Who watches over a run: each rank publishes its heart, sees its neighbours' processes end, and ends with the first
fault that any rank has seen, in one line."""

from engine.train.watch.pulse import Limits
from engine.train.watch.watch import Watch

__all__ = ["Limits", "Watch"]
