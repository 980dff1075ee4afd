"""The engines: pure functions on tensors, one folder each. Importing this package registers all of them."""

from .attention import AttentionState, attention, rotary
from .cell import (
    CellState,
    M2RNNState,
    NewtonResult,
    ParaState,
    cell,
    cell_state,
    check_step,
    m2rnn,
    newton,
    paragru,
    paralstm,
    unroll,
)
from .conv import ConvState, conv
from .core import Segments, backend, get_op, ops, value_checks
from .decay import DecayState, MLSTMState, decay, mlstm
from .delta import DeltaState, delta, delta_transition, dplr
from .lti import LTIState, lti, lti_diagonal
from .norm import gated_norm
from .scan import ScanState, SoftmaxScanState, minmax_scan, scan, selective_scan, softmax_scan

__all__ = [
    "AttentionState",
    "CellState",
    "ConvState",
    "DecayState",
    "DeltaState",
    "LTIState",
    "M2RNNState",
    "MLSTMState",
    "NewtonResult",
    "ParaState",
    "ScanState",
    "Segments",
    "SoftmaxScanState",
    "attention",
    "backend",
    "cell",
    "cell_state",
    "check_step",
    "conv",
    "decay",
    "delta",
    "delta_transition",
    "dplr",
    "gated_norm",
    "get_op",
    "lti",
    "lti_diagonal",
    "m2rnn",
    "minmax_scan",
    "mlstm",
    "newton",
    "ops",
    "paragru",
    "paralstm",
    "rotary",
    "scan",
    "selective_scan",
    "softmax_scan",
    "unroll",
    "value_checks",
]
