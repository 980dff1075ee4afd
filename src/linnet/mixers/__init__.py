"""One file a published layer. Importing this package loads none of them; :func:`mixers` does."""

from .base import Card, Mixer, build_mixer, get_mixer, mixers, parse_spec, register_mixer, split_specs

__all__ = ["Card", "Mixer", "build_mixer", "get_mixer", "mixers", "parse_spec", "register_mixer", "split_specs"]
