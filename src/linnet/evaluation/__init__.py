"""Measuring models: bits per byte, what compressors reach on the same text, and curves."""

from .baselines import NGram, baselines, gzip_bits_per_byte, xz_bits_per_byte
from .bits_per_byte import bits_per_byte
from .plots import plot_loss_curve, plot_speed

__all__ = [
    "NGram",
    "baselines",
    "bits_per_byte",
    "gzip_bits_per_byte",
    "plot_loss_curve",
    "plot_speed",
    "xz_bits_per_byte",
]
