"""How exactly a model computes, and so how exactly it can be compared with itself."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from forktree.model.refusal import Refusal

# Correct models measure 1e-6 in fp32; up to 0.02 in fp16 and 0.1 in bf16, at 48 layers with peaked attention.
# Wrong ones are near 1, or at 0.1 to 0.3 if one layer of 24 is: half precision refuses clear mismatches only.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
_COARSE = 0.2  # for anything less precise


@dataclass(frozen=True)
class Precision:
    """The largest relative error that is rounding.

    Attributes:
        tolerance: relative to the spread of a row.
        by_median: whether the median token decides: in half precision some may choose other experts for rounding alone.
        note: where the tolerance comes from.
    """

    tolerance: float
    by_median: bool
    note: str

    @classmethod
    def of(cls, dtypes: set[torch.dtype], batch_errors: Tensor) -> "Precision":
        """The precision of a model.

        Args:
            dtypes: all that are involved; the coarsest counts.
            batch_errors: [n] relative errors between a text's rows alone and in a batch. They show arithmetic that is
                coarser than its dtypes, such as that of quantised activations.
        """
        coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        stated = cls(_TOLERANCE.get(coarsest, _COARSE), torch.finfo(coarsest).bits < 32, str(coarsest))
        if stated.error(batch_errors) <= stated.tolerance:
            return stated
        error = batch_errors.median().item()
        if not error <= _COARSE:
            raise Refusal(
                "expected a text's logits not to depend on what else is in the batch, got a relative error of "
                f"{error:.2g} between the model's own eager results alone and in a batch; use a model whose rows are "
                "independent"
            )
        tolerance = max(stated.tolerance, min(4 * error, _COARSE))
        return cls(tolerance, True, f"its own results vary by {error:.2g} with what else is in the batch")

    def error(self, errors: Tensor) -> float:
        """The error that counts, of those of each token."""
        return (errors.median() if self.by_median else errors.max()).item()

    def check(self, errors: Tensor, expected: str, otherwise: str) -> None:
        """Raises `Refusal` if errors [tokens] are more than rounding; an infinite one is never rounding."""
        error = math.inf if errors.isinf().any() else self.error(errors)
        if not error <= self.tolerance:
            raise Refusal(
                f"expected {expected} within {self.tolerance:g} of their spread ({self.note}), got {error:.2g}; "
                f"{otherwise}"
            )


def relative_error(ours: Tensor, own: Tensor) -> Tensor:
    """Error of each row of ours [n, X] against own [n, X], relative to the spread of the row.

    A row with less spread than all rows have on average counts by that: rounding is no smaller in a row of zeros.
    Infinities are equal where they are the same, and infinitely wrong elsewhere.
    """
    ours, own = ours.float(), own.float()
    numbers = own.masked_fill(own.isinf(), torch.nan)
    spread = (numbers - numbers.nanmean(-1, keepdim=True)).nan_to_num().norm(dim=-1)
    spread = spread.clamp(min=spread.square().mean().sqrt())
    error = (ours - own).masked_fill(ours == own, 0).norm(dim=-1)
    return error / spread.clamp(min=torch.finfo(torch.float32).tiny)
