"""Measuring models: bits per byte, what compressors reach on the same text, and curves."""

from .accuracy import Accuracy, accuracy
from .baselines import NGram, baselines, gzip_bits_per_byte, xz_bits_per_byte
from .bits_per_byte import bits_per_byte
from .dissect import Dissection, LinearPart, dissect
from .plots import plot_curves, plot_dissection, plot_loss_curve

__all__ = [
    "Accuracy",
    "Dissection",
    "LinearPart",
    "NGram",
    "accuracy",
    "baselines",
    "bits_per_byte",
    "dissect",
    "gzip_bits_per_byte",
    "plot_curves",
    "plot_dissection",
    "plot_loss_curve",
    "xz_bits_per_byte",
]
