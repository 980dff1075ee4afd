from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from linnet.tasks import load_corpus
from linnet.tasks.corpus import _cut


def write_files(folder, count, prefix="f"):
    for i in range(count):
        file = folder / f"sub{i % 3}" / f"{prefix}{i}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"document {i}\n" * 5)


def test_standard_library_is_deterministic_and_split_by_file():
    corpus = load_corpus()
    again = load_corpus("stdlib")
    assert corpus.fingerprint == again.fingerprint
    assert corpus.train_bytes > 2_000_000
    assert 0.01 < corpus.held_out_bytes / (corpus.train_bytes + corpus.held_out_bytes) < 0.12
    assert not set(corpus.train) & {d for d in corpus.held_out if len(d) > 200}
    assert any(b"class ArgumentParser" in d for d in corpus.train + corpus.held_out)


def test_folder_is_split_by_name_alone(tmp_path):
    write_files(tmp_path, 200)
    before = load_corpus(str(tmp_path), held_out=0.2)
    assert 20 <= len(before.held_out) <= 60
    write_files(tmp_path, 30, prefix="more")
    after = load_corpus(str(tmp_path), held_out=0.2)
    assert set(before.held_out) <= set(after.held_out) | set(before.train)
    assert all(d in after.train for d in before.train)
    assert after.fingerprint != before.fingerprint


def test_hidden_files_are_skipped(tmp_path):
    (tmp_path / ".hidden").write_text("secret")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x").write_text("secret")
    (tmp_path / "a.txt").write_text("visible text\n" * 20)
    corpus = load_corpus(str(tmp_path))
    assert b"secret" not in b"".join(corpus.train + corpus.held_out)


def test_one_file_gives_its_end(tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    corpus = load_corpus(str(tmp_path / "a.txt"), held_out=0.1)
    assert corpus.train[0] + corpus.held_out[0] == text.encode()
    assert corpus.train[0].endswith(b"\n")
    assert 0.09 < corpus.held_out_bytes / len(text) < 0.11


def test_cut_never_divides_a_character():
    text = "ä€😀".encode() * 50
    for share in (0.05, 0.1, 0.33, 0.5, 0.77):
        at = _cut(text, share)
        text[:at].decode()
        text[at:].decode()


def test_any_bytes_are_welcome(tmp_path):
    (tmp_path / "raw.bin").write_bytes(bytes(range(256)) * 10)
    corpus = load_corpus(str(tmp_path / "raw.bin"))
    assert corpus.train_bytes + corpus.held_out_bytes == 2560


def test_max_bytes(tmp_path):
    write_files(tmp_path, 50)
    corpus = load_corpus(str(tmp_path), max_bytes=1000)
    assert 996 <= corpus.train_bytes + corpus.held_out_bytes <= 1000


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("no/such/place", {}, FileNotFoundError, "no file or folder 'no/such/place'"),
        ("stdlib", {"held_out": 0.0}, ValueError, "held_out: expected a share between 0 and 1, got 0.0"),
        ("stdlib", {"held_out": 1.0}, ValueError, "held_out"),
        ("stdlib", {"max_bytes": 0}, ValueError, "max_bytes: expected a positive"),
    ],
)
def test_bad_arguments(source, options, error, message):
    with pytest.raises(error, match=message):
        load_corpus(source, **options)


def test_empty_corpora(tmp_path):
    with pytest.raises(ValueError, match="holds no text"):
        load_corpus(str(tmp_path))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="holds no text"):
        load_corpus(str(tmp_path / "empty.txt"))


class TestHuggingFace:
    @pytest.fixture
    def datasets(self, monkeypatch):
        """A stand-in for the optional package; `calls` holds what it was asked for."""
        calls = []
        splits = {"train": [{"text": f"row {i}", "title": "t", "n": i} for i in range(100)]}

        def load_dataset(path, name=None, *, streaming):
            calls.append((path, name, streaming))
            if path == "not/there":
                raise RuntimeError("Dataset 'not/there' doesn't exist on the Hub\nmore")
            return splits

        module = SimpleNamespace(load_dataset=load_dataset, calls=calls, splits=splits)
        monkeypatch.setitem(sys.modules, "datasets", module)
        monkeypatch.setattr("linnet.tasks.corpus.find_spec", lambda name: module)
        return module

    def test_without_the_extra(self, monkeypatch):
        monkeypatch.setattr("linnet.tasks.corpus.find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"pip install 'linnet\[hf\]'"):
            load_corpus("hf:owner/name")

    def test_names(self, datasets):
        load_corpus("hf:name")
        load_corpus("hf:owner/name", max_bytes=100)
        load_corpus("hf:owner/name/config:title")
        assert datasets.calls == [("name", None, False), ("owner/name", None, True), ("owner/name", "config", False)]

    def test_its_own_validation_split_is_held_out(self, datasets):
        datasets.splits["validation"] = [{"text": "held out"}]
        corpus = load_corpus("hf:owner/name")
        assert corpus.held_out == [b"held out"]
        assert len(corpus.train) == 100

    def test_without_one_rows_are_split(self, datasets):
        corpus = load_corpus("hf:owner/name", held_out=0.2)
        assert len(corpus.train) + len(corpus.held_out) == 100
        assert corpus.held_out

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("hf:not/there", "cannot load the Hugging Face data set 'hf:not/there': Dataset 'not/there' doesn't exist"),
            ("hf:owner/name:nope", "no column 'nope', only text, title, n"),
            ("hf:owner/name:n", "expected text in column 'n', got int"),
            ("hf:a/b/c/d", "expected 'hf:NAME'"),
            ("hf:", "expected 'hf:NAME'"),
        ],
    )
    def test_errors(self, datasets, source, message):
        with pytest.raises(ValueError, match=message):
            load_corpus(source)
