"""One module a paper: its central claim as an experiment of minutes, the published figure beside the measured one."""

from .base import Bar, Experiment, Outcome, Reproduction, reproduce, reproductions

__all__ = ["Bar", "Experiment", "Outcome", "Reproduction", "reproduce", "reproductions"]
