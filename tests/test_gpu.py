"""On a GPU: whole searches give what they give on the CPU. Collected everywhere, run where there is a device."""

from typing import Any

import pytest
import torch

import forktree
import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SEARCHES: list[forktree.search.Search] = [
    forktree.Greedy(),
    forktree.Sample(num_return_sequences=4),
    forktree.BeamSearch(num_beams=4, num_return_sequences=2),
    forktree.ParticleFilter(num_particles=4, max_step_tokens=3, scorer=forktree.TokenLogits([1, 2])),
]


@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: type(s).__name__)
def test_a_search_on_the_gpu_equals_one_on_the_cpu(search: forktree.search.Search) -> None:
    def decoder(device: str) -> Any:
        return forktree.Decoder(tiny.new_model().to(device), tiny.tokenizer(), num_slots=2048)

    prompts = tiny.prompts(6)
    cpu, gpu = (decoder(d).search(prompts, search, max_new_tokens=12) for d in ("cpu", "cuda"))
    assert tiny.texts(gpu) == tiny.texts(cpu)
