"""One long sequence, or one large model, over several processes.

For sequences, of which each process holds a slice, there are two ways. The engines of :mod:`linnet.parallel.ops` hand
on what their slices do to a state: every process works out the transition of its slice, the transitions are exchanged,
and all slices are then computed at the same time.
:class:`ContextParallel` runs a whole decoder of any mixers: the state of every layer goes from process to process, and
while one process works on a layer of its slice, the next one works on the layer below; no process waits once the
pipeline is full.

For models, :func:`tensor_parallel` gives every process some of the heads of each mixer.

All are exact: outputs, gradients and states are those of one process.
"""

from .model import ContextParallel, shard, sum_gradients
from .tensor import tensor_parallel

__all__ = ["ContextParallel", "shard", "sum_gradients", "tensor_parallel"]
