"""The pages: their examples run, their command lines parse, what they name exists."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import typer

import linnet
from linnet.benchmarks.models import MODEL_SUITES
from linnet.benchmarks.workloads import GRIDS, SUITES
from linnet.cli.app import _COMMANDS, _load, app
from linnet.interop.layouts import LAYOUTS
from linnet.mixers import get_mixer, parse_spec, split_specs
from linnet.parallel.tensor import _HEADS

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
pages = pytest.mark.parametrize("page", TEXTS)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """What a page shows of `linnet COMMAND ...`, in blocks and in lines, as lists of arguments."""
    lines = [line for block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE) + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    found = []
    for line in lines:
        known = re.match(r"(?:scripts/|accelerate launch -m )?linnet(?:\.cli)? ((?:\w+|--).*)$", line)
        if known is not None:
            found.append([x for x in shlex.split(known[1], comments=True) if x != "..."])
    return found


EXAMPLES = [
    (page, i, code)
    for page in ("docs/cells.md", "docs/index.md")
    for i, code in enumerate(blocks(TEXTS[page], "python"))
]


@pytest.mark.parametrize(
    ("page", "code"), [(page, code) for page, _, code in EXAMPLES], ids=[f"{p}-{i}" for p, i, _ in EXAMPLES]
)
def test_examples_run(page: str, code: str) -> None:
    torch.manual_seed(0)
    exec(compile(code, page, "exec"), {})


def test_the_example_of_transformers_runs(tmp_path: Path) -> None:
    """On a small model in the place of the one that is trained on the command line."""
    pytest.importorskip("transformers", reason="needs the extra hf")
    make = """
import linnet
from linnet.models import Decoder, DecoderConfig
from linnet.tasks import ByteTokenizer
tokenizer = ByteTokenizer()
config = DecoderConfig(vocab_size=tokenizer.vocab_size, d_model=16, num_layers=1, mixers=["gla(num_heads=2)"])
Decoder(config).save("runs/default-small/model")
tokenizer.save("runs/default-small/model")
"""
    first, second = blocks(TEXTS["docs/interop.md"], "python")[:2]
    code = "\n".join([make, first, second])
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pages
def test_python_is_python_and_imports_what_there_is(page: str) -> None:
    for code in blocks(TEXTS[page], "python"):
        for node in ast.walk(ast.parse(inspect.cleandoc(code))):
            if isinstance(node, ast.ImportFrom) and not node.level and find_spec(str(node.module).partition(".")[0]):
                try:
                    module = import_module(str(node.module))
                except ModuleNotFoundError as error:  # an extra that is not installed
                    assert not str(error.name).startswith("linnet"), f"{page}: {node.module}"
                    continue
                for name in node.names:
                    assert hasattr(module, name.name), f"{page}: {node.module}.{name.name}"


@pages
def test_command_lines_parse(page: str) -> None:
    own = re.findall(r'@register_mixer\(\s*"(\w+)"', TEXTS[page])
    for arguments in commands(TEXTS[page]):
        name, rest = arguments[0], arguments[1:]
        if name.startswith("--") or name == "COMMAND":
            continue
        assert name in _COMMANDS, f"{page}: linnet {name}"
        if any(re.fullmatch(r"[A-Z_]+", word) and before.startswith("--") for before, word in pairwise(rest)):
            continue  # a placeholder for what may be a number
        command = _load(name)
        needed = [p for p in command.params if p.param_type_name == "argument" and p.required]
        if rest or not needed:
            found = command.make_context(name, list(rest), resilient_parsing=False)
            mixers = found.params.get("mixers")
            for spec in split_specs(mixers.replace("+", ",")) if mixers else ():
                mixer, options = parse_spec(spec)
                known = {} if mixer in own else inspect.signature(get_mixer(mixer)).parameters
                assert set(options) <= set(known), f"{page}: {spec}"


def test_every_option_that_is_named_exists() -> None:
    known = {option for name in _COMMANDS for p in _load(name).params for option in (*p.opts, *p.secondary_opts)}
    root = typer.main.get_command(app)
    known |= {option for p in root.params for option in p.opts} | {"--help"}
    others = {
        "--check", "--device", "--editable",  # of scripts and of pytest here
        "--checkpoint.last_save_in_hf",  # of torchtitan
    }  # fmt: skip
    for page, text in TEXTS.items():
        for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
            for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*", code):
                assert option in known | others, f"{page}: {option} in `{code}`"


@pages
def test_names_of_linnet_exist(page: str) -> None:
    """`linnet.room.name` in the texts; `linnet.interop` has modules that need what may not be installed."""
    for name in set(re.findall(r"(?<!`)`(linnet(?:\.\w+)+)", TEXTS[page])):
        found, parts = linnet, name.split(".")[1:]
        for i, part in enumerate(parts, 1):
            path = ".".join(["linnet", *parts[:i]])
            if not hasattr(found, part) and find_spec(path) is not None:
                try:
                    import_module(path)
                except ModuleNotFoundError as error:
                    assert not str(error.name).startswith("linnet"), f"{page}: {name}"
                    break
            assert hasattr(found, part), f"{page}: {name}"
            found = getattr(found, part)


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub and the pages make them from plain words."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.replace("`", "").lower()).replace(" ", "-") for head in heads}


@pages
def test_links_lead_somewhere(page: str) -> None:
    here = ROOT / page
    for path, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", TEXTS[page]):
        target = (here.parent / path).resolve() if path else here
        assert target.exists(), f"{page}: {path}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page}: {path}#{anchor}"


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md"))


def test_commands_of_the_readme() -> None:
    assert set(re.findall(r"^\| `linnet (\w+)", TEXTS["README.md"], re.MULTILINE)) == set(_COMMANDS)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_rooms_are_in_the_order_of_their_imports(page: str) -> None:
    """The page names every room, each below all that it may import."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    heights = {}
    for height, layer in enumerate(reversed(project["contracts"][0]["layers"])):
        heights |= dict.fromkeys(re.findall(r"\w+", layer), height)
    rooms = [room for room in heights if (ROOT / "src" / "linnet" / room).is_dir()]
    named = re.findall(r"^      (\w+)/ |^\| `(\w+)` \|[^|]*\|[^|]*\|$", TEXTS[page], re.MULTILINE)
    order = [room for pair in named for room in pair if room in rooms]
    assert sorted(order) == sorted(rooms)
    assert [heights[room] for room in order] == sorted(heights[room] for room in order)


def test_suites_and_grids_of_the_benchmarks() -> None:
    tables = re.findall(r"^\| `(\w+)` \|", TEXTS["docs/benchmarks.md"], re.MULTILINE)
    assert sorted(tables) == sorted([*SUITES, *MODEL_SUITES, *GRIDS])
    helps = {p.name: p.help for p in _load("bench").params}
    for option, names in {"suite": [*SUITES, *MODEL_SUITES], "grid": GRIDS}.items():
        assert set(names) <= set(re.findall(r"`(\w+)`", helps[option])), option


def test_speeds_of_the_readme_are_those_of_the_results() -> None:
    """The multiples in the README are of the rows for its shape, rounded."""
    claim = re.search(r"fastest kernels we could run: (.*?)\.\n", TEXTS["README.md"], re.DOTALL)
    assert claim is not None
    ops = {
        "GLA": "gla", "RWKV-6": "rwkv6", "Gated DeltaNet-2": "gdn2", "KDA": "kda", "RWKV-7": "rwkv7",
        "DeltaProduct": "deltaproduct", "DeltaNet": "delta_rule", "mLSTM": "mlstm_exp",
        "Gated DeltaNet": "gated_delta_rule",
    }  # fmt: skip
    told = dict(re.findall(r"([A-Za-z][\w -]*?) (\d\.\d)", " ".join(claim[1].split())))
    assert set(told) == set(ops)
    for name, times in told.items():
        row = rf"^\| {ops[name]} \| fwdbwd \| 4, 8192, 16, 128, 128 \|.*\| (\d+\.\d+)x \|"
        (measured,) = re.findall(row, TEXTS["docs/benchmarks.md"], re.MULTILINE)
        assert abs(float(times) - float(measured)) <= 0.0501, f"{name}: {times} for {measured}"


def test_names_of_the_bridges() -> None:
    """The page on other tools lists the layouts that are converted, and the mixers that are spread by heads."""
    text = TEXTS["docs/interop.md"]
    table = re.findall(
        r"^\| (`\w+`.*?) \|", text[text.index("| layout |") : text.index("The last row is")], re.MULTILINE
    )
    assert re.findall(r"`(\w+)`", " ".join(table)) == list(LAYOUTS)
    spread = text[text.index("It knows `attention`") : text.index("a decoder with another mixer")]
    assert set(re.findall(r"`(\w+)`", spread)) == set(_HEADS)
