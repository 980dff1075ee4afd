"""The engines: pure functions on tensors, one folder each. Importing this package registers all of them."""

from .attention import AttentionState, attention, rotary
from .conv import ConvState, conv
from .core import Segments, backend, get_op, ops, value_checks
from .decay import DecayState, MLSTMState, decay, mlstm
from .delta import DeltaState, delta, delta_transition, dplr

__all__ = [
    "AttentionState",
    "ConvState",
    "DecayState",
    "DeltaState",
    "MLSTMState",
    "Segments",
    "attention",
    "backend",
    "conv",
    "decay",
    "delta",
    "delta_transition",
    "dplr",
    "get_op",
    "mlstm",
    "ops",
    "rotary",
    "value_checks",
]
