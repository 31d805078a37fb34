"""`forktree.ops.score_tokens` by `csrc/cpu/score_tokens/`."""

import torch
from torch import Tensor

from forktree import _core
from forktree.ops import params
from forktree.ops.assemble import LmHead, VocabPass, VocabPassResult


def launch(hidden: Tensor, lm_head: LmHead, wanted: VocabPass) -> VocabPassResult:
    return params.score_tokens(_core.score_tokens, torch.get_num_threads(), hidden, lm_head, wanted)
