"""Every error forktree raises on purpose. Each message says what, expected, got and what to do."""


class ForktreeError(Exception):
    """Base of all errors below; the command line prints its message as one line."""


class UnsupportedModel(ForktreeError):
    """The model's attention could not be proved to be what forktree computes."""


class OutOfMemory(ForktreeError):
    """One search needs more KV slots than there may be, even alone, or no memory is left for those there may be."""


class NonFinite(ForktreeError):
    """NaN or infinite values in logits or rewards; names the branch and the position."""

    @classmethod
    def of(cls, what: str, branch: int, position: int) -> "NonFinite":
        """The error of `what` behind `position` tokens of the request's branch number `branch`."""
        return cls(
            f"{what} of branch {branch} at position {position} must be finite, got NaN or infinity: "
            "the model overflows at this dtype, or its weights are damaged"
        )


class RewardError(ForktreeError):
    """A text has no reward: what gives it raised, returned something other than a finite number, or took too long."""


class Cancelled(ForktreeError):
    """Thrown into a search that is being cancelled."""


class DecoderInUse(ForktreeError, RuntimeError):
    """A Decoder was called from a second thread, or by what it was itself calling."""


class InvalidInput(ForktreeError, ValueError):
    """An argument, file or directory is not what it has to be."""
