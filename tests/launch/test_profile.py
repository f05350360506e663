"""Profiles that are damaged, outdated or cannot be kept; whole ones are measured in `test_cli`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from interlace.launch.cli import main
from interlace.offload import measure as measuring
from interlace.offload.hardware import HardwareProfile, load_profile
from interlace.offload.measure import cache_path, keep, known_profile

CPU = torch.device("cpu")


def changed(**rates: object) -> str:
    document = load_profile("gh200").model_dump(mode="json")
    return json.dumps({**document, "rates": {**document["rates"], **rates}})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe\x00", "is not a profile: byte 0 is not UTF-8 text"),
        (b'{"device_name": ', "is not a profile: the file: Invalid JSON: EOF while parsing"),
        (b"[]", "is not a profile: the file: Input should be an object"),
        (
            changed(h2d_bytes_per_second=-1).encode(),
            "is not a profile: rates.h2d_bytes_per_second: Input should be greater than 0",
        ),
        (
            changed(h2d_bytes_per_second=1e300).encode(),
            "rates.h2d_bytes_per_second=1e+300 is no figure of a machine (from 1000 to 1e+16)",
        ),
        (
            changed(host_dram_bytes_per_second=1e-300).encode(),
            "rates.host_dram_bytes_per_second=1e-300 is no figure of a machine",
        ),
    ],
    ids=["binary", "torn", "list", "negative", "huge", "tiny"],
)
def test_a_bad_profile_is_named_with_key_reason_and_remedy(
    content: bytes, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    for words in (["plan", "quickstart", "--hardware"], ["profile", "--show"]):
        assert main([*words, str(path)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"interlace: {words[-1]} {path}: {reason}")
        assert said.endswith("; measure one with `interlace profile`\n")


def test_every_machine_that_ships_is_plausible() -> None:
    for name in ("4xa100-pcie4", "4xh100-pcie5", "gh200", "h200"):
        assert load_profile(name).rates


@pytest.fixture
def measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[], tuple[HardwareProfile, list[str]]]:
    """Ask for the profile on record; measuring takes no time. Returns it and what was said."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fresh = load_profile("gh200").model_copy(update={"name": "fresh"})
    monkeypatch.setattr(measuring, "measure", lambda *_, **__: fresh)

    def ask() -> tuple[HardwareProfile, list[str]]:
        said: list[str] = []
        return known_profile(CPU, said.append), said

    return ask


@pytest.mark.parametrize(
    "content",
    [b"\xff", b"{", b'{"device_name": "CPU"}', changed(h2d_bytes_per_second=1e300).encode()],
    ids=["binary", "torn", "outdated", "absurd"],
)
def test_a_damaged_record_is_measured_again(
    content: bytes, measured: Callable[[], tuple[HardwareProfile, list[str]]]
) -> None:
    path = cache_path(CPU)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    profile, said = measured()
    assert profile.name == "fresh"
    assert said[0].startswith("the profile on record cannot be used (")
    assert said[0].endswith(f": {path}")
    assert measured()[1] == [], "it is kept"


def test_a_record_that_is_whole_is_used(
    measured: Callable[[], tuple[HardwareProfile, list[str]]],
) -> None:
    keep(load_profile("h200"), cache_path(CPU))
    profile, said = measured()
    assert (profile.name, said) == ("h200", [])


def test_a_record_that_cannot_be_written_is_a_note(
    measured: Callable[[], tuple[HardwareProfile, list[str]]], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be", encoding="utf-8")
    profile, said = measured()
    assert profile.name == "fresh"
    assert said[-1] == (
        f"{cache_path(CPU)} cannot be written (Not a directory); the next start measures again"
    )
