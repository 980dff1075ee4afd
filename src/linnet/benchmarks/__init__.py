"""Speed and memory of the ops, beside other libraries' kernels for the same ops.

One comparison is an op, a pass (forward, or forward and backward) and a shape; its implementations run in turn on the
same inputs. `linnet bench` is the command; results that documents quote are in ``benchmarks/results`` of the
repository.
"""
