"""`attached`: a model that was verified before, and is as it was, is not verified again."""

from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from forktree.model.attach import attach
from forktree.model.fingerprint import Fingerprint
from forktree.model.interface import PackedModel
from forktree.model.model_spec import ModelSpec

# What was verified last of each model that is alive; shared by all threads. Neither part keeps a module alive.
_VERIFIED: WeakKeyDictionary[PreTrainedModel, tuple[Fingerprint, ModelSpec]] = WeakKeyDictionary()


def attached(model: PreTrainedModel) -> ModelSpec:
    """What `attach` returns; it is called only if the model is not as it was at the last call.

    Raises:
        UnsupportedModel, InvalidInput: as `attach` does.
    """
    known = _VERIFIED.get(model) if isinstance(model, nn.Module) else None
    if known is not None and known[0] == Fingerprint(model):
        return known[1].with_packed(PackedModel(model))
    spec = attach(model)
    _VERIFIED[model] = Fingerprint(model), spec.with_packed(None)
    return spec
