"""`attach`: verify that forktree computes what a model computes, or refuse the model by name."""

from transformers import PreTrainedModel

from forktree.errors import InvalidInput, UnsupportedModel
from forktree.model.model_spec import ModelSpec
from forktree.model.refusal import Refusal, refusing
from forktree.model.verify import verify
from forktree.ops import check_settings


def attach(model: PreTrainedModel) -> ModelSpec:
    """Verifies a model in a few forward passes over 24 tokens, and leaves it as it was.

    Raises:
        UnsupportedModel: if the verification fails; it names the model type.
        InvalidInput: in training mode, or if the environment asks for a backend or instruction set that is not there.
    """
    name = getattr(getattr(model, "config", None), "model_type", None)
    if name is None:
        raise InvalidInput(f"expected a transformers model, got {type(model).__name__}")
    if model.training:
        raise InvalidInput(f"{name}: expected evaluation mode, got training mode; call model.eval()")
    try:
        check_settings()
    except ValueError as error:
        raise InvalidInput(str(error)) from None
    try:
        with refusing(model, "a decoder of text", "use a causal language model of transformers"):
            return verify(model)
    except Refusal as refusal:
        raise UnsupportedModel(f"{name}: {refusal}") from refusal.__cause__
