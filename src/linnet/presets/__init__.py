"""Published model configurations, as data: one JSON file each.

>>> from linnet import presets
>>> presets.names()
>>> config = presets.load("gla-340m")
>>> presets.info("gla-340m").paper
>>> presets.load("hybrid-340m(mixer=gla, ratio=6:1)")
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from linnet.models import DecoderConfig
from linnet.ops.core import check_choice

__all__ = ["Preset", "info", "load", "names"]


@dataclass(frozen=True)
class Preset:
    """A model configuration and where it comes from.

    Attributes:
        name: what :func:`load` takes.
        description: one line.
        paper: title and year; empty for a configuration of linnet's own.
        arxiv: arXiv id of the paper; empty likewise.
        published_parameters: the size as its authors print it ("340M"); empty when there is none.
        counted: what that figure counts: "all" parameters, each token table "once" (the head of an untied model is
            left out), or "none" of them.
        notes: why the figure and the model agree or differ, and what the configuration changes.
        config: fields of :class:`~linnet.models.DecoderConfig`.
        choices: what of it can be chosen, by the name of the choice and of its values, the default first: further
            fields, which replace those in ``config``. ``attention_every`` = n puts the mixers of ``config`` at the end
            of every block of n layers, or of the model if that is shorter; the chosen mixers are the rest of the block.
    """

    name: str
    description: str
    config: Mapping[str, Any]
    paper: str = ""
    arxiv: str = ""
    published_parameters: str = ""
    counted: str = "all"
    notes: str = ""
    choices: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)

    def choose(self, **chosen: str) -> DecoderConfig:
        """The configuration under these choices; ValueError names an unknown one and the known ones."""
        fields = dict(self.config)
        attention, every = list(fields["mixers"]), None
        for name, values in self.choices.items():
            value = chosen.pop(name, next(iter(values)))
            check_choice(name, value, values)
            fields |= values[value]
            every = fields.pop("attention_every", every)
        if chosen:
            known = ", ".join(self.choices) or "nothing"
            raise ValueError(f"{next(iter(chosen))}: the preset {self.name} lets choose {known}, got {chosen}")
        if every is not None:
            rest = min(every, fields["num_layers"]) - len(attention)
            fields["mixers"] = list(fields["mixers"]) * rest + attention
        return DecoderConfig.from_dict(fields)

    def published_range(self) -> tuple[float, float] | None:
        """The parameter counts that the published figure can stand for: half a unit of its last digit either way,
        where trailing zeros before a suffix are taken for rounding ("340M" is 335M to 345M)."""
        if not self.published_parameters:
            return None
        text = self.published_parameters
        scale = {"M": 10**6, "B": 10**9}.get(text[-1], 1)
        digits = text.rstrip("MB")
        value = float(digits) * scale
        if "." in digits:
            unit = scale * 10 ** -len(digits.partition(".")[2])
        else:
            unit = scale * 10 ** (len(digits) - len(digits.rstrip("0")))
        return value - unit / 2, value + unit / 2


@cache
def _files() -> dict[str, Any]:
    found = {entry.name[: -len(".json")]: entry for entry in files(__name__).iterdir() if entry.name.endswith(".json")}
    return dict(sorted(found.items()))


def names() -> list[str]:
    """Names of all presets."""
    return list(_files())


def info(name: str) -> Preset:
    """The preset called ``name``; ValueError with the known names otherwise."""
    check_choice("preset", name, names())
    return Preset(name, **json.loads(_files()[name].read_text(encoding="utf-8")))


def load(name: str) -> DecoderConfig:
    """The configuration of the preset called ``name``, or ``"name(choice=value, ...)"`` for one with choices.

    Raises:
        ValueError: an unknown name, choice or value; the message lists the known ones.
    """
    match = re.fullmatch(r"([^(]*)\((.*)\)", name)
    if match is None:
        return info(name).choose()
    pairs = [part.partition("=") for part in match[2].split(",")]
    return info(match[1]).choose(**{key.strip(): value.strip() for key, _, value in pairs})
