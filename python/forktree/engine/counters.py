"""What one search cost."""

from dataclasses import dataclass


@dataclass
class Counters:
    """What one search cost. A prefix shared by several searches counts for the one that wrote it."""

    model_tokens: int = 0  # tokens run through the policy
    reward_tokens: int = 0  # tokens run through a reward model
    reward_calls: int = 0  # branches rewarded
    peak_slots: int = 0  # most KV slots that the tokens it wrote took at once
    seconds: float = 0.0
