"""Tokenizers: bytes, a byte-level BPE trained here, or a `tokenizer.json`; all are saved as
`tokenizer.json`.

Every document opens with the end-of-text token, so that each target of a row means something: the
first token of a text follows it, and the last token of a text is followed by the next document's.
"""

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from interlace.trainer.errors import DataError

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|im_end|>",
    "<|eot_id|>",
    "[SEP]",
)
"""Names under which other vocabularies hold their end of text, likeliest first."""

Tokens = NDArray[np.uint32]


class Tokenizer:
    """Text to token ids and back, over the `tokenizers` library.

    Attributes:
        vocabulary_size: Number of ids, the end-of-text token included.
        end_of_text: Id of the token that opens every document.
        is_bytes: Whether ids 0 to 255 are bytes, which allows a quicker way.
    """

    def __init__(self, backend: "tokenizers.Tokenizer", end_of_text: int, is_bytes: bool) -> None:
        self.backend = backend
        self.end_of_text = end_of_text
        self.is_bytes = is_bytes
        # A text that spells the special token must not become it.
        self.backend.encode_special_tokens = True
        self.vocabulary_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode_documents(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the ids of each text, without special tokens."""
        if self.is_bytes:
            return [
                np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32)
                for text in texts
            ]
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, without special tokens."""
        return self.encode_documents([text])[0].tolist()

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD."""
        if self.is_bytes:
            return bytes(token for token in ids if token < 256).decode("utf-8", errors="replace")
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def stream(self, ids: Iterator[int]) -> Iterator[str]:
        """Yield text as ids arrive, never a part of a character."""
        if self.is_bytes:
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            for token in ids:
                yield decoder.decode(bytes([token]) if token < 256 else b"")
            yield decoder.decode(b"", final=True)
            return
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        for token in ids:
            yield stream.step(self.backend, token) or ""

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        path.write_text(self.backend.to_str(), encoding="utf-8")


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer whose ids are byte values, plus 256 for the end of text."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    vocabulary = {symbol: value for value, symbol in enumerate(byte_symbols())}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(backend, 256, is_bytes=True)


def byte_symbols() -> list[str]:
    """Return the character that byte-level BPE writes for each byte value (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [value for value in range(256) if value not in printable]
    table = {value: chr(value) for value in printable}
    table |= {value: chr(256 + number) for number, value in enumerate(hidden)}
    return [table[value] for value in range(256)]


def train_bpe(texts: Iterator[str], vocabulary_size: int) -> Tokenizer:
    """Train a byte-level BPE; the same texts give the same vocabulary."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, backend.get_vocab()[END_OF_TEXT], is_bytes=False)


def load_tokenizer(path: Path, end_of_text: str | None = None) -> Tokenizer:
    """Load a `tokenizer.json`.

    Args:
        path: The file.
        end_of_text: The token that opens every document; None means the first known name.

    Raises:
        DataError: The file is none, or has no such end-of-text token.
    """
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception for everything
        raise DataError(
            f"{path}: is not a tokenizer.json that the tokenizers library reads: {error}"
        ) from error
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if end_of_text is not None and end_of_text not in vocabulary:
        raise DataError(
            f"data.end_of_text={end_of_text}: {path} has no such token; type the one that ends a "
            "text there, or leave it unset"
        )
    usual = next((name for name in END_OF_TEXT_NAMES if name in vocabulary), None)
    found = end_of_text or usual
    if found is None:
        special = sorted(token.content for token in backend.get_added_tokens_decoder().values())
        raise DataError(
            f"{path}: has no end-of-text token under a known name "
            f"({', '.join(END_OF_TEXT_NAMES)}); "
            f"its special tokens are {', '.join(special) or 'none'}; name the one that ends a text "
            "as data.end_of_text"
        )
    symbols = byte_symbols()
    is_bytes = len(vocabulary) == 257 and all(
        vocabulary.get(symbols[value]) == value for value in range(256)
    )
    return Tokenizer(backend, vocabulary[found], is_bytes)
