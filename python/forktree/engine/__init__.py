"""Runs many searches at once: one packed forward pass a step for all of them."""
