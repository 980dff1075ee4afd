"""linnet: every parallelizable recurrent sequence model over a few fast engines."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public names and the module each lives in. They load on first use, so that `import linnet` stays instant.
_PUBLIC = {
    "Decoder": "linnet.models",
    "DecoderConfig": "linnet.models",
    "Segments": "linnet.ops",
    "attention": "linnet.ops",
    "backend": "linnet.ops",
    "build_mixer": "linnet.mixers",
    "conv": "linnet.ops",
    "decay": "linnet.ops",
    "mixers": "linnet.mixers",
    "mlstm": "linnet.ops",
    "ops": "linnet.ops",
    "value_checks": "linnet.ops",
}
__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from linnet.mixers import build_mixer, mixers
    from linnet.models import Decoder, DecoderConfig
    from linnet.ops import Segments, attention, backend, conv, decay, mlstm, ops, value_checks


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'linnet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
