"""torchtitan's trainer on a linnet decoder, processes with sharded weights, against a plain loop.

It expects an accelerator; what it asks one for is answered here for the CPU.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from forked import begin, fork

torch._utils._get_available_device_type = lambda: "cpu"
for name, answer in {
    "get_device_name": "CPU",
    "get_device_properties": SimpleNamespace(total_memory=1 << 30),
    "memory_stats": {},
    "reset_peak_memory_stats": None,
    "empty_cache": None,
}.items():
    setattr(torch.cpu, name, lambda *_, answer=answer: answer)
dist.barrier = lambda *_, barrier=dist.barrier, **__: barrier()
if not hasattr(dist, "set_timeout"):  # new in torch 2.15
    dist.set_timeout = lambda *_, **__: None

from torchtitan.components.checkpoint import CheckpointManager  # noqa: E402
from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.loss import ChunkedLossWrapper  # noqa: E402
from torchtitan.components.metrics import MetricsProcessor  # noqa: E402
from torchtitan.components.optimizer import LRSchedulersContainer  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.config import CompileConfig, ConfigManager, DebugConfig, ParallelismConfig, TrainingConfig  # noqa: E402
from torchtitan.distributed.activation_checkpoint import FullAC  # noqa: E402

from linnet.interop import torchtitan as bridge  # noqa: E402
from linnet.models import Decoder, DecoderConfig, parameter_groups  # noqa: E402
from linnet.ops import Segments  # noqa: E402

T, STEPS, LR = 12, 3, 0.05
EPS = 0.1  # so large that AdamW does not blow up the rounding of small gradients
SHAPE = DecoderConfig(
    vocab_size=11,
    d_model=16,
    num_layers=3,
    mixers=["gated_deltanet(num_heads=2, head_dim=4)", "gla(num_heads=2)", "attention(num_heads=2)"],
    mlp_hidden=16,
    init_std=0.2,
)
ALIKE = replace(SHAPE, num_layers=2, mixers=["gla(num_heads=2)"])  # layers that share their graphs
LENGTHS = [[5, 7], [12], [1, 8, 3]]  # of the documents in a row, by step


def batch(step: int, rank: int):
    generator = torch.Generator().manual_seed(10 * step + rank)
    tokens = torch.randint(11, (2, T + 1), generator=generator)
    positions = torch.cat([torch.arange(n) for n in LENGTHS[step]]).expand(2, -1)
    labels = tokens[:, 1:].clone()
    labels[:, : 2 + rank] = -100
    return tokens[:, :-1], positions, labels


class Data(BaseDataLoader):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Config, *, dp_rank: int, **_):
        self.rank, self.step = dp_rank, 0

    def __iter__(self):
        while self.step < STEPS:
            tokens, positions, labels = batch(self.step, self.rank)
            self.step += 1
            yield {"input": tokens, "positions": positions}, labels

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


class Tokens(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_):
        super().__init__()

    def encode(self, *_, **__):
        return []

    def decode(self, *_, **__):
        return ""

    def get_vocab_size(self):
        return 11


def tiny(shape: DecoderConfig = SHAPE):
    config = bridge.trainer_config(
        shape,
        lr=LR,
        dataloader=Data.Config(),
        tokenizer=Tokens.Config(),
        debug=DebugConfig(seed=0),
        training=TrainingConfig(
            local_batch_size=2, seq_len=T, steps=STEPS, mixed_precision_param="float32", disable_cuda_graphs=True
        ),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0, min_lr_factor=1.0),
        metrics=MetricsProcessor.Config(log_freq=1),
        checkpoint=CheckpointManager.Config(
            enable=True, interval=STEPS, last_save_model_only=True, last_save_in_hf=True
        ),
    )
    for group in config.optimizer.param_groups:
        group.optimizer_kwargs["eps"] = EPS
    return config


def chunked():
    config = tiny()
    config.loss = ChunkedLossWrapper.Config(num_chunks=2, loss_fn=config.loss)
    config.activation_checkpoint = FullAC.Config()
    return config


def replicated():
    config = tiny()
    config.parallelism = ParallelismConfig(data_parallel_replicate_degree=2, data_parallel_shard_degree=2)
    return config


def compiled():
    config = tiny(ALIKE)
    config.activation_checkpoint = FullAC.Config()
    config.compile = CompileConfig(enable=True, components=["model"], backend="aot_eager")  # C++ takes minutes
    return config


def reference(shape: DecoderConfig, state: dict[str, torch.Tensor], processes: int) -> Decoder:
    model = Decoder(shape)
    model.load_state_dict(state)
    optimizer = torch.optim.AdamW(parameter_groups(model.train(), 0.1, lr=LR), LR, (0.9, 0.95), EPS)
    for step in range(STEPS):
        tokens, _, labels = (torch.cat(x) for x in zip(*[batch(step, rank) for rank in range(processes)], strict=True))
        segments = Segments.from_lengths(LENGTHS[step] * 2 * processes)
        optimizer.zero_grad()
        model.loss(tokens.view(1, -1), labels.view(1, -1), segments).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def refusals() -> None:
    for change, message in (
        (["--parallelism.tensor_parallel_degree", "2"], "parallelism.tensor_parallel_degree: expected 1, got 2"),
        (["--training.no-disable-cuda-graphs"], "training.disable_cuda_graphs: expected True"),
    ):
        config = ConfigManager().parse_args(["--module", __name__, "--config", "tiny", *change])
        try:
            config.model_spec.model.update_from_config(config=config)
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)
    config = ConfigManager().parse_args(["--module", "linnet.interop.torchtitan", "--config", "gla-340m"])
    assert config.model_spec.flavor == "gla-340m"


def main(rank: int, processes: int, port: str, folder: Path, name: str, *options: str) -> None:
    begin(" ".join([name, *options]), 150)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes), "RANK": str(rank)}
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    options = ("--module", __name__, "--config", name, "--dump_folder", str(folder / "outputs"), *options)
    trainer = ConfigManager().parse_args(options).build()
    model = trainer.model_parts[0]
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no sum that is divided
    before = {name: x.full_tensor().clone() for name, x in model.state_dict().items()}
    assert all(torch.isfinite(x).all() for x in before.values())
    trainer.train()
    after = {name: x.full_tensor() for name, x in model.state_dict().items()}
    trainer.close()
    start = folder / "start.pt"
    if rank == 0 and not start.exists():
        torch.save(before, start)
    if rank == 0 and trainer.step == STEPS:
        check(model.config, torch.load(start), after, processes, folder)
        print("OK")
    dist.destroy_process_group()


def check(shape: DecoderConfig, before: dict, after: dict, processes: int, folder: Path) -> None:
    (saved,) = (file.parent for file in folder.rglob("model.safetensors.index.json"))
    bridge.save_model(saved, folder / "model", shape)
    loaded = Decoder.load(folder / "model").state_dict()
    expected = reference(shape, before, processes).state_dict()
    for name, x in expected.items():
        torch.testing.assert_close(after[name], x, rtol=1e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert torch.equal(loaded[name], after[name]), name
    moved = max(float((x - before[name]).abs().max()) for name, x in expected.items())
    assert moved > 0.2 * LR
    refusals()


RESUMED = ("--debug.seed", "1")  # weights that were not loaded would be others
STOPPED = ("--training.steps", "2", "--checkpoint.no-last-save-model-only", "--checkpoint.no-last-save-in-hf")


if __name__ == "__main__":
    sys.modules["titan_processes"] = sys.modules["__main__"]
    __name__ = "titan_processes"
    port, folder, name, count = sys.argv[1:]
    code = 0
    for options in (STOPPED, RESUMED) if name == "replicated" else ((),):
        arguments = int(count), port, Path(folder), name, *options
        code = code or fork(int(count), lambda index, given=arguments: main(index, *given))
    sys.exit(code)
