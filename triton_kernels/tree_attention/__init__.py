"""`forktree.ops.tree_attention`: persistent programs over the items of a plan (`forktree.plan.format`).

A unit of work is an item and a KV head. Its packed rows are the pairs of a plan row and a query head of the group:
packed row m is plan row m // G and head m % G. They are taken a row tile at a time (`row_tile`). The item's segments
form one stream of tokens, which is cut into tiles whatever the segments' lengths (`stream`), so that hundreds of
one-token nodes fill a tile. Tiles that all rows see in full are not masked (`visibility`).

An item that sees all of its rows' tokens writes their outputs; the others write partials. The program that writes a
token's last partial merges them, in the order of the merge list (`merge`).
"""

from forktree.triton_kernels.tree_attention.launch import launch

__all__ = ["launch"]
