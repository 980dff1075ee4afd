"""linnet: every parallelizable recurrent sequence model over a few fast engines."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linnet import mixers, models, ops
    from linnet.mixers import build_mixer
    from linnet.models import GRU, LSTM, RNN, Decoder, DecoderConfig, generate
    from linnet.ops import (
        Segments,
        attention,
        backend,
        cell,
        check_step,
        conv,
        decay,
        delta,
        dplr,
        lti,
        lti_diagonal,
        m2rnn,
        minmax_scan,
        mlstm,
        newton,
        paragru,
        paralstm,
        scan,
        selective_scan,
        softmax_scan,
        unroll,
        value_checks,
    )

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Decoder",
    "DecoderConfig",
    "Segments",
    "__version__",
    "attention",
    "backend",
    "build_mixer",
    "cell",
    "check_step",
    "conv",
    "decay",
    "delta",
    "dplr",
    "generate",
    "lti",
    "lti_diagonal",
    "m2rnn",
    "minmax_scan",
    "mixers",
    "mlstm",
    "models",
    "newton",
    "ops",
    "paragru",
    "paralstm",
    "scan",
    "selective_scan",
    "softmax_scan",
    "unroll",
    "value_checks",
]

# The module each public name lives in. They load on first use, so that `import linnet` stays instant.
_MODULES = {
    "linnet.mixers": ("build_mixer",),
    "linnet.models": ("GRU", "LSTM", "RNN", "Decoder", "DecoderConfig", "generate"),
    "linnet.ops": (
        "Segments",
        "attention",
        "backend",
        "cell",
        "check_step",
        "conv",
        "decay",
        "delta",
        "dplr",
        "lti",
        "lti_diagonal",
        "m2rnn",
        "minmax_scan",
        "mlstm",
        "newton",
        "paragru",
        "paralstm",
        "scan",
        "selective_scan",
        "softmax_scan",
        "unroll",
        "value_checks",
    ),
}


def __getattr__(name: str) -> Any:
    if f"linnet.{name}" in _MODULES:
        return import_module(f"linnet.{name}")
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'linnet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
