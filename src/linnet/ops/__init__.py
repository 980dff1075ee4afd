"""The engines: pure functions on tensors, one folder each. Importing this package registers all of them."""

from .attention import AttentionState, attention, rotary
from .cell import CellState, cell, cell_state
from .conv import ConvState, conv
from .core import Segments, backend, get_op, ops, value_checks
from .decay import DecayState, MLSTMState, decay, mlstm

__all__ = [
    "AttentionState",
    "CellState",
    "ConvState",
    "DecayState",
    "MLSTMState",
    "Segments",
    "attention",
    "backend",
    "cell",
    "cell_state",
    "conv",
    "decay",
    "get_op",
    "mlstm",
    "ops",
    "rotary",
    "value_checks",
]
