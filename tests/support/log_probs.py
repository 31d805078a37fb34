"""Texts that share prefixes, and their log-probs by the model itself."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
import transformers as hf


def reference(model: hf.PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Log-probs of tokens 1.. of each sequence, each in a full forward of its own, in fp64."""
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")  # grouped products know no fp64
    found = []
    for tokens in sequences:
        ids = torch.tensor([list(tokens)])
        with torch.no_grad():
            log_probs = exact(input_ids=ids, use_cache=False).logits[0].double().log_softmax(dim=-1)
        found.append(log_probs[:-1].gather(1, ids[0, 1:, None]).squeeze(1).numpy())
    return found


def assert_close(found: list[np.ndarray], expected: list[np.ndarray], atol: float = 1e-4) -> None:
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, want, atol=atol, rtol=0)


def family(seed: int, vocab: int, *, longest: int = 40) -> list[list[int]]:
    """Ragged texts in no order that share beginnings: forks of forks, prefixes of others, equal ones, single tokens."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(vocab, size=rng.integers(1, longest)).tolist() for _ in range(3)]
    for _ in range(12):
        stem = texts[rng.integers(len(texts))]
        tail = rng.integers(vocab, size=rng.integers(0, longest // 3)).tolist()
        texts.append((stem[: rng.integers(1, len(stem) + 1)] + tail)[:longest])
    texts += [texts[5], [1], [1, 2]]
    return [texts[i] for i in rng.permutation(len(texts))]
