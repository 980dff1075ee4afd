"""The engines: pure functions on tensors, one folder each. Importing this package registers all of them."""

from .attention import AttentionState, attention, rotary
from .conv import ConvState, conv
from .core import Segments, backend, get_op, ops, value_checks
from .decay import DecayState, MLSTMState, decay, mlstm
from .lti import LTIState, lti, lti_diagonal

__all__ = [
    "AttentionState",
    "ConvState",
    "DecayState",
    "LTIState",
    "MLSTMState",
    "Segments",
    "attention",
    "backend",
    "conv",
    "decay",
    "get_op",
    "lti",
    "lti_diagonal",
    "mlstm",
    "ops",
    "rotary",
    "value_checks",
]
