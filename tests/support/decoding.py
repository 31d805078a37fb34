"""One model used in three ways."""

from typing import Any

import torch

import forktree
from forktree import Decoder, search

PROMPT = [3, 7, 2, 9, 4, 4, 1]

NEW = 6


def plain(model: Any, prompt: list[int] = PROMPT, new: int = NEW) -> list[int]:
    """transformers' own greedy continuation."""
    ids = torch.tensor([prompt])
    return model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None)[0, len(prompt) :].tolist()


def drop_in(model: Any, prompt: list[int] = PROMPT, new: int = NEW) -> list[int]:
    ids, how = torch.tensor([prompt]), dict(custom_generate=forktree.generate)
    found = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, **how)
    return found[0, len(prompt) :].tolist()


def decoded(decoder: Decoder, prompt: list[int] = PROMPT, new: int = NEW) -> list[int]:
    (result,) = decoder.search(prompt, search.Greedy(), max_new_tokens=new)
    return result.best.token_ids
