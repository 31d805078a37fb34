"""Hugging Face models as something that runs packed tokens of many branches at once.

Reading order: `replica` and `interface` (how a model is entered); `layer_spec`, `hooks` and `step` (what a layer does
in a step); `runner` and `captured` (a model with its KV pools); `head` (from hidden states to logits); `attach` and
`verify` (whether all this computes what the model computes); `fingerprint` and `attached` (whether it still does).
"""
