"""Heads: from hidden states to scores of the next token.

`LinearHead` is `cap(scale * (h W^T + b))`, which `forktree.ops.score_tokens` computes without a row of logits; where a
model's head is something else, `OwnHead` lets the model compute it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from forktree import ops
from forktree.model.interface import PackedModel
from forktree.ops.token_request import TokenRequest, TokenScores


@dataclass(frozen=True)
class LinearHead:
    """Logits are cap * tanh(scale * (h W^T + b) / cap), without the tanh where cap is None."""

    packed: PackedModel
    vocab_size: int
    scale: float
    cap: float | None

    @property
    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, H] and bias [V], as they are now."""
        linear: nn.Linear = self.packed.model.get_output_embeddings()
        weight, bias = linear.weight, linear.bias
        if len(weight) == self.vocab_size:
            return weight, bias
        # padded by rows that the model cuts off
        return weight[: self.vocab_size], None if bias is None else bias[: self.vocab_size]

    def score(self, hidden: Tensor, request: TokenRequest) -> TokenScores:
        """Scores the token after each of hidden [n, H] by `forktree.ops.score_tokens`, without its check."""
        weight, bias = self.parameters
        return ops.score_tokens(hidden, weight, request, bias=bias, scale=self.scale, softcap=self.cap, check=False)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of hidden [n, H], fp32, each operation rounded to the dtype of hidden, as models do."""
        logits = F.linear(hidden, *self.parameters)
        if self.scale != 1.0:
            logits *= self.scale
        return (logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)).float()


@dataclass(frozen=True)
class OwnHead:
    """Whatever the model does after its decoder, which is replaced by one that returns the hidden states.

    Attributes:
        packed: the model.
        output_class: of what its decoder returns.
    """

    packed: PackedModel
    output_class: type[ModelOutput]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of hidden [n, H], fp32."""
        return self.packed.after_decoder(self.output_class(last_hidden_state=hidden[None])).float()


def find_linear_head(packed: PackedModel, hidden: Tensor, logits: Tensor) -> LinearHead | None:
    """The linear head that maps hidden [n, H] to the model's own logits [n, V], or None.

    Scales go by many names, and one name has opposite meanings (granite divides by `logits_scaling`,
    hyperclovax multiplies): names only propose, the logits decide.
    """
    model: PreTrainedModel = packed.model
    linear: nn.Module | None = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):  # quantised heads, for one
        return None
    if (linear.weight.dtype, linear.weight.device) != (hidden.dtype, hidden.device):  # or it is offloaded
        return None
    if linear._forward_pre_hooks or linear._forward_hooks or "forward" in vars(linear):  # which are to run
        return None
    vocab = logits.shape[1]  # a head may be padded by rows that the model cuts off
    weight = linear.weight[:vocab]
    if weight.shape != (vocab, hidden.shape[1]) or not weight.is_contiguous():
        return None
    config = model.config.get_text_config(decoder=True)
    names = ("logit_scale", "logits_scaling", "lm_head_multiplier")
    named = [getattr(owner, name, None) for owner in (model, config) for name in names]
    scales = [1.0, *(s for x in named if isinstance(x, int | float) and x != 0 for s in (x, 1 / x))]
    tolerance = _tolerance(logits, hidden.dtype)
    for cap in (getattr(config, "final_logit_softcapping", None), None):
        for scale in scales:
            head = LinearHead(packed, vocab, scale, cap)
            if apart(head.logits(hidden), logits) <= tolerance:
                return head
    return None


def is_scored_alike(head: LinearHead, hidden: Tensor, logits: Tensor) -> bool:
    """Whether `head.score` of hidden [n, H] agrees with the model's own logits [n, V].

    Compared are sums over all of them, the best of them, and single ones, as these are computed in different ways.
    """
    vocab = logits.shape[1]
    some = torch.linspace(0, vocab - 1, min(vocab, 64), device=hidden.device).long()
    found = head.score(hidden, TokenRequest(top_k=min(vocab, 64), select=some, lse=True))
    tolerance = _tolerance(logits, hidden.dtype)
    pairs = (
        (found.lse, logits.logsumexp(dim=1)),
        (found.top_log_probs + found.lse[:, None], logits.gather(1, found.top_ids)),
        (found.top_log_probs + found.lse[:, None], logits.topk(len(found.top_ids[0])).values),
        (found.selected_logits, logits[:, some]),
    )
    return all(bool(apart(ours, own) <= tolerance) for ours, own in pairs)


def apart(ours: Tensor, own: Tensor) -> Tensor:
    """The largest difference; 0 between equal infinities, such as the logits of banned tokens."""
    return (ours - own).masked_fill(ours == own, 0).abs().max()


def largest(logits: Tensor) -> Tensor:
    """The largest finite magnitude."""
    return logits.masked_fill(logits.isinf(), 0).abs().max()


def _tolerance(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Of logits in fp32, rounded to dtype once or not at all."""
    return max(1e-5, 4 * torch.finfo(dtype).eps) * largest(logits)
