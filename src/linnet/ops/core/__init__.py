"""What every engine shares: packing, state tuples, input checks, the registry and the choice of a backend."""

from .checks import (
    Shapes,
    check_floating,
    check_log_decay,
    check_not_negative,
    check_segments,
    common_dtype,
    no_autocast,
    value_checks,
)
from .differentiable import differentiable
from .registry import BACKENDS, Case, Cost, Identity, Op, backend, get_op, ops, register_op, resolve_backend
from .segments import Segments, chunk_table, uploaded
from .state import (
    detach,
    following,
    join_rows,
    map_state,
    named_tensors,
    overwriting_states,
    repeat_rows,
    select_rows,
    state_bytes,
    state_tensors,
    to,
)

__all__ = [
    "BACKENDS",
    "Case",
    "Cost",
    "Identity",
    "Op",
    "Segments",
    "Shapes",
    "backend",
    "check_floating",
    "check_log_decay",
    "check_not_negative",
    "check_segments",
    "chunk_table",
    "common_dtype",
    "detach",
    "differentiable",
    "following",
    "get_op",
    "join_rows",
    "map_state",
    "named_tensors",
    "no_autocast",
    "ops",
    "overwriting_states",
    "register_op",
    "repeat_rows",
    "resolve_backend",
    "select_rows",
    "state_bytes",
    "state_tensors",
    "to",
    "uploaded",
    "value_checks",
]
