"""One long sequence over several processes, each of which holds a slice of it.

Two ways. The engines of :mod:`linnet.parallel.ops` hand on what their slices do to a state: every process works out the
transition of its slice, the transitions are exchanged, and all slices are then computed at the same time.
:class:`ContextParallel` runs a whole decoder of any mixers: the state of every layer goes from process to process, and
while one process works on a layer of its slice, the next one works on the layer below; no process waits once the
pipeline is full.

Both are exact: outputs, gradients and states are those of one process.
"""

from .model import ContextParallel, shard, sum_gradients

__all__ = ["ContextParallel", "shard", "sum_gradients"]
