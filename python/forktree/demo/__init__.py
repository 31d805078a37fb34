"""A tiny trained model and its task: chains of arithmetic that greedy decoding often gets wrong."""
