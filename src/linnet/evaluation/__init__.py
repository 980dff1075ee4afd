"""Measuring models: bits per byte, what compressors reach on the same text, and curves."""

from .baselines import NGram, baselines, gzip_bits_per_byte, xz_bits_per_byte
from .bits_per_byte import bits_per_byte
from .dissection import Dissection, LinearPart, dissect
from .exercises import DrawnExercise, Exercise, TaskExercise, TextExercise, build_exercise
from .language import Bucket, by_position, copy_bits, question_score, swap_accuracy
from .plots import plot_curves, plot_dissection, plot_loss_curve, plot_speed
from .scoring import Accuracy, Divergence, accuracy, divergence

__all__ = [
    "Accuracy",
    "Bucket",
    "Dissection",
    "Divergence",
    "DrawnExercise",
    "Exercise",
    "LinearPart",
    "NGram",
    "TaskExercise",
    "TextExercise",
    "accuracy",
    "baselines",
    "bits_per_byte",
    "build_exercise",
    "by_position",
    "copy_bits",
    "dissect",
    "divergence",
    "gzip_bits_per_byte",
    "plot_curves",
    "plot_dissection",
    "plot_loss_curve",
    "plot_speed",
    "question_score",
    "swap_accuracy",
    "xz_bits_per_byte",
]
