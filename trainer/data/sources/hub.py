"""Any Hugging Face dataset by name (or a local folder of one), streamed."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

from interlace.trainer.data.sources.base import BadRow, Document, SourceSpec, Unit, source_kind
from interlace.trainer.data.sources.files import text_of_row
from interlace.trainer.errors import DataError

if TYPE_CHECKING:
    import datasets

# The size of a remote shard is not known before it is read; this only shares out the work.
ASSUMED_SHARD_BYTES = 64 * 2**20


@source_kind("hub")
class Hub:
    """Datasets of the Hugging Face hub."""

    def identity(self, spec: SourceSpec) -> list[str]:
        """Return name, subset and split: the hub is not asked whether the content changed."""
        return [f"{spec.location}/{spec.subset}/{spec.split}"]

    def units(self, spec: SourceSpec) -> list[Unit]:
        """Return one unit per shard of the dataset."""
        count = open_stream(spec).num_shards
        return [
            Unit(f"{number}/{count}", ASSUMED_SHARD_BYTES, fingerprint="")
            for number in range(count)
        ]

    def read(self, spec: SourceSpec, units: Sequence[Unit]) -> Iterator[Document | BadRow]:
        """Yield the text field of every row of the given shards."""
        for unit in units:
            number, count = (int(part) for part in unit.location.split("/"))
            name = f"{spec.location} shard {unit.location}"
            rows = open_stream(spec).shard(num_shards=count, index=number)
            for position, row in enumerate(rows, start=1):
                text = text_of_row(cast(dict[str, object], row), spec.text_field)
                yield text if isinstance(text, Document) else BadRow(name, position, text)


def open_stream(spec: SourceSpec) -> "datasets.IterableDataset":
    """Open a dataset without downloading it.

    Raises:
        DataError: No such dataset, subset or split, or no network.
    """
    import datasets

    try:
        opened = datasets.load_dataset(spec.location, spec.subset, split=spec.split, streaming=True)
    except Exception as error:  # connection, hub and parsing errors have no common base
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"data.source={spec.location}: cannot be opened as a Hugging Face dataset "
            f"(subset={spec.subset}, split={spec.split}): {reason}; check the name and the "
            "network, or "
            "give local files"
        ) from error
    assert isinstance(opened, datasets.IterableDataset)
    return opened
