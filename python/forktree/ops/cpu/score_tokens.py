"""`forktree.ops.score_tokens` by `csrc/cpu/score_tokens/`."""

from torch import Tensor

from forktree import _core
from forktree.ops import params
from forktree.ops.assemble import LmHead, VocabPass, VocabPassResult
from forktree.ops.cpu import run


def launch(hidden: Tensor, lm_head: LmHead, wanted: VocabPass) -> VocabPassResult:
    call, found = params.score_tokens(hidden, lm_head, wanted)
    run(_core.score_tokens, call)
    return found
