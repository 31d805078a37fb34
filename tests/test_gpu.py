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


@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: type(s).__name__)
def test_running_ahead_on_the_gpu_changes_nothing(search: forktree.search.Search) -> None:
    prompts, results = tiny.prompts(6), []
    for ahead in (True, False):
        decoder = forktree.Decoder(tiny.new_model().to("cuda"), tiny.tokenizer(), num_slots=2048)
        assert decoder.engine.ahead, "on a GPU unless asked otherwise"
        decoder.engine.ahead = ahead
        results.append(decoder.search(prompts, search, max_new_tokens=12))
        tiny.assert_all_returned(decoder.lane)
    assert tiny.texts(results[0]) == tiny.texts(results[1])


def test_drawing_on_the_gpu_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hidden states to the drawn tokens' place in the next pass, no call waits for the device."""
    decoder = forktree.Decoder(tiny.new_model().to("cuda"), tiny.tokenizer(), num_slots=2048)
    calls = []

    def strict(owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def wrapped(*args: Any) -> Any:
            calls.append(name)
            torch.cuda.set_sync_debug_mode("error")
            try:
                return inner(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(owner, name, wrapped)

    strict(decoder.engine, "_draw")
    strict(decoder.lane, "append_drawn")
    searches = [
        forktree.Sample(num_return_sequences=4, top_k=5, top_p=0.9, min_p=0.01),
        forktree.Greedy(),
        forktree.Sample(num_return_sequences=3, temperature=1.3),
    ]
    results = list(decoder.search_iter(tiny.prompts(3), searches, max_new_tokens=12))
    assert all(r.error is None for r in results)
    assert {"_draw", "append_drawn"} == set(calls)
