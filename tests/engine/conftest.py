"""Fixtures of the engine's tests."""

import pytest
import torch

import tiny
from forktree import Decoder
from searches import POISON


@pytest.fixture
def poisoned() -> Decoder:
    """A decoder whose model gives NaN for every text with the token POISON in it."""
    model = tiny.new_model()
    decoder = Decoder(model, tiny.tokenizer(), num_slots=400)
    # `attach` would refuse it, rightly, and again if this were seen
    model.get_input_embeddings().weight.data[POISON] = torch.nan
    return decoder
