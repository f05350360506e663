"""Tokenizers: exact round trips, streaming, and what is saved is what is loaded."""

import json
from pathlib import Path

import pytest

from interlace.trainer.data.tokenizers import (
    END_OF_TEXT,
    Tokenizer,
    byte_tokenizer,
    load_tokenizer,
    train_bpe,
)
from interlace.trainer.errors import DataError

UNICODE = "".join(map(chr, [*range(0x2000), *range(0x4E00, 0x4F00), *range(0x1F600, 0x1F650)]))
TEXTS = (UNICODE, "def f(x):\n    return x\n" * 50, "a\r\nb\tc", f"before{END_OF_TEXT}after", "")


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return byte_tokenizer() if request.param == "bytes" else train_bpe(iter(TEXTS), 400)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text not in ids
    assert max(ids, default=0) < tokenizer.vocabulary_size


def test_a_stream_never_shows_a_part_of_a_character(tokenizer: Tokenizer) -> None:
    text = "naïve 日本語 😀 end"
    pieces = list(tokenizer.stream(iter(tokenizer.encode(text))))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_saved_tokenizer_loads_as_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.encode(UNICODE) == tokenizer.encode(UNICODE)
    assert loaded.end_of_text == tokenizer.end_of_text
    assert loaded.is_bytes == tokenizer.is_bytes
    assert loaded.vocabulary_size == tokenizer.vocabulary_size


def test_byte_ids_are_byte_values_for_the_library_too() -> None:
    tokenizer = byte_tokenizer()
    text = UNICODE[1:]
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.backend.encode(text, add_special_tokens=False).ids == list(text.encode())
    assert tokenizer.vocabulary_size == 257


def test_training_twice_gives_the_same_vocabulary() -> None:
    first, second = train_bpe(iter(TEXTS), 400), train_bpe(iter(TEXTS), 400)
    assert first.backend.to_str() == second.backend.to_str()


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="that the tokenizers library reads"):
        load_tokenizer(path)


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    byte_tokenizer().save(path)
    document = json.loads(path.read_text(encoding="utf-8"))
    document["added_tokens"][0]["content"] = "<stop>"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_tokenizer(path)
    assert "has no end-of-text token under a known name" in str(caught.value)
    assert "its special tokens are <stop>" in str(caught.value)
    assert load_tokenizer(path, "<stop>").end_of_text == 256
    with pytest.raises(DataError) as caught:
        load_tokenizer(path, "<gone>")
    assert str(caught.value) == (
        f"data.end_of_text=<gone>: {path} has no such token; type the one that ends a text there, "
        "or leave it unset"
    )
