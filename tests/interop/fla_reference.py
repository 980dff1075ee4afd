"""Logits of small models of flash-linear-attention, on the CPU: its Triton kernels in the interpreter.

    python tests/interop/fla_reference.py > tests/interop/fla_reference.json

The weights are a function of their names, so that the file holds configurations, shapes and logits alone.
"""

from __future__ import annotations

import json
import math
import os
import sys
import zlib

import torch

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5]
BASE = {"hidden_size": 16, "num_hidden_layers": 3, "vocab_size": 11, "intermediate_size": 24, "norm_eps": 1e-5}
ATTENTION = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "window_size": 4, "rope_theta": 100.0}
CASES = {
    "gla": ("GLA", {"num_heads": 2, "num_kv_heads": 1}),
    "gla-conv": ("GLA", {"num_heads": 2, "use_short_conv": True, "expand_k": 1.0, "tie_word_embeddings": True}),
    "gla-attention": ("GLA", {"num_heads": 2, "attn": ATTENTION}),
    "retnet": ("RetNet", {"num_heads": 2, "intermediate_size": None}),
    "delta_net": ("DeltaNet", {"num_heads": 2, "expand_k": 0.5, "use_gate": True, "allow_neg_eigval": True}),
    "delta_net-plain": ("DeltaNet", {"num_heads": 2, "use_short_conv": False}),
    "gated_deltanet": ("GatedDeltaNet", {"num_heads": 1, "num_v_heads": 2, "head_dim": 6, "conv_size": 3}),
    "kda": ("KDA", {"num_heads": 2, "head_dim": 4, "allow_neg_eigval": True}),
    "kda-bounded": ("KDA", {"num_heads": 2, "head_dim": 4, "safe_gate": True, "lower_bound": -4.0}),
    "hgrn2": ("HGRN2", {"expand_ratio": 4}),
    # Of one group: with more, its path without a GPU gives the heads other groups than its kernels do.
    "mamba2": ("Mamba2", {"head_dim": 8, "state_size": 6, "intermediate_size": None}),
}


def weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Numbers in (-1/2, 1/2) that follow from names and places, around 1 for the weights of norms."""
    found = {}
    for name, shape in shapes.items():
        places = torch.arange(math.prod(shape), dtype=torch.float64)
        x = (zlib.crc32(name.encode()) % 1000 + 12.9898 * places).sin() * 43758.5453
        x = x - x.floor() - 0.5
        if "norm" in name and len(shape) == 1:
            x = x + 1
        found[name] = x.float().reshape(shape)
    return found


def main() -> None:
    os.environ |= {"TRITON_INTERPRET": "1", "FLA_CONV_BACKEND": "triton"}
    from triton.runtime.autotuner import Autotuner

    Autotuner._bench = lambda self, *args, **kwargs: [0.0, 0.0, 0.0]  # nothing to time here: the first configuration
    import fla.layers.attn
    from fla import models

    def flash(q, k, v, causal, window_size):
        distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        mask = (distance >= 0) & (distance <= window_size[0] if window_size[0] >= 0 else True)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return o.transpose(1, 2)

    fla.layers.attn.flash_attn_func = flash  # that library has no CPU build
    result = {}
    for case, (name, options) in CASES.items():
        fields = {key: value for key, value in {**BASE, **options}.items() if value is not None}
        config = getattr(models, f"{name}Config")(**fields, fuse_cross_entropy=False)
        model = getattr(models, f"{name}ForCausalLM")(config).eval()
        shapes = {key: list(x.shape) for key, x in model.state_dict().items()}
        if config.tie_word_embeddings:
            del shapes["lm_head.weight"]
        model.load_state_dict(weights(shapes), strict=not config.tie_word_embeddings)
        with torch.no_grad():
            logits = model(torch.tensor([IDS]), use_cache=False).logits[0]
        values = json.loads(config.to_json_string())
        values.pop("transformers_version")
        rounded = [[round(float(x), 6) for x in row] for row in logits]
        result[case] = {"config": values, "shapes": shapes, "logits": rounded}
    lines = (f"{json.dumps(case)}: {json.dumps(found)}" for case, found in result.items())
    sys.stdout.write("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
