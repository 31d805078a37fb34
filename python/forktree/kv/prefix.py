"""Finished prompts kept for reuse, least recently used first to go.

The tree itself is the radix index over token ids (`Tree.match` walks it); this class only decides which
prefixes stay alive when no search reads them any more.
"""

from collections import OrderedDict

from forktree.kv.tree import NO_OWNER, Branch, Tree


class PrefixIndex:
    """Holds one branch for each kept prefix, so that its node has a reader."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._kept: OrderedDict[bytes, Branch] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, branch: Branch) -> None:
        """Keeps the tokens that `branch` sees; a prefix already kept becomes the most recently used."""
        key = self._tree.tokens(branch).tobytes()
        if key not in self._kept:
            self._kept[key] = self._tree.fork(branch, 1, owner=NO_OWNER)[0]
        self._kept.move_to_end(key)

    def branches(self) -> list[Branch]:
        """The kept prefixes, least recently used first."""
        return list(self._kept.values())

    def evict(self) -> bool:
        """Drops the least recently used prefix. False when none was left."""
        if not self._kept:
            return False
        self._kept.popitem(last=False)[1].drop()
        return True

    def clear(self) -> None:
        """Drops every kept prefix."""
        while self.evict():
            pass
