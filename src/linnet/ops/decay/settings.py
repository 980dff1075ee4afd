"""Settings of the decay kernels: chunks, tiles, warps and pipeline depth, by the sizes of a head; T never enters."""

from __future__ import annotations

from functools import cache

import torch

# How strongly half a chunk may forget, in log2, before it is walked token by token: the factors of a vector gate reach
# 2^limit and their products over masked pairs its square. fp16 has little range. In fp32, where digits would show which
# gates come later, every chunk is walked so. With 128 channels that is faster; with 64 and weak gates it took up to 2.2
# times as long forward and 1.6 times with the backward pass.
LIMITS = {torch.bfloat16: 60.0, torch.float16: 4.0, torch.float32: -1.0}

# The dtype in which the normaliser is one more channel of the payload, of ones: then it is rounded as the numerator is,
# with which it and its gradient may cancel; and each pair of tokens sums its own gates.
EXACT = torch.float32

# What one warp of the kernels around a pass takes together, 32 numbers a thread.
NUMBERS = 1024


# Triton's own helpers of this kind cost more on the host than a small launch.


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def chunk_length(dtype: torch.dtype) -> int:
    """Tokens of a chunk, the same in every pass of a call."""
    return 16 if dtype == torch.float32 else 64


def pairs_stored(K: int, V: int, dtype: torch.dtype) -> bool:
    """Whether pairs of tokens under a scalar gate are made once and stored. Measured on Hopper: up to 128 channels the
    passes are faster that make them themselves."""
    return max(K, V) > 128 and dtype != EXACT


def gradients_together(K: int, V: int, dtype: torch.dtype) -> bool:
    """Whether the gradients of keys and values come in one walk where no token has a gate, weight or normaliser: one
    program has room for both states. Measured on Hopper; with scalar gates two walks take less than one."""
    return K == V == 64 and dtype != EXACT


def scale_apart(dtype: torch.dtype) -> bool:
    """Whether a state may be kept without the scale of what is written to it. fp16 has little range, and fp32 chunks
    that are walked token by token."""
    return dtype == torch.bfloat16


@cache
def launch_settings(
    DR: int,
    DP: int,
    C: int,
    dtype: torch.dtype,
    split: bool,
    stored: bool = False,
    plain: bool = False,
    both: bool = False,
) -> dict[str, int]:
    """Tile sizes, warps and pipeline depth, by the size of the state and how it is walked; T never enters.

    In 16 bits a tile of 64 or more reading channels goes with 64 of the payload: narrower ones come out wrong on
    Hopper, or end in illegal accesses, where channels are no multiple of 16. Measured there: pieces (split) run two
    programs a multiprocessor with two stages, whole sequences one program with three, or, ``plain``, where nothing but
    tiles is fetched, with four over 128 and five over 64 reading channels, four where ``both`` gradients are read; from
    256 reading channels on two warp groups share the state, unless pairs are ``stored``: then one has room for 256.
    With 512 a second stage has no room.
    """
    BR, widest = max(16, power_of_2(DR)), max(16, power_of_2(DP))
    if dtype == torch.float32:
        return {"BR": BR, "BP": min(32 if BR <= 128 else 16, widest), "C": C, "num_warps": 4, "num_stages": 2}
    BP = min(64, widest) if BR < 64 else 64
    if BR <= 128:
        stages = 2 if split and BR == 128 else 3
        if plain and not split and DR in (64, 128):
            stages = 4 if DR == 128 or both else 5
        return {"BR": BR, "BP": BP, "C": C, "num_warps": 4, "num_stages": stages}
    warps = 4 if stored and BR == 256 else 8
    return {"BR": BR, "BP": BP, "C": C, "num_warps": warps, "num_stages": 1 if BR == 512 else 2}
