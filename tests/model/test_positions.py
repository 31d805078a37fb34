"""How far a model's positions reach: where it cannot go on, not what its config says."""

import warnings
from typing import Any

import pytest
import torch
import transformers as hf

import tiny
from forktree import Decoder, Greedy, InvalidInput, sequence_logprobs

LENGTH = 16  # max_position_embeddings
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=4)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1e4,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=4,
)
LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=2.0)
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=1e4,
    short_factor=[1.0] * 4,
    long_factor=[4.0] * 4,
    original_max_position_embeddings=LENGTH,
)


def greedy(decoder: Decoder, prompt: list[int], max_new_tokens: int) -> list[int]:
    return decoder.search([prompt], Greedy(), max_new_tokens=max_new_tokens)[0].best.token_ids


@pytest.mark.parametrize("rope", [None, LINEAR, LLAMA3, YARN], ids=lambda rope: rope and rope["rope_type"])
def test_rope_goes_on_beyond_max_position_embeddings_as_in_transformers(rope: dict[str, Any] | None) -> None:
    model = tiny.new_model(max_position_embeddings=LENGTH, rope_parameters=rope, eos=None)
    prompt, decoder = [3, 1, 4, 1, 5, 9, 2, 6], Decoder(model, num_slots=128)
    expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)[0].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert greedy(decoder, prompt, LENGTH - len(prompt)) == expected[len(prompt) : LENGTH]
    with pytest.warns(RuntimeWarning, match="^llama: a text has passed max_position_embeddings, which is 16;") as told:
        assert greedy(decoder, prompt, 40) == expected[len(prompt) :]
        with torch.no_grad():
            own = model(torch.tensor([expected])).logits[0, :-1].double().log_softmax(-1)
        (found,) = sequence_logprobs(decoder, [expected])
    assert len(told) == 1
    exact = own.gather(1, torch.tensor(expected[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.from_numpy(found), exact, atol=1e-4, rtol=0)


# Tables of positions: learned, with two rows more, in a buffer, of sines that a gather reads.
TABLES: dict[str, tuple[type[hf.PreTrainedConfig], dict[str, Any]]] = {
    "gpt2": (hf.GPT2Config, dict(n_positions=LENGTH)),
    "opt": (hf.OPTConfig, dict(ffn_dim=48, word_embed_proj_dim=32)),
    "ctrl": (hf.CTRLConfig, dict(n_positions=LENGTH, dff=48)),
    "gptj": (hf.GPTJConfig, dict(n_positions=LENGTH, rotary_dim=4)),
}


@pytest.mark.parametrize("kind", TABLES)
@torch.no_grad()
def test_tables_of_positions_end(kind: str) -> None:
    config_class, options = TABLES[kind]
    torch.manual_seed(0)
    sizes = {**tiny.SIZES, "vocab_size": 20, "eos_token_id": None, "max_position_embeddings": LENGTH, **options}
    model = hf.AutoModelForCausalLM.from_config(config_class(**sizes), dtype=torch.float32).eval()
    decoder, prompt = Decoder(model, num_slots=64), [3, 1, 4, 1]
    expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=LENGTH - 4)[0].tolist()
    assert greedy(decoder, prompt, LENGTH - 4) == expected[4:]
    why = "16 positions is passed .the model looks positions up in a table of 16"
    with pytest.raises(InvalidInput, match=f"^prompt 0 has 4 tokens: with max_new_tokens = 13 .* limit of {why}"):
        greedy(decoder, prompt, LENGTH - 3)
    with pytest.raises(IndexError):
        model(torch.zeros(1, LENGTH + 1, dtype=torch.long))


@pytest.mark.parametrize(("rope", "stated"), [(DYNAMIC, LENGTH), (LONGROPE, 64)], ids=["dynamic", "longrope"])
def test_rope_that_depends_on_the_batch_ends_at_its_original_length(rope: dict[str, Any], stated: int) -> None:
    model = tiny.new_model(max_position_embeddings=stated, rope_parameters=rope)
    decoder = Decoder(model, num_slots=64)
    with pytest.raises(InvalidInput, match=rf" 16 positions is passed .{rope['rope_type']} RoPE .* is 16\)"):
        greedy(decoder, [3, 1, 4], LENGTH - 2)
    assert len(greedy(decoder, [3, 1, 4], LENGTH - 3)) > 0
