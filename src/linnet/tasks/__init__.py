"""Data sets and generators of synthetic tasks."""

from .corpus import Corpus, load_corpus
from .flipflop import FlipFlop, solve_flip_flop
from .text import Batch, TextData
from .tokenizers import ByteTokenizer, JsonTokenizer, Tokenizer, load_tokenizer, make_tokenizer, train_bpe

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "FlipFlop",
    "JsonTokenizer",
    "TextData",
    "Tokenizer",
    "load_corpus",
    "load_tokenizer",
    "make_tokenizer",
    "solve_flip_flop",
    "train_bpe",
]
