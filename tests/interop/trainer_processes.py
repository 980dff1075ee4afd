"""transformers' Trainer on a decoder, in one process or, under torchrun, with sharded weights (FSDP 2).

It shards on accelerators only. Arguments: the folder to write, and the rows of a step that each process reads.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path

import torch
import transformers

from linnet.interop.transformers import LinnetForCausalLM
from linnet.models import Decoder, DecoderConfig, no_decay_names

faulthandler.dump_traceback_later(100, exit=True)
STEPS = 4


class Trainer(transformers.Trainer):
    def get_decay_parameter_names(self, model):
        return [name for name, _ in model.named_parameters() if name not in no_decay_names(model)]


def main(out: Path, rows: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # No norm behind the mixer, see tests/training/test_distributed.py.
    mixers = ["linear_attention(num_heads=2)"]
    shape = {"vocab_size": 40, "d_model": 16, "num_layers": 2, "mlp_hidden": 16, "init_std": 0.3}
    model = LinnetForCausalLM.wrap(Decoder(DecoderConfig(mixers=mixers, **shape))).train()
    generator = torch.Generator().manual_seed(1)
    data = [{"input_ids": (row := torch.randint(40, (12,), generator=generator)), "labels": row} for _ in range(40)]
    sharded = {}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sharded = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": 2}}
    arguments = transformers.TrainingArguments(
        str(out / "checkpoints"), max_steps=STEPS, per_device_train_batch_size=rows, learning_rate=1e-2,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, lr_scheduler_type="constant",
        weight_decay=0.1, max_grad_norm=1.0, **sharded,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(str(out / "saved"))
    if trainer.is_world_process_zero():
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        (out / "losses.json").write_text(json.dumps(losses))
        decayed = [group["weight_decay"] for group in trainer.optimizer.param_groups for _ in group["params"]]
        assert sum(decay > 0 for decay in decayed) == len(trainer.get_decay_parameter_names(trainer.model))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
