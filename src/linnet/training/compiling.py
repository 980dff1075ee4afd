"""Room for the graphs of ``torch.compile``."""

from __future__ import annotations

__all__ = ["allow_graphs"]

_GRAPHS = 8  # of one layer: training and evaluating, one document in a row and several, their number fixed and free


def allow_graphs(layers: int) -> None:
    """Let ``torch.compile`` keep graphs for so many layers.

    It counts the graphs of all layers together, because they are of one class, and stops at 8 of them by default: with
    ``fullgraph`` it fails, and otherwise it runs the layers beyond as if they were not compiled, and hardly says so.
    Layers that compute the same share their graphs; a hybrid, or packed documents, need more than 8.

    Args:
        layers: how many are compiled one by one. A limit that is higher already stays.
    """
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, _GRAPHS * layers)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, _GRAPHS * layers)
