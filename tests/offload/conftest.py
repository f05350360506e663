"""What the tests of the engine share."""

import pytest

from interlace.offload.hardware import HardwareProfile, load_profile


@pytest.fixture(scope="session")
def profile() -> HardwareProfile:
    """Some machine with a device; the numbers do not matter to what is computed."""
    return load_profile("4xh100-pcie5")
