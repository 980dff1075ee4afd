"""`linnet train`: data, model, training, and what came of it."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import shlex
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from .options import given
from .show import console, number, size

if TYPE_CHECKING:
    from linnet.models import DecoderConfig
    from linnet.training import TrainingConfig, TrainingResult

# Options that may differ when a run goes on: they change how it is shown and kept, not what it computes.
_FREE = {"device", "minutes", "log_every", "evaluate_every", "save_every", "keep_last"}
_SAMPLE_TOKENS = 32768  # read in an evaluation during training; the last one reads all of the held-out text
_EVALUATION_BATCH = 8192  # tokens of a call in evaluation
_SAMPLES, _PROMPT_BYTES = 3, 80
_SHELL_PROMPT = '"def main("'
_MODEL, _DATA, _TRAINING, _MACHINE, _RUN = "Model", "Data", "Optimisation", "Machine", "Run"


def train(
    ctx: typer.Context,
    preset: Annotated[
        str, typer.Option(help="Model shape to start from; the other options here change it.", rich_help_panel=_MODEL)
    ] = "default-small",
    mixers: Annotated[
        str | None,
        typer.Option(
            help='Mixers, repeated over the layers: "gla, gla, gla, attention(window=128)".', rich_help_panel=_MODEL
        ),
    ] = None,
    d_model: Annotated[int | None, typer.Option(min=1, help="Width.", rich_help_panel=_MODEL)] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Number of layers.", rich_help_panel=_MODEL)] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Any other field of the model: `--set mlp=moe`.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="`stdlib` (the source of Python's standard library), a file, a folder, or `hf:OWNER/NAME[/CONFIG]"
            "[:COLUMN]`.",
            rich_help_panel=_DATA,
        ),
    ] = "stdlib",
    tokenizer: Annotated[
        str,
        typer.Option(help="`byte`, `bpe:SIZE` (learned on the text) or a tokenizers JSON file.", rich_help_panel=_DATA),
    ] = "byte",
    context: Annotated[int, typer.Option(min=1, help="Tokens seen at once.", rich_help_panel=_DATA)] = 256,
    packing: Annotated[
        str,
        typer.Option(
            help="`concatenate`: windows of the text. `documents`: whole documents, each from an empty state.",
            rich_help_panel=_DATA,
        ),
    ] = "concatenate",
    held_out: Annotated[float, typer.Option(help="Share of the documents held out.", rich_help_panel=_DATA)] = 0.05,
    max_bytes: Annotated[
        int | None, typer.Option(min=1, help="Read no more of the data than this.", rich_help_panel=_DATA)
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.", rich_help_panel=_TRAINING)] = 240,
    batch_size: Annotated[int, typer.Option(min=1, help="Tokens of a step.", rich_help_panel=_TRAINING)] = 4096,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Micro-batches of a step (saves memory).", rich_help_panel=_TRAINING)
    ] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=_TRAINING)] = 4e-3,
    schedule: Annotated[str, typer.Option(help="`cosine`, `wsd` or `constant`.", rich_help_panel=_TRAINING)] = "cosine",
    warmup: Annotated[int, typer.Option(min=0, help="Steps of warm-up.", rich_help_panel=_TRAINING)] = 50,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.", rich_help_panel=_TRAINING)] = 0.1,
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0: any.", rich_help_panel=_TRAINING)] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and order of the data.", rich_help_panel=_TRAINING)] = 0,
    device: Annotated[
        str, typer.Option(help="`auto` (a GPU if there is one) or `cpu`.", rich_help_panel=_MACHINE)
    ] = "auto",
    precision: Annotated[
        str | None,
        typer.Option(help="`no` (fp32), `bf16` or `fp16`. Default: bf16 on a GPU.", rich_help_panel=_MACHINE),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Of the ops: `auto`, `chunked`, `triton` or `reference`.", rich_help_panel=_MACHINE)
    ] = "auto",
    compile: Annotated[
        bool, typer.Option("--compile", help="Run the layers through torch.compile.", rich_help_panel=_MACHINE)
    ] = False,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Recompute layers to save memory.", rich_help_panel=_MACHINE),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Run folder. Default: runs/ and the name of the preset or mixers.",
            rich_help_panel=_RUN,
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, with its settings.", rich_help_panel=_RUN)
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(help="Stop after this time; resumable.", rich_help_panel=_RUN)
    ] = None,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between metrics.", rich_help_panel=_RUN)] = 10,
    evaluate_every: Annotated[
        int, typer.Option(min=0, help="Steps between evaluations; 0: a tenth of the run.", rich_help_panel=_RUN)
    ] = 0,
    save_every: Annotated[
        int, typer.Option(min=0, help="Steps between checkpoints; 0: a tenth of the run.", rich_help_panel=_RUN)
    ] = 0,
    keep_last: Annotated[int, typer.Option(min=1, help="Checkpoints to keep.", rich_help_panel=_RUN)] = 2,
) -> None:
    """Train a language model and report held-out bits per byte.

    Without options it trains a small hybrid of recurrent and attention layers on the source of Python's standard
    library, in a few minutes on a laptop. Ctrl-C saves and stops; `--resume` goes on.

    On several GPUs: `accelerate launch -m linnet.cli train ...`
    """
    run = out or Path("runs", _run_name(preset, mixers))
    options = {name: value for name, value in ctx.params.items() if name not in ("out", "resume")}
    _Session(run, options, ctx if resume else None).go()


class _Session:
    """One call of `linnet train`. Everything is made from the options, so that a resumed run is made the same way.

    Args:
        run: the run folder.
        options: the values of the command's options.
        resumed: the call that goes on with a run, to see which options it gives; None for a new run.
    """

    def __init__(self, run: Path, options: dict[str, Any], resumed: typer.Context | None):
        from linnet.training import check_run_folder, checkpoints

        check_run_folder(run, resume=resumed is not None)
        self.run, self.options, self.stored = run, options, {}
        self.latest = checkpoints(run)[-1] if resumed else None
        if resumed:
            self.stored = _read_json(run / "run.json")
            self.options = _merged(self.stored["options"], options, resumed)
        self.speaks = os.environ.get("RANK", "0") == "0"  # under `accelerate launch` only the first process
        self.console = console()
        self.console.quiet = not self.speaks
        self._prepare()

    def _prepare(self) -> None:
        """Corpus, tokenizer, batches, model and baselines."""
        import torch

        from linnet.evaluation import baselines
        from linnet.models import Decoder
        from linnet.tasks import TextData, load_corpus, load_tokenizer, make_tokenizer

        options = self.options
        self.training = self._training_config()
        self.corpus = load_corpus(options["data"], held_out=options["held_out"], max_bytes=options["max_bytes"])
        known = self.stored.get("data", {})
        if self.stored and known["fingerprint"] != self.corpus.fingerprint:
            raise ValueError(
                f"resume: the text of {options['data']!r} is no longer the one this run began with "
                f"(fingerprint {self.corpus.fingerprint} instead of {known['fingerprint']})"
            )
        if self.latest is not None:
            self.tokenizer = load_tokenizer(self.latest)
            config = _decoder_config(self.stored["model"])
        else:
            self.tokenizer = make_tokenizer(options["tokenizer"], self.corpus.train)
            config = self._model_config()
        self.text = TextData(
            self.corpus,
            self.tokenizer,
            context=options["context"],
            batch_tokens=options["batch_size"],
            packing=options["packing"],
            seed=options["seed"],
        )
        torch.manual_seed(options["seed"])
        self.model = Decoder(config)
        self.baselines: dict[str, float] = known.get("baselines") or {}
        if self.speaks and not self.baselines:
            self.baselines = baselines(self.corpus.train, self.corpus.held_out)

    def _training_config(self) -> TrainingConfig:
        import torch

        from linnet.training import TrainingConfig

        options = self.options
        names = {field.name for field in dataclasses.fields(TrainingConfig)} & set(options)
        if options["precision"] is None:
            gpu = options["device"] == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            options["precision"] = "bf16" if gpu else "no"
        return TrainingConfig.from_dict({name: options[name] for name in names} | {"warmup_steps": options["warmup"]})

    def _model_config(self) -> DecoderConfig:
        from linnet.mixers import split_specs
        from linnet.presets import load

        options = self.options
        changes: dict[str, Any] = {"vocab_size": self.tokenizer.vocab_size}
        if options["mixers"] is not None:
            changes["mixers"] = split_specs(options["mixers"])
        if options["d_model"] is not None:
            changes["d_model"] = options["d_model"]
        if options["layers"] is not None:
            changes["num_layers"] = options["layers"]
        for setting in options["override"] or ():
            name, _, value = setting.partition("=")
            if not (name.strip() and value.strip()):
                raise ValueError(f"--set: expected FIELD=VALUE, got {setting!r}")
            changes[name.strip()] = _literal(value.strip())
        config = _decoder_config(load(options["preset"]).to_dict() | changes)
        if config.vocab_size < self.tokenizer.vocab_size:
            least = self.tokenizer.vocab_size
            raise ValueError(
                f"--set vocab_size: expected at least the {least} tokens of --tokenizer {options['tokenizer']}, "
                f"got {config.vocab_size}"
            )
        return config

    def go(self) -> None:
        """Train, and say what came of it."""
        import torch

        from linnet.ops import backend
        from linnet.tasks import gives_back
        from linnet.training import train as run_training

        out, corpus = self.console, self.corpus
        verb = f"Going on from {self.latest.name} of" if self.latest else "Training"
        specs = [m if isinstance(m, str) else str(m["name"]) for m in self.model.config.mixers]
        groups = [(len(list(group)), spec) for spec, group in groupby(specs)]
        mixers = ", ".join(f"{count} x {spec}" if count > 1 else spec for count, spec in groups)
        out.print(
            f"{verb} a {self.model.config.num_layers}-layer decoder of {number(self.model.num_parameters())} "
            f"parameters ({escape(mixers)}; width {self.model.config.d_model})"
        )
        out.print(
            f"on {escape(corpus.name)}: {number(corpus.train_bytes)} bytes to learn from, "
            f"{number(corpus.held_out_bytes)} held out; {self.training.steps} steps of "
            f"{number(self.text.batch_tokens)} tokens. Ctrl-C saves and stops."
        )
        if not gives_back(self.tokenizer, corpus.held_out):
            out.print(
                "[yellow]Note:[/] tokenizer (--tokenizer): it does not give back the held-out text byte for byte, so "
                "that bits per byte cannot be compared with those of a compressor",
                soft_wrap=True,
            )
        with backend(self.options["backend"]):
            result = run_training(
                self.model,
                self.text,
                self.training,
                out=self.run,
                resume=self.latest is not None,
                evaluate=self._evaluate,
                extras=self.tokenizer.save,
                on_save=self._draw,
                settings={
                    "options": self.options,
                    "data": {"name": corpus.name, "fingerprint": corpus.fingerprint, "baselines": self.baselines},
                    "versions": _versions(),
                },
                console=out,
            )
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if not result.is_main:
            return
        if result.finished:
            self._report(result)
        else:
            out.print(f"\nStopped after step {result.step} of {self.training.steps}; everything is saved.")
            again = f"linnet train --resume --out {escape(shlex.quote(str(self.run)))}"
            out.print(f"Go on:  [bold]{again}[/bold]", soft_wrap=True)

    def _evaluate(self, model: Any, *, final: bool, part: int, parts: int) -> dict[str, float]:
        from linnet.evaluation import bits_per_byte

        share = bits_per_byte(
            model,
            self.text.held_out,
            self.text.held_out_bytes,
            context=self.text.context,
            batch_size=max(1, _EVALUATION_BATCH // self.text.context),
            max_tokens=None if final else _SAMPLE_TOKENS,
            part=part,
            parts=parts,
        )
        return {"bits_per_byte": share}

    def _draw(self, run: Path, records: Sequence[dict[str, Any]]) -> None:
        from linnet.evaluation import plot_loss_curve

        title = f"{run.name}: bits per byte on {self.corpus.name}"
        plot_loss_curve(run / "loss.png", records, baselines=self.baselines, title=title)

    def _report(self, result: TrainingResult) -> None:
        """The table of held-out bits per byte, samples, and what lies where."""
        from .generate import printable

        out, reached = self.console, result.last("held_out/bits_per_byte")
        assert reached is not None
        samples = self._samples()
        text = "\n\n".join(f"{prompt}|{continuation}" for prompt, continuation in samples)
        (self.run / "samples.txt").write_text(text + "\n", encoding="utf-8")
        results = {
            "held_out_bits_per_byte": reached,
            "baselines": self.baselines,
            "held_out_bytes": self.corpus.held_out_bytes,
            "parameters": self.model.num_parameters(),
            "tokens": result.tokens,
            "seconds": round(result.seconds, 1),
        }
        (self.run / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

        for prompt, continuation in samples:
            out.print(f"\n[dim]{escape(printable(prompt))}[/dim]{escape(printable(continuation))}")
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column(f"held-out text ({number(self.corpus.held_out_bytes)} bytes)")
        table.add_column("bits per byte", justify="right")
        table.add_column("has read before")
        learned = f"{number(result.tokens)} tokens of the training text"
        rows = [(f"{self.run.name}", reached, learned)]
        for name, value in self.baselines.items():
            rows.append((name, value, "all of the training text" if "gram" in name else "nothing"))
        for name, value, read in sorted(rows, key=lambda row: row[1]):
            style = "bold green" if value == reached else ""
            table.add_row(escape(name), f"{value:.3f}", read, style=style)
        out.print()
        out.print(table)
        minutes, seconds = divmod(round(result.seconds), 60)
        out.print(f"Trained in {minutes}:{seconds:02d} minutes. Saved in [bold]{escape(str(self.run))}[/bold]:")
        saved = {
            "model/": f"weights, config, tokenizer ({size(_folder_size(self.run / 'model'))})",
            "checkpoints/": "to go on from",
            "loss.png": "curves",
            "samples.txt": "the samples above",
            "results.json": "the numbers above",
            "metrics.jsonl": "every metric of the run, also in tensorboard/",
            "run.json": "all settings",
        }
        for name, what in saved.items():
            out.print(f"  {name:15}{what}")
        out.print("\nNext:")
        run = shlex.quote(str(self.run))
        out.print(f"  linnet generate {run} --prompt {_SHELL_PROMPT}", markup=False, soft_wrap=True)
        out.print(f"  tensorboard --logdir {run}", markup=False, soft_wrap=True)

    def _samples(self) -> list[tuple[str, str]]:
        """Openings of held-out documents, continued by the saved model."""
        import torch

        from linnet.models import Decoder

        from .generate import continuation

        model = Decoder.load(self.run / "model", device=next(self.model.parameters()).device)
        generator = torch.Generator(model.embed_tokens.weight.device).manual_seed(self.options["seed"])
        documents = [d for d in self.corpus.held_out if len(d) >= _PROMPT_BYTES] or self.corpus.held_out
        samples = []
        for document in documents[:: max(1, len(documents) // _SAMPLES)][:_SAMPLES]:
            prompt = document[:_PROMPT_BYTES].decode("utf-8", errors="ignore")
            pieces = continuation(
                model, self.tokenizer, prompt, max_new_tokens=240, temperature=0.7, top_p=0.95, generator=generator
            )
            samples.append((prompt, "".join(pieces)))
        return samples


def _merged(stored: dict[str, Any], options: dict[str, Any], ctx: typer.Context) -> dict[str, Any]:
    """The options of the run, with those that may change as now given. Others must not differ."""
    merged = stored | {"minutes": None}  # a limit is for one sitting
    for name, flag in given(ctx).items():
        if name not in options or options[name] == stored.get(name):
            continue
        if name not in _FREE:
            raise ValueError(
                f"{flag}: this run was started with {stored.get(name)!r} and goes on with it; leave the option "
                "out, or start a new run in another --out"
            )
        merged[name] = options[name]
    return merged


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"resume: {file} is missing, so the settings of the run are unknown") from None
    except ValueError as error:
        raise ValueError(f"{file}: damaged ({error})") from error
    if not {"options", "data", "model"} <= set(content):
        raise ValueError(f"{file}: not written by linnet train")
    return content


def _decoder_config(values: dict[str, Any]) -> DecoderConfig:
    from linnet.models import DecoderConfig

    return DecoderConfig.from_dict(values)


def _run_name(preset: str, mixers: str | None) -> str:
    """The preset, or the names of the mixers that take its place."""
    if mixers is None:
        return preset
    from linnet.mixers import split_specs

    names = dict.fromkeys(re.match(r"\w*", spec).group() for spec in split_specs(mixers))  # type: ignore[union-attr]
    return "-".join(names)


def _literal(text: str) -> Any:
    """A Python or JSON value, or the text itself."""
    known = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in known:
        return known[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _folder_size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def _versions() -> dict[str, str]:
    import platform

    import torch

    import linnet

    return {"linnet": linnet.__version__, "torch": torch.__version__, "python": platform.python_version()}
