"""What one search cost."""

from dataclasses import dataclass


@dataclass
class Counters:
    """What one search cost. A prefix shared by several searches counts for the one that wrote it."""

    model_tokens: int = 0  # tokens run through the policy
    scorer_tokens: int = 0  # tokens run through a reward model
    scorer_calls: int = 0  # branches scored
    peak_slots: int = 0  # most KV slots that the tokens it wrote took at once
    seconds: float = 0.0
