"""What a search has done, as data that `json` can write: who was grown, rewarded, kept, dropped, and why.

A trace is a list of events in the order in which they happened. A node is one step of one text: tokens that were
generated after those of its parent node. Nodes are numbered as they come; -1 is the prompt. Every event is a dict with
its kind under `"event"`; a list in it has one entry for each node of the event, unless something else is said.

    grow    nodes, parents, tokens (ids; EOS is not among them), log_probs, ends ("eos", "stop" or "length"; null: the
            text goes on). Beam search gives `scores`, sums over the whole text, in place of `log_probs`.
    reward  nodes, rewards (null: the reward failed), errors
    select  why, nodes (of all texts before), ancestors (the place in `nodes` that each text after it continues),
            dropped (the nodes that no text continues); what the choice was made by, such as weights and their
            effective sample size `ess`
    vote    nodes, answers, shares (of each text that of its answer), errors; what the shares were made from, such as
            weights
    similarity  nodes, similarities (of each text to all, on average), errors
    judge   replies of a judge's model, of each prompt a list; the rewards that they gave, errors
    difficulty  nodes of the samples that say how hard a prompt is, difficulty, bin
    end     why, nodes of the texts that end where they stand, such as when a budget is spent
    reference  nodes of the texts that take part in the next sweep of particle Gibbs, chain by chain
    evidence   log_evidence, the log of the estimated sum of `p(x) potential(x)` over all texts
    return  nodes of the hypotheses, best first, and their scores

Following `parents` from a node that was returned gives the whole text, step by step, with a reward for each.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from forktree.detokenise import added_text
from forktree.types import Int64Array

PROMPT = -1  # the parent of every first step


@dataclass
class TraceNode:
    """One step of one text, and what became of it.

    Attributes:
        parent: The step before; `PROMPT` if it is the first.
        tokens: Ids that were generated; EOS is not among them.
        text: Their text, None if nothing decodes it.
        log_prob: Their log-prob under the model, EOS included; None in beam search, whose scores are of whole texts.
        end: "eos", "stop" or "length" if the text ended here, None if it did not.
        reward: Of the text up to here; None if there is none.
        error: Why its reward failed, None if it did not.
        visits: How many texts the selections after it continued here, one for each selection that kept it as it was.
        fate: "returned"; "dropped"; "grown", if further steps follow; or "left", if the search ended before anything
            was decided.
        why: What dropped it, such as "resampling"; None for another fate.
        rank: Place among what was returned, None if it was not.
        score: What it was ranked by, None if it was not returned.
    """

    parent: int
    tokens: list[int]
    text: str | None
    log_prob: float | None
    end: str | None
    reward: float | None = None
    error: str | None = None
    visits: int = 0
    fate: str = "left"
    why: str | None = None
    rank: int | None = None
    score: float | None = None


class SearchTrace:
    """The events of one search so far; see the module's description for what they hold.

    Attributes:
        events: what happened, oldest first.
    """

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._parents: list[int] = []

    @property
    def num_nodes(self) -> int:
        """Nodes so far."""
        return len(self._parents)

    def path(self, node: int) -> list[int]:
        """The nodes of a text from its first step to `node`; none for the prompt."""
        path = []
        while node != PROMPT:
            path.append(node)
            node = self._parents[node]
        return path[::-1]

    def record(self, event: str, **facts: Any) -> None:
        """Appends an event. Arrays become lists; NaN and infinity, which JSON does not have, become None."""
        self.events.append({"event": event, **{name: _plain(value) for name, value in facts.items()}})

    def grow(self, parents: ArrayLike, tokens: Sequence[ArrayLike], **facts: Any) -> Int64Array:
        """Records a step for each of `parents [n]`, with its new `tokens`.

        Returns:
            The new nodes, int64 `[n]`.
        """
        nodes = np.arange(self.num_nodes, self.num_nodes + len(tokens))
        self._parents += np.asarray(parents).tolist()
        self.record("grow", nodes=nodes, parents=parents, tokens=tokens, **facts)
        return nodes

    def nodes(self, decode: Callable[[list[int]], str | None] | None = None) -> list[TraceNode]:
        """Every step that was grown, in the order of their numbers, and what became of it.

        Args:
            decode: Tokens after the prompt -> their text.
        """
        found: list[TraceNode] = []
        paths: dict[int, tuple[list[int], str]] = {PROMPT: ([], "")}
        for event in self.events:
            if event["event"] == "grow":
                none = [None] * len(event["nodes"])
                columns = event["parents"], event["tokens"], event.get("log_probs", none), event.get("ends", none)
                for parent, tokens, log_prob, end in zip(*columns, strict=True):
                    text = None
                    if decode is not None:
                        before, said = paths[parent]
                        whole = decode([*before, *tokens]) or ""
                        paths[len(found)], text = ([*before, *tokens], whole), added_text(said, whole)
                    found.append(TraceNode(parent, tokens, text, log_prob, end))
                    if parent != PROMPT:
                        found[parent].fate, found[parent].why = "grown", None
                continue
            nodes = [found[i] for i in event.get("nodes", []) if i != PROMPT]
            if event["event"] == "reward":
                for node, reward, error in zip(nodes, event["rewards"], event["errors"], strict=True):
                    node.reward, node.error = reward, error
            elif event["event"] == "select":
                for i in event["dropped"]:
                    if i != PROMPT and found[i].fate == "left":
                        found[i].fate, found[i].why = "dropped", event["why"]
                for i in event["ancestors"]:
                    if (at := event["nodes"][i]) != PROMPT:
                        found[at].visits += 1
            elif event["event"] == "return":
                for rank, (node, score) in enumerate(zip(nodes, event["scores"], strict=True)):
                    if node.rank is None:  # one text may be returned several times
                        node.fate, node.why, node.rank, node.score = "returned", None, rank, score
        return found

    def select(self, nodes: Int64Array, ancestors: Int64Array, *, why: str, **facts: Any) -> None:
        """Records that the texts at `nodes [n]` were replaced by copies of those at `nodes[ancestors]`."""
        dropped = np.setdiff1d(nodes, nodes[ancestors])
        self.record("select", why=why, nodes=nodes, ancestors=ancestors, dropped=dropped, **facts)


def _plain(value: Any) -> Any:
    """`value` as what `json` writes, and reads again as the same."""
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind != "f":
            return value.tolist()
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, BaseException):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
