"""Training: one loop on Accelerate, its settings, schedules, checkpoints and progress."""

from .checkpoint import checkpoints, find_model
from .comparison import Cell, Comparison, compare, load_comparison
from .compiling import allow_graphs
from .config import TrainingConfig
from .loop import TrainingDiverged, TrainingResult, check_run_folder, train
from .schedules import learning_rate
from .truncated import Window, windows

__all__ = [
    "Cell",
    "Comparison",
    "TrainingConfig",
    "TrainingDiverged",
    "TrainingResult",
    "Window",
    "allow_graphs",
    "check_run_folder",
    "checkpoints",
    "compare",
    "find_model",
    "learning_rate",
    "load_comparison",
    "train",
    "windows",
]
