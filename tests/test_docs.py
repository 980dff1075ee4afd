"""The examples in docs/cells.md run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "cells.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=[str(i) for i in range(len(EXAMPLES))])
def test_examples_run(example: str) -> None:
    torch.manual_seed(0)
    exec(compile(example, str(PAGE), "exec"), {})
