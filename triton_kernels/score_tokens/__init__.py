"""`forktree.ops.score_tokens`: lm_head is streamed once, and its logits never leave the multiprocessors.

A step cannot be faster than the V * H elements of lm_head leave memory (1.24 GB, 290 us at 4.3 TB/s, for 151,936 x
4,096 in bf16), as long as it has few rows: a row costs 2 FLOP an element, so 64 rows want 275 of the 780 TFLOP/s that a
matrix product reaches there. Hence few wide tiles are in flight, and all other work lies outside the loop over them.

`pass_kernel` has the grid row tiles x splits of the vocabulary, row tiles innermost, as programs that run together then
share what they read. A program walks the vocab tiles of its split and keeps for each row what one pass can keep:
maximum, mass and weighted mass of the logits; maximum and mass of the shaped ones; the Gumbel argmax over tiles of 64
tokens; and the best logits as sorted lists in scratch, merged only where a tile holds something better. `reduce_kernel`
merges the splits of each row in a fixed order, and settles top-k, top-p and min-p from the 64 best tokens. Rows whose
threshold lies below those are left to `nucleus_kernel`, which is always launched and ends at once if there are none: it
finds the threshold by radix search over the bits of the logits, three digits each for top-k and top-p, and then
samples. The host never waits.
"""

from forktree.triton_kernels.score_tokens.launch import launch

__all__ = ["launch"]
