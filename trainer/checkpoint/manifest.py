"""The file that makes a folder a checkpoint: every other file with its size and digest, and one of
itself.

MANIFEST.json is canonical JSON: sorted keys, no spaces, ASCII, one newline at the end. A reader
encodes what it parsed and compares the bytes, so two different files never mean the same manifest,
and a flipped byte shows even where JSON would forgive it. `self_digest` is the SHA-256 of the
canonical JSON of all other keys; it finds damage, not malice: whoever can write the folder can also
write a new digest. Nothing here touches the disk.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn, TypeAlias, cast

from interlace.trainer.errors import CheckpointError

MANIFEST_NAME = "MANIFEST.json"
FORMAT_VERSION = 1
# A checkpoint of a hundred thousand tensors needs a fifth of this; more would be an attack on our
# memory.
MANIFEST_LIMIT_BYTES = 64 * 2**20

JsonValue: TypeAlias = (
    "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
)

_KEYS = {"attempt", "created", "files", "format_version", "payload", "self_digest", "step"}
_RECORD_KEYS = {"bytes", "name", "sha256"}
# Lower case only, so that no two names clash on a file system that ignores case; no leading dot, so
# that neither ".." nor the name of a half-written file can match; no separators.
_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint: its plain name, its size, its SHA-256 in lower-case hexadecimal."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a committed checkpoint consists of.

    `created` is UTC text for people; nothing is ever ordered by it. `payload` is whatever the
    writer wanted to keep beside the files (the tensor index, counters, the configuration), as JSON.
    """

    step: int
    attempt: int
    created: str
    files: tuple[FileRecord, ...]
    payload: Mapping[str, JsonValue]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files, without the manifest."""
        return sum(record.bytes for record in self.files)


def is_file_name(name: str) -> bool:
    """Whether a checkpoint may hold a file of this name (`a-z 0-9 . _ -`, up to 128)."""
    return _FILE_NAME.fullmatch(name) is not None and name != MANIFEST_NAME.lower()


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of MANIFEST.json.

    Raises:
        ValueError: The payload holds a NaN or an infinity, which JSON cannot express.
        TypeError: The payload holds something that is not JSON.
    """
    document: dict[str, JsonValue] = {
        "attempt": manifest.attempt,
        "created": manifest.created,
        "files": [asdict(record) for record in manifest.files],
        "format_version": FORMAT_VERSION,
        "payload": manifest.payload,
        "step": manifest.step,
    }
    return _canonical({**document, "self_digest": _digest(document)})


def parse_manifest(text: bytes, step: int, source: Path) -> Manifest:
    """Return the manifest in `text` after checking everything that can be checked without its
    files.

    Args:
        text: The bytes of the file.
        step: The step that the folder's name promises.
        source: Where the bytes came from, for messages.

    Raises:
        CheckpointError: Anything is not as `encode_manifest` would have written it.
    """
    document = _parse_object(text, source)
    rest = {key: value for key, value in document.items() if key != "self_digest"}
    if _digest(rest) != document.get("self_digest"):
        _refuse(source, "its own digest does not match, so it was damaged or edited")
    if document.get("format_version") != FORMAT_VERSION:
        _refuse(
            source,
            f"format version {document.get('format_version')!r}, but this Interlace reads "
            f"{FORMAT_VERSION}; use the version that wrote it",
        )
    if document.keys() != _KEYS:
        _refuse(source, f"keys {sorted(document)} instead of {sorted(_KEYS)}")
    if _count(document, "step", source) != step:
        _refuse(source, f"says step {document['step']}, but lies in the folder of step {step}")
    if not isinstance(document["created"], str) or not isinstance(document["payload"], dict):
        _refuse(source, "'created' is not text or 'payload' is not an object")
    return Manifest(
        step=step,
        attempt=_count(document, "attempt", source),
        created=document["created"],
        files=_file_records(document["files"], source),
        payload=document["payload"],
    )


def _parse_object(text: bytes, source: Path) -> dict[str, JsonValue]:
    try:
        document = cast(
            object,
            json.loads(
                text.decode("ascii"), object_pairs_hook=_unique, parse_constant=_refuse_constant
            ),
        )
        if not isinstance(document, dict):
            _refuse(source, "not a JSON object")
        parsed = cast(dict[str, JsonValue], document)
        canonical = _canonical(parsed)
    except CheckpointError:
        raise
    # RecursionError: brackets nested by the thousand.
    except (ValueError, RecursionError) as error:
        _refuse(source, f"not valid JSON ({error})")
    if canonical != text:
        _refuse(source, "not in the form it was written in, so it was damaged or edited")
    return parsed


def _file_records(value: JsonValue, source: Path) -> tuple[FileRecord, ...]:
    if not isinstance(value, list):
        _refuse(source, "'files' is not a list")
    records: list[FileRecord] = []
    for entry in value:
        if not isinstance(entry, dict) or entry.keys() != _RECORD_KEYS:
            _refuse(source, f"a file entry without exactly the keys {sorted(_RECORD_KEYS)}")
        name, digest = entry["name"], entry["sha256"]
        if not isinstance(name, str) or not is_file_name(name):
            _refuse(source, f"file name {name!r} is not a plain name of a-z 0-9 . _ -")
        if not isinstance(digest, str) or _DIGEST.fullmatch(digest) is None:
            _refuse(source, f"{name}: {digest!r} is not a SHA-256")
        records.append(FileRecord(name, _count(entry, "bytes", source), digest))
    names = [record.name for record in records]
    if len(set(names)) != len(names):
        _refuse(source, "names a file twice")
    return tuple(records)


def _count(document: Mapping[str, JsonValue], key: str, source: Path) -> int:
    value = document[key]
    # `type`, because True is an int to isinstance.
    if type(value) is not int or value < 0:
        _refuse(source, f"{key}={value!r} is not a whole number from 0")
    return value


def _unique(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key appears twice")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _canonical(document: JsonValue) -> bytes:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii") + b"\n"


def _digest(document: Mapping[str, JsonValue]) -> str:
    return hashlib.sha256(_canonical(document)).hexdigest()


def _refuse(source: Path, reason: str) -> NoReturn:
    raise CheckpointError(f"{source}: {reason}.")
