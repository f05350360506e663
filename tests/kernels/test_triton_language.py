"""A missing or old Triton is said in words, with what to type."""

import sys

import pytest

from interlace.kernels.triton_language import require_triton, why_no_triton

REMEDY = "type  pip install 'triton>=3.6'  (CUDA builds of torch bring it along)"


def test_triton_that_is_here_may_be_used() -> None:
    pytest.importorskip("triton")
    assert why_no_triton() is None
    require_triton("a test")


def test_a_missing_triton_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    # None in sys.modules makes an import fail as if nothing were installed.
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError) as caught:
        require_triton("attention on a GPU")
    assert str(caught.value) == (
        "attention on a GPU needs Triton. Triton cannot be imported (import of triton halted; None "
        f"in sys.modules); {REMEDY}"
    )
    assert caught.value.name == "triton"


@pytest.mark.parametrize("version", ["3.5.1", "2.9.0+git1234"])
def test_an_old_triton_is_named_with_its_remedy(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", version)
    with pytest.raises(ImportError) as caught:
        require_triton("attention on a GPU")
    assert str(caught.value) == (
        f"attention on a GPU needs Triton. Triton {version} is older than 3.6; {REMEDY}"
    )


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0", "4.0.0a1"])
def test_later_versions_are_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", version)
    assert why_no_triton() is None
