"""What every mixer shares: the module contract, its card, the registry and the parsing of specs."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from linnet.ops.core import Identity, Segments, check_choice, check_names, check_type, import_modules, loadable

__all__ = ["Card", "Mixer", "build_mixer", "get_mixer", "mixers", "parse_spec", "register_mixer", "split_specs"]

M = TypeVar("M", bound="Mixer")
_mixers: dict[str, type[Mixer]] = {}


@dataclass(frozen=True)
class Card:
    """What `linnet inspect` prints about a mixer and what the contract suite needs to run it.

    Attributes:
        paper: title, authors and year, with the arXiv id.
        recurrence: the state update and the reading, in one or two lines.
        state: size of the state per layer as a formula, e.g. "H·K·V".
        engine: the engine in ``linnet.ops`` it runs on.
        expressivity: class of what the layer can track, e.g. "TC0: diagonal transition".
        linear_state: whether, inputs given, the state enters its own update linearly (the suite then builds the
            exact time-varying realisation and compares).
        constant_state: whether the state's size is independent of the sequence length.
        examples: small constructor options the contract suite runs with (``d_model`` included).
        identities: executable claims "reduces to … when …".
        notes: deviations from the paper, one a line.
    """

    paper: str
    recurrence: str
    state: str
    engine: str
    expressivity: str
    linear_state: bool = True
    constant_state: bool = True
    examples: tuple[dict[str, Any], ...] = ({"d_model": 32, "num_heads": 2},)
    identities: tuple[Identity, ...] = ()
    notes: tuple[str, ...] = field(default=())


class Mixer(nn.Module):
    """A causal token mixer ``[B, T, D] -> [B, T, D]``.

    Subclasses take ``d_model`` and keyword-only typed options, and ``layer``/``num_layers`` when their initialisation
    depends on depth. Their forward is ``y, state = mixer(x, state=None, segments=None)``: prefill, chunked prefill
    and decoding (``T = 1``) are the same call; with ``segments`` the input is packed ``[1, total, D]`` and the state
    has one row a segment.
    """

    name: ClassVar[str]
    card: ClassVar[Card]
    no_weight_decay: ClassVar[tuple[str, ...]] = ()  # own parameters of two or more axes that must not be decayed
    max_learning_rate: ClassVar[Mapping[str, float]] = {}  # own parameter to the highest peak rate it is trained at
    d_model: int

    def forward(self, x: Tensor, state: Any = None, segments: Segments | None = None) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def init_state(self, rows: int) -> Any:
        """The state before the first token for ``rows`` sequences (zeros)."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Initialise, the way the paper does, every parameter this module owns itself and those of its submodules that
        start from special values (gate biases, low-rank factors). Run it after the submodules' own: children first, as
        ``nn.Module.apply`` walks."""


def register_mixer(name: str, card: Card) -> Callable[[type[M]], type[M]]:
    """Class decorator: register a mixer under ``name``; this is what puts it under the contract suite. Its constructor
    then refuses unknown options and values of another type than annotated, with a ValueError that names the option."""

    def add(cls: type[M]) -> type[M]:
        if name in _mixers:
            raise ValueError(f"mixer {name!r} is already registered")
        cls.name, cls.card = name, card
        cls.__init__ = _checked(cls.__init__, name)
        loadable(cls.init_state)
        _mixers[name] = cls
        return cls

    return add


def mixers() -> dict[str, type[Mixer]]:
    """All registered mixers by name."""
    import_modules("linnet.mixers")
    return dict(sorted(_mixers.items()))


def get_mixer(name: str) -> type[Mixer]:
    """The mixer class called ``name``; ValueError with the known names otherwise."""
    table = mixers()
    check_choice("mixer", name, table)
    return table[name]


def parse_spec(spec: str | Mapping[str, Any], kind: str = "mixer") -> tuple[str, dict[str, Any]]:
    """Split the spec of a mixer (or of another ``kind`` of thing) into name and options.

    A spec is a name (``"gla"``), a name with options (``"attention(window=256, rope=False)"``) or a mapping
    (``{"name": "gla", "num_heads": 4}``).
    """
    if isinstance(spec, Mapping):
        options = dict(spec)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise ValueError(f"{kind} spec: expected a mapping with a 'name', got {dict(spec)!r}")
        return name, options
    if isinstance(spec, str) and re.fullmatch(r"[\w-]+", spec.strip()):
        return spec.strip(), {}
    try:
        node = ast.parse(spec.strip() if isinstance(spec, str) else "", mode="eval").body
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            return node.func.id, {str(kw.arg): ast.literal_eval(kw.value) for kw in node.keywords}
    except (SyntaxError, ValueError):
        pass
    raise ValueError(f"{kind} spec: expected 'name' or 'name(option=value, ...)', got {spec!r}")


def split_specs(text: str, separator: str = ",") -> list[str]:
    """``"gla, attention(window=64, rope=False)"`` -> its two specs: separators inside brackets do not split.

    Raises:
        ValueError: an empty spec.
    """
    specs, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == separator and depth == 0:
            specs.append("")
        else:
            specs[-1] += character
    specs = [spec.strip() for spec in specs]
    if not all(specs):
        raise ValueError(f"mixers: expected specs separated by {separator!r}, got {text!r}")
    return specs


def _checked(init: Callable[..., None], name: str) -> Callable[..., None]:
    """The constructor ``init`` of the mixer ``name``, behind a check of what it is given."""
    signature = inspect.signature(init)
    known = {p.name: p.annotation for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
    choices = sorted(set(known) - {"layer", "num_layers"})

    @wraps(init)
    def checked(self: Mixer, *args: Any, **options: Any) -> None:
        check_names(f"mixer {name!r}", "option", [key for key in options if key not in signature.parameters], choices)
        try:
            given = signature.bind(self, *args, **options).arguments
        except TypeError as error:  # no width, or options that are not named
            raise ValueError(f"mixer {name!r}: {error}") from None
        for key in given.keys() & known.keys():
            check_type(f"mixer {name!r}: option {key}", known[key], given[key])
        d_model = given["d_model"]
        if not isinstance(d_model, int) or isinstance(d_model, bool) or d_model < 1:
            raise ValueError(f"d_model: expected an integer >= 1, got {d_model!r}")
        init(self, *args, **options)

    return checked


def build_mixer(spec: str | Mapping[str, Any], d_model: int, *, layer: int = 0, num_layers: int = 1) -> Mixer:
    """Construct the mixer that ``spec`` describes. ``layer`` and ``num_layers`` reach only mixers whose initialisation
    depends on depth.

    Raises:
        ValueError: an unknown name or option, with the known ones; an option of another type than annotated.
    """
    name, options = parse_spec(spec)
    cls = get_mixer(name)
    known = inspect.signature(cls).parameters
    depth = {key: value for key, value in (("layer", layer), ("num_layers", num_layers)) if key in known}
    return cls(d_model, **{**depth, **options})
