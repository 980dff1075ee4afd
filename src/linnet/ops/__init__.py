"""The engines: pure functions on tensors, one folder each. Importing this package registers all of them."""

from .attention import AttentionState, attention, rotary
from .conv import ConvState, conv
from .core import Segments, backend, get_op, ops, value_checks
from .decay import DecayState, MLSTMState, decay, mlstm
from .delta import DeltaState, delta, delta_transition, dplr
from .lti import LTIState, lti, lti_diagonal
from .scan import ScanState, SoftmaxScanState, minmax_scan, scan, selective_scan, softmax_scan

__all__ = [
    "AttentionState",
    "ConvState",
    "DecayState",
    "DeltaState",
    "LTIState",
    "MLSTMState",
    "ScanState",
    "Segments",
    "SoftmaxScanState",
    "attention",
    "backend",
    "conv",
    "decay",
    "delta",
    "delta_transition",
    "dplr",
    "get_op",
    "lti",
    "lti_diagonal",
    "minmax_scan",
    "mlstm",
    "ops",
    "rotary",
    "scan",
    "selective_scan",
    "softmax_scan",
    "value_checks",
]
