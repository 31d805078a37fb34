"""Every error that forktree raises on purpose.

Each message says what was wrong, what was expected, what was found, and what to do.
"""


class ForktreeError(Exception):
    """Base of all errors below; the command line prints its message as one line."""


class UnsupportedModel(ForktreeError):
    """Raised by `attach` if the model's attention was not verified to be what forktree computes."""


class OutOfMemory(ForktreeError):
    """Raised if one search alone needs more KV slots than the pool has, or if no memory is left for a pool."""


class NonFinite(ForktreeError):
    """Raised at NaN or infinity in logits or rewards; names the branch and the position."""

    @classmethod
    def of(cls, what: str, branch: int, position: int) -> "NonFinite":
        """The error of `what` after `position` tokens of the request's branch number `branch`."""
        return cls(
            f"{what} of branch {branch} at position {position} must be finite, got NaN or infinity: "
            "the model overflows at this dtype, or its weights are damaged"
        )


class RewardError(ForktreeError):
    """Raised if a text has no reward: what gives it raised, took too long, or returned no finite number."""


class BudgetSpent(RewardError):
    """There is no reward, as the search may have no more of them rewarded: its result is the best so far."""


class Cancelled(ForktreeError):
    """Thrown into a search that is being cancelled."""


class DecoderInUse(ForktreeError, RuntimeError):
    """Raised if a Decoder is called from a second thread, or by something that it is itself calling."""


class InvalidInput(ForktreeError, ValueError):
    """Raised if an argument, file or directory is not what it has to be, before anything is changed."""
