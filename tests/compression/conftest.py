import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _poisoned_memory():
    """Fills what torch.empty returns with NaN or the largest integer, as in tests/gloo.py."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
