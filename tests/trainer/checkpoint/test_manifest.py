"""A manifest is read only if it is exactly what the writer would have written."""

import hashlib
import json
from pathlib import Path

import pytest

from interlace.trainer.checkpoint.manifest import (
    FileRecord,
    JsonValue,
    Manifest,
    encode_manifest,
    is_file_name,
    parse_manifest,
)
from interlace.trainer.errors import CheckpointError

SOURCE = Path("run/checkpoints/committed/00000010/MANIFEST.json")
DIGEST = "0" * 64


def document(**changes: JsonValue) -> dict[str, JsonValue]:
    """A valid manifest without its digest, some keys replaced."""
    return {
        "attempt": 3,
        "created": "2026-01-02T03:04:05+00:00",
        "files": [{"bytes": 5, "name": "a.safetensors", "sha256": DIGEST}],
        "format_version": 1,
        "payload": {"loss": 0.1, "name": "caf\u00e9", "none": None},
        "step": 10,
    } | changes


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def signed(rest: dict[str, JsonValue]) -> bytes:
    """The plain twin of `encode_manifest`: any document with a right digest."""
    digest = hashlib.sha256(canonical(rest)).hexdigest()
    return canonical({**rest, "self_digest": digest})


def refusal(text: bytes, step: int = 10) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse_manifest(text, step, SOURCE)
    message = str(caught.value)
    assert message.startswith(f"{SOURCE}: ") and message.endswith(".")
    return message.removeprefix(f"{SOURCE}: ")


def test_the_encoding_is_canonical_json_with_the_digest_of_the_rest() -> None:
    manifest = Manifest(
        step=10,
        attempt=3,
        created="2026-01-02T03:04:05+00:00",
        files=(FileRecord("a.safetensors", 5, DIGEST),),
        payload={"loss": 0.1, "name": "caf\u00e9", "none": None},
    )
    assert encode_manifest(manifest) == signed(document())
    assert parse_manifest(signed(document()), 10, SOURCE) == manifest
    assert manifest.total_bytes == 5


def test_a_payload_that_json_cannot_hold_is_a_defect_of_the_caller() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        encode_manifest(Manifest(1, 1, "", (), {"loss": float("nan")}))


def test_another_step_is_refused() -> None:
    assert (
        refusal(signed(document()), step=15) == "says step 10, but lies in the folder of step 15."
    )


def test_an_edited_value_is_found_by_the_digest() -> None:
    text = signed(document()).replace(b'"step":10', b'"step":11')
    reason = "its own digest does not match, so it was damaged or edited."
    assert refusal(text, step=11) == reason


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"step":10', b'"step": 10'),
        (b"}\n", b"}"),
        (b"}\n", b"}\n\n"),
        (b"\\u00e9", b"\\u00E9"),
        (b"0.1", b"1e-1"),
    ],
)
def test_the_same_meaning_in_other_bytes_is_refused(old: bytes, new: bytes) -> None:
    text = signed(document())
    changed = text.replace(old, new)
    assert changed != text
    assert refusal(changed) == "not in the form it was written in, so it was damaged or edited."


def test_a_newer_format_says_which_program_to_use() -> None:
    assert refusal(signed(document(format_version=2))) == (
        "format version 2, but this Interlace reads 1; use the version that wrote it."
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not valid JSON (Expecting value: line 1 column 1 (char 0))."),
        (b"\xff", "not valid JSON ('ascii' codec can't decode byte 0xff in position 0"),
        (b"[" * 100_000, "not valid JSON (maximum recursion depth exceeded"),
        (b"1" * 10_000, "not valid JSON (Exceeds the limit"),
        (b'{"a":NaN}\n', "not valid JSON (NaN is not JSON)."),
        (b'{"a":1e999}\n', "not valid JSON (Out of range float values are not JSON compliant"),
        (b'{"a":1,"a":1}\n', "not valid JSON (a key appears twice)."),
        (b"[]\n", "not a JSON object."),
        (b"{}\n", "its own digest does not match"),
    ],
)
def test_what_is_not_a_manifest_is_refused(text: bytes, reason: str) -> None:
    assert refusal(text).startswith(reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"extra": 1}, "keys ['attempt', 'created', 'extra', 'files',"),
        ({"step": True}, "step=True is not a whole number from 0."),
        ({"step": 10.0}, "step=10.0 is not a whole number from 0."),
        ({"attempt": -1}, "attempt=-1 is not a whole number from 0."),
        ({"created": 5}, "'created' is not text or 'payload' is not an object."),
        ({"payload": []}, "'created' is not text or 'payload' is not an object."),
        ({"files": {}}, "'files' is not a list."),
        ({"files": ["a"]}, "a file entry without exactly the keys ['bytes', 'name', 'sha256']."),
        ({"files": [{"name": "a"}]}, "a file entry without exactly the keys"),
        (
            {"files": [{"name": "a", "bytes": "5", "sha256": DIGEST}]},
            "bytes='5' is not a whole number from 0.",
        ),
        ({"files": [{"name": "a", "bytes": 5, "sha256": "0"}]}, "a: '0' is not a SHA-256."),
        ({"files": [{"name": "a", "bytes": 5, "sha256": DIGEST}] * 2}, "names a file twice."),
    ],
)
def test_a_wrong_key_or_type_is_named(changes: dict[str, JsonValue], reason: str) -> None:
    assert refusal(signed(document(**changes))).startswith(reason)


UGLY_NAMES = [
    "",
    ".",
    "..",
    "../a",
    "/etc/passwd",
    "a/b",
    "a\\b",
    ".a.partial",
    "a\n",
    "a\0",
    "A.safetensors",
    "manifest.json",
    "MANIFEST.json",
    "caf\u00e9",
    "a" * 129,
]


@pytest.mark.parametrize("name", UGLY_NAMES)
def test_a_name_that_could_leave_the_folder_is_refused(name: str) -> None:
    record: JsonValue = {"name": name, "bytes": 5, "sha256": DIGEST}
    assert refusal(signed(document(files=[record]))) == (
        f"file name {name!r} is not a plain name of a-z 0-9 . _ -."
    )
    assert not is_file_name(name)


def test_ordinary_names_are_allowed() -> None:
    assert all(map(is_file_name, ["rank-00000-of-00004.safetensors", "a", "0", "a" * 128]))
