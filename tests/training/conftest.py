from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from linnet.models import Decoder, DecoderConfig
from linnet.tasks import ByteTokenizer, Corpus, TextData
from linnet.training import TrainingConfig, train


@pytest.fixture(autouse=True, scope="module")
def _tiny_models(one_thread):
    """All tests of this folder take one thread."""


def make_data(packing="concatenate", batch_tokens=128):
    rng = np.random.default_rng(0)
    words = [b"alpha ", b"beta ", b"gamma ", b"delta\n"]
    documents = [b"".join(words[i] for i in rng.integers(0, 4, rng.integers(3, 40))) for _ in range(60)]
    corpus = Corpus("made up", documents[:50], documents[50:])
    return TextData(corpus, ByteTokenizer(), context=16, batch_tokens=batch_tokens, packing=packing)


def make_model(**options):
    torch.manual_seed(0)
    defaults = {"vocab_size": 257, "d_model": 16, "num_layers": 2, "mixers": ["gla(num_heads=2)"], "mlp_hidden": 16}
    return Decoder(DecoderConfig(**{**defaults, **options}))


class Run:
    """One run with everything at hand that a test may look at."""

    def __init__(self, out):
        self.out = out

    def __call__(self, *, resume=False, data=None, model=None, evaluate=None, on_save=None, settings=None, **options):
        self.model = model or make_model()
        self.text = io.StringIO()
        defaults = {"steps": 8, "lr": 1e-2, "warmup_steps": 2, "log_every": 1, "save_every": 3, "device": "cpu"}
        self.config = TrainingConfig(**{**defaults, **options})
        self.result = train(
            self.model,
            data or make_data(),
            self.config,
            out=self.out,
            resume=resume,
            evaluate=evaluate,
            on_save=on_save,
            settings=settings,
            console=Console(file=self.text, width=200),
        )
        return self

    @property
    def losses(self):
        return [r["train/loss"] for r in self.result.records if "train/loss" in r]


@pytest.fixture
def run(tmp_path):
    """`run(**settings)` trains into `tmp_path/run`; `run.at(name)` is another run beside it."""
    first = Run(tmp_path / "run")
    first.at = lambda name: Run(tmp_path / name)
    return first
