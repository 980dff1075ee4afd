"""Training: one loop on Accelerate, its settings, schedules, checkpoints and progress."""

from .checkpoint import checkpoints, find_model
from .config import TrainingConfig
from .loop import TrainingDiverged, TrainingResult, check_run_folder, train
from .schedules import learning_rate

__all__ = [
    "TrainingConfig",
    "TrainingDiverged",
    "TrainingResult",
    "check_run_folder",
    "checkpoints",
    "find_model",
    "learning_rate",
    "train",
]
