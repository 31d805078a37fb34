"""Who owns which KV slot and who sees it: host integers only, testable without torch."""

from forktree.kv.layout import tree_layout
from forktree.kv.nodes import Chunk
from forktree.kv.prefix import PrefixIndex
from forktree.kv.slots import OutOfSlots, SlotAllocator
from forktree.kv.tree import Branch, Tree, append, reassign

__all__ = [
    "Branch",
    "Chunk",
    "OutOfSlots",
    "PrefixIndex",
    "SlotAllocator",
    "Tree",
    "append",
    "reassign",
    "tree_layout",
]
