"""Engine `scan`: vector states and elementwise associative recurrences, in parallel over time.

Serves S4D and S5, Mamba, HGRN, minGRU, minLSTM, RG-LRU, Aaren, MinMax cascades, and the linear systems inside Newton's
method for nonlinear cells.
"""

from __future__ import annotations

from .recurrence import cost, minmax_scan, scan
from .selective import selective_scan
from .softmax import softmax_scan
from .state import ScanState, SoftmaxScanState

__all__ = ["ScanState", "SoftmaxScanState", "cost", "minmax_scan", "scan", "selective_scan", "softmax_scan"]


from . import cases as _cases  # noqa: F401  (registers the ops and their sample inputs)
