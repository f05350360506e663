"""Rows of tokens from a prepared corpus: training rows by (step, number), validation rows in order.

A row holds `sequence_length + 1` tokens: inputs and, shifted by one, their targets. Row `r` of a
source begins at token `r * sequence_length` of its stream. Documents are told apart by the
end-of-text token that opens each of them.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from interlace.trainer.config.schema import RunConfig
from interlace.trainer.data.gaps import batch_of, parse_gaps
from interlace.trainer.data.order import Mixture
from interlace.trainer.data.shards import PreparedCorpus, SplitName, TokenStream
from interlace.trainer.data.sources.base import specs_of
from interlace.trainer.errors import DataError

Rows = NDArray[np.int64]


class TrainingRows:
    """The training order of a run.

    Raises:
        DataError: A source holds less than a row, or all of them hold less than one step.
    """

    def __init__(self, corpus: PreparedCorpus, config: RunConfig) -> None:
        self.length = config.data.sequence_length
        self.rows_per_step = config.train.tokens_per_step // self.length
        self.streams = streams_of(corpus, "train")
        counts = [(len(stream) - 1) // self.length for stream in self.streams]
        for source, count, stream in zip(corpus.index.sources, counts, self.streams, strict=True):
            if count < 1:
                raise DataError(
                    f"data.source={source.description}: holds {len(stream):,} training tokens, "
                    "less than "
                    f"one row of data.sequence_length={self.length}; lower it or add text"
                )
        if sum(counts) < self.rows_per_step:
            raise DataError(
                f"data.source holds {sum(counts) * self.length:,} training tokens in whole rows, "
                "less than "
                f"one step of train.tokens_per_step={config.train.tokens_per_step}; type "
                f"train.tokens_per_step={sum(counts) * self.length} or less, or add text"
            )
        weights = [spec.weight for spec in specs_of(config.data)]
        self.order = Mixture(weights, counts, config.run.seed)
        self.gaps = parse_gaps(config.data.skip_batches)

    def batch(self, step: int, numbers: Sequence[int]) -> Rows:
        """Return rows of one step, (len(numbers), sequence_length + 1)."""
        return np.stack([self.row(step, number) for number in numbers])

    def row(self, step: int, number: int) -> Rows:
        """Return row `number` of `step`: a pure function of the seed and the two."""
        source, row = self.order[self.place(step, number)]
        return self.streams[source].read(row * self.length, (row + 1) * self.length + 1)

    def place(self, step: int, number: int) -> int:
        """Return which row of the whole order that is: gaps shift it, nothing else does."""
        return batch_of(step, self.gaps) * self.rows_per_step + number


class ValidationRows:
    """The held-out rows that every validation reads, spread over each source in proportion to the
    weights.

    Raises:
        DataError: No source holds one row.
    """

    def __init__(self, corpus: PreparedCorpus, config: RunConfig) -> None:
        self.length = config.data.sequence_length
        self.streams = streams_of(corpus, "validation")
        wanted = config.train.validation_tokens // self.length
        weights = [spec.weight for spec in specs_of(config.data)]
        available = [max(0, (len(stream) - 1) // self.length) for stream in self.streams]
        self.places: list[tuple[int, int]] = []
        for source, (count, weight) in enumerate(zip(available, weights, strict=True)):
            share = min(count, max(1, round(wanted * weight / sum(weights))))
            # Spread evenly: the first rows would be the first few documents.
            self.places += [(source, number * count // share) for number in range(share)]
        if not self.places:
            held = sum(len(stream) for stream in self.streams)
            raise DataError(
                f"the validation split holds {held:,} tokens, less than one row of "
                f"data.sequence_length={self.length}; raise data.validation_fraction="
                f"{config.data.validation_fraction}, lower the length, or add text"
            )

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self.places)

    def batch(self, start: int, stop: int) -> Rows:
        """Return rows `start` to `stop`, (stop - start, sequence_length + 1)."""
        return np.stack(
            [
                self.streams[source].read(row * self.length, (row + 1) * self.length + 1)
                for source, row in self.places[start:stop]
            ]
        )


def streams_of(corpus: PreparedCorpus, split: SplitName) -> list[TokenStream]:
    """Open one split of every source."""
    return [TokenStream(corpus, source.split(split)) for source in corpus.index.sources]


def segments_of(tokens: Rows, end_of_text: int) -> Rows:
    """Return the number of the document of each token, (B, T): end-of-text tokens met so far in
    its row.
    """
    return np.cumsum(tokens == end_of_text, axis=1)


def positions_of(segments: Rows) -> Rows:
    """Return the position of each token in its document, (B, T); a row's beginning counts from 0
    too.
    """
    places = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    opens = np.zeros(segments.shape, dtype=bool)
    opens[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return places - np.maximum.accumulate(np.where(opens, places, 0), axis=1)
