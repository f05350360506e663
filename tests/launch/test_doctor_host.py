"""`interlace doctor`: cores, and what others on the machine could read or change."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from interlace.launch import doctor_host
from interlace.launch.cli import main
from interlace.launch.doctor_host import Cores, core_lines, warnings_here


@pytest.fixture(autouse=True)
def quiet_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a working folder in which nothing is wrong, of a user who is not root."""
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path / "home")
    monkeypatch.setattr("os.getuid", lambda: 1000)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def machine(monkeypatch: pytest.MonkeyPatch, cores: int, nodes: dict[int, str], at: Path) -> Cores:
    for number, listed in nodes.items():
        (at / f"node{number}").mkdir(parents=True)
        (at / f"node{number}" / "cpulist").write_text(listed, encoding="ascii")
    monkeypatch.setattr(doctor_host, "NODES", at)
    monkeypatch.setattr(doctor_host, "usable_cores", lambda: set(range(cores)))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    return doctor_host.cores_here()


def test_cores_are_told_with_the_share_of_every_rank(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = machine(monkeypatch, 16, {0: "0-7", 1: "8-15"}, tmp_path / "nodes")
    assert found.numa_nodes == (8, 8)
    assert core_lines(found) == [
        ("cores", "16 usable, on 2 NUMA nodes (8 + 8)"),
        ("share of a rank", "1 rank on this machine: 16"),
        ("", "2 ranks on this machine: 8"),
        ("", "4 ranks on this machine: 4"),
    ]


def test_few_threads_for_many_cores_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    warning = machine(monkeypatch, 16, {}, tmp_path / "nodes").warning
    assert warning is not None
    assert "OMP_NUM_THREADS=1: with 1 rank on this machine, 15 of the 16 cores" in warning
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    assert machine(monkeypatch, 16, {}, tmp_path / "nodes").warning is None


def test_nothing_is_warned_of_where_nothing_is_wrong(quiet_home: Path) -> None:
    (quiet_home / "runs" / "one-0001").mkdir(parents=True, mode=0o700)
    assert warnings_here(quiet_home) == []


def test_what_is_open_to_others_is_named_with_what_closes_it(
    quiet_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        (quiet_home / "runs" / f"one-000{number}").mkdir(parents=True)
    token = quiet_home / "home" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("secret", encoding="ascii")
    token.chmod(0o644)
    (quiet_home / "ray").mkdir()
    (quiet_home / "ray").chmod(0o777)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr("os.getuid", lambda: 0)
    old = {"torch": "2.9.1+cu128", "transformers": "5.3rc1", "ray": "2.9"}
    monkeypatch.setattr(metadata, "version", old.__getitem__)
    folders, *ray, root = warnings_here(quiet_home)[2:]
    assert warnings_here(quiet_home)[:2] == [
        "torch 2.9.1+cu128: files of weights could run code when they were loaded "
        "(CVE-2026-24747); type  pip install 'torch>=2.10'",
        "ray 2.9: a cluster has no token, and lets anybody run code (CVE-2023-48022); type  "
        "pip install 'ray>=2.52'",
    ]
    assert "others may enter run folders: one-0000, one-0001, one-0002 and 2 more" in folders
    assert f"chmod -R go= {quiet_home}/runs/*" in folders
    assert "RAY_AUTH_MODE=disabled" in ray[0]
    assert f"chmod 600 {token}" in ray[1]
    assert f"every user may write to {quiet_home}/ray" in ray[2]
    assert "this is root" in root
    assert "secret" not in str(warnings_here(quiet_home))


def test_both_are_on_the_page_and_in_the_document(
    capsys: pytest.CaptureFixture[str], quiet_home: Path
) -> None:
    (quiet_home / "runs" / "open-0001").mkdir(parents=True)
    assert main(["doctor"]) == 0
    page = capsys.readouterr().out
    assert "\n  cores  " in page
    assert "\n  safety  " in page
    assert main(["doctor", "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["cores"]["usable"] >= 1
    assert "open-0001" in told["warnings"][0]
