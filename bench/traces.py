"""Records the tree of a beam search and of a particle filter on the shipped model, at their most ramified step.

    python bench/traces.py     # a minute of CPU; writes bench/traces/beam.json and particles.json

A trace holds the nodes' parents and lengths and the nodes that look. The recorded searches are short (a prompt of some
20 tokens, at most 48 new ones): `common.workloads.trace` says how lengths are scaled.
"""

import json
from itertools import islice

import numpy as np
import torch

import forktree
from common.workloads import TRACES, Tree, from_paths
from forktree.demo import run, task

WIDTH = 64  # beams, particles
PROBLEM = 3  # of the held-out ones


def record(search: forktree.search.Search) -> Tree:
    """The tree with the most nodes among those decode steps of a search in which every branch looks."""
    decoder, _ = run.load()
    runner, steps = decoder.worker.runner, []
    forward = runner.forward

    def watched(tokens, positions, slots, plans):
        layout = next(iter(plans.values())).layout
        if layout.num_rows == layout.num_contexts == WIDTH:
            visible = [layout.visible(row)[0] for row in range(WIDTH)]
            steps.append(from_paths([layout.slot_index[v].tolist() for v in visible]))
        return forward(tokens, positions, slots, plans)

    runner.forward = watched
    (prompt,) = islice(task.problems("held_out", 0), PROBLEM, PROBLEM + 1)
    (result,) = decoder.search(prompt, search, max_new_tokens=run.MAX_NEW_TOKENS)
    if result.error is not None:
        raise result.error
    return max(steps, key=lambda tree: len(tree.parent))


def main() -> None:
    """Records both and prints what they look like."""
    _, head = run.load()
    searches = {
        "beam": forktree.BeamSearch(num_beams=WIDTH),
        "particles": forktree.ParticleFilter(
            reward=head, num_particles=WIDTH, temperature=run.TEMPERATURE, step_delimiter="\n"
        ),
    }
    TRACES.mkdir(exist_ok=True)
    for name, search in searches.items():
        tree = record(search)
        stored = dict(parent=tree.parent, length=tree.length, rows=tree.rows)
        (TRACES / f"{name}.json").write_text(json.dumps(stored) + "\n")
        spread = np.percentile(tree.length[1:], [10, 50, 90]).astype(int)
        print(
            f"{name}: {len(tree.rows)} rows, {len(tree.parent)} nodes, {tree.depth} deep, prompt {tree.length[0]}, "
            f"tokens of the others (10, 50, 90 %): {spread}"
        )


if __name__ == "__main__":
    with torch.no_grad():
        main()
