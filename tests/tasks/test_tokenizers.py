from __future__ import annotations

import json

import numpy as np
import pytest

from linnet.tasks import ByteTokenizer, JsonTokenizer, gives_back, load_tokenizer, make_tokenizer, train_bpe

TEXTS = ["def f(x):\n    return x + 1\n", "Ein Täßchen Kaffee, 3 € 😀\n\n\ttabs", "", " leading and trailing "]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([t.encode() * 20 for t in TEXTS], 300)


@pytest.fixture(params=["byte", "bpe"])
def tokenizer(request, bpe):
    return ByteTokenizer() if request.param == "byte" else bpe


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text.encode())
    assert ids.ndim == 1
    assert not (ids == tokenizer.end).any()
    assert ids.size == 0 or ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == text.encode()
    assert tokenizer.decode([tokenizer.end, *ids, tokenizer.end]) == text.encode()


@pytest.mark.parametrize("text", TEXTS)
def test_stream_gives_whole_characters(tokenizer, text):
    feed = tokenizer.stream()
    pieces = [feed(int(i)) for i in tokenizer.encode(text.encode())]
    pieces.append(feed(None))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def test_stream_shows_what_is_not_utf8():
    feed = ByteTokenizer().stream()
    assert feed(0xC3) + feed(ord("a")) == "\ufffda"
    feed = ByteTokenizer().stream()
    assert feed(0xE2) + feed(0x82) == ""
    assert feed(None) == "\ufffd"


def test_a_stream_that_ends_within_a_character_says_so(tokenizer):
    ids = [int(i) for i in tokenizer.encode("h€".encode())]
    feed = tokenizer.stream()
    assert "".join(feed(token) for token in (*ids[:-1], None)) == "h\ufffd"


def test_saved_with_a_model(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = TEXTS[1].encode()
    assert type(loaded) is type(tokenizer)
    assert (loaded.vocab_size, loaded.end) == (tokenizer.vocab_size, tokenizer.end)
    np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))


def test_bpe_has_the_asked_size_and_compresses(bpe):
    assert bpe.vocab_size == 300
    text = TEXTS[0].encode()
    assert len(bpe.encode(text)) < len(text) / 1.5


def test_specs(tmp_path, bpe):
    assert make_tokenizer("byte").name == "byte"
    assert make_tokenizer("bpe:280", [t.encode() for t in TEXTS]).vocab_size <= 280
    bpe.save(tmp_path)
    assert make_tokenizer(str(tmp_path / "tokenizer.json")).vocab_size == 300


def test_what_a_file_says_of_cutting_and_padding_does_not_reach_documents(bpe, tmp_path):
    from tokenizers import Tokenizer

    bpe.save(tmp_path)
    cutting = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    cutting.enable_truncation(4)
    cutting.enable_padding(length=9)
    cutting.save(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        np.testing.assert_array_equal(load_tokenizer(tmp_path).encode(text.encode()), bpe.encode(text.encode()))


def test_a_tokenizer_that_loses_text_is_known(bpe, tokenizer):
    from tokenizers.normalizers import Lowercase

    documents = [text.encode() for text in TEXTS]
    assert gives_back(tokenizer, documents)
    assert not gives_back(bpe, [b"a<|endoftext|>b"])
    lossy = train_bpe(documents, 300)
    lossy.backend.normalizer = Lowercase()
    assert not gives_back(lossy, documents)


def test_a_file_without_an_end_of_document_gets_one(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "words.json"))
    tokenizer = JsonTokenizer(tmp_path / "words.json")
    assert (tokenizer.end, tokenizer.vocab_size) == (2, 3)
    own = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    own.add_special_tokens(["<|finish|>"])
    own.save(str(tmp_path / "words.json"))
    tokenizer = JsonTokenizer(tmp_path / "words.json", [2])  # unless it is known where texts stop
    assert (tokenizer.begin, tokenizer.end, tokenizer.ends, tokenizer.vocab_size) == (2, 2, (2,), 3)


@pytest.mark.parametrize(("begin", "known"), [(300, True), (None, False), (5, False), (301, False), ("<s>", False)])
def test_a_converted_model_says_what_begins_a_document(tmp_path, begin, known):
    tokenizer = train_bpe([t.encode() * 20 for t in TEXTS], 300)
    tokenizer.backend.add_special_tokens(["<s>"])
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).begin == tokenizer.end
    (tmp_path / "generation_config.json").write_text(json.dumps({"bos_token_id": begin}))
    assert load_tokenizer(tmp_path).begin == (begin if known else tokenizer.end)


@pytest.mark.parametrize(
    ("settings", "config", "ends"),
    [
        ([301, 0, 300], 5, [0, 301, 300]),
        (301, [300], [0, 301]),
        (None, [300, 301], [0, 300, 301]),
        (None, 300, [0, 300]),
        (None, None, [0]),
        (-1, 300, [0, 300]),  # as some write none
        (None, -1, [0]),
        ([], 300, [0]),
        ([5, 302, 300], None, [0, 300]),  # ordinary and unknown ones: of another vocabulary
    ],
)
def test_a_converted_model_says_where_texts_stop(tmp_path, settings, config, ends):
    tokenizer = train_bpe([t.encode() * 20 for t in TEXTS], 300)
    tokenizer.backend.add_special_tokens(["<|eot|>", "<|eom|>"])
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).ends == (0,)
    for name, said in (("config", config), ("generation_config", settings)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"eos_token_id": said}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.end, list(loaded.ends)) == (0, ends)
    assert loaded.decode([*loaded.encode(b"ab"), *ends]) == b"ab"
    feed = loaded.stream()
    assert "".join(map(feed, [*ends, *map(int, loaded.encode(b"ab")), None])) == "ab"


@pytest.mark.parametrize("said", ['{"eos_token_id": "</s>"}', '{"eos_token_id": [1, -1]}', "[]", "{"])
def test_where_texts_stop_is_ids(bpe, tmp_path, said):
    bpe.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(said)
    with pytest.raises(ValueError, match=r"generation_config\.json: (eos_token_id: expected a token id|damaged)"):
        load_tokenizer(tmp_path)


def test_errors(tmp_path, bpe):
    with pytest.raises(FileNotFoundError, match=r"no file 'nope\.json'"):
        make_tokenizer("nope.json")
    with pytest.raises(ValueError, match="bpe:SIZE"):
        make_tokenizer("bpe:many")
    with pytest.raises(ValueError, match="at least 257"):
        make_tokenizer("bpe:100")
    (tmp_path / "tokenizer.json").write_text("{not json")
    with pytest.raises(ValueError, match="damaged"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="not a tokenizers JSON file"):
        make_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="byte 3 of a document"):
        bpe.encode(b"abc\xff")


def test_missing_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ValueError, match="needs the tokenizers package"):
        make_tokenizer("bpe:300", [b"x"])
