"""Data sets and generators of synthetic tasks."""

from .base import IGNORE, Sample, Task, TaskData, build_task, get_task, register_task, seeded, tasks
from .corpus import Corpus, load_corpus
from .text import Batch, TextData
from .tokenizers import (
    ByteTokenizer,
    JsonTokenizer,
    TextStream,
    Tokenizer,
    gives_back,
    load_tokenizer,
    make_tokenizer,
    train_bpe,
)

__all__ = [
    "IGNORE",
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "JsonTokenizer",
    "Sample",
    "Task",
    "TaskData",
    "TextData",
    "TextStream",
    "Tokenizer",
    "build_task",
    "get_task",
    "gives_back",
    "load_corpus",
    "load_tokenizer",
    "make_tokenizer",
    "register_task",
    "seeded",
    "tasks",
    "train_bpe",
]
