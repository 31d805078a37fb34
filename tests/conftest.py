import pytest
import torch


@pytest.fixture
def threads():
    """Numbers of threads to compare, fewest first. The present one is restored."""
    before = torch.get_num_threads()
    yield 1, 2, 5
    torch.set_num_threads(before)
