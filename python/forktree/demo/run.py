"""The demo: held-out problems, solved by every search on the shipped model, with the tree as it grows."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from rich.tree import Tree as RichTree

from forktree.decoder import Decoder, SearchResult
from forktree.demo import task
from forktree.engine.task import Task
from forktree.kv import Tree
from forktree.model.checkpoints import load_model, load_tokenizer
from forktree.rewards.value_head import ValueHead
from forktree.search import BeamSearch, BestOfN, Greedy, ParticleFilter, Sample, Search
from forktree.search.answers import Answers
from forktree.search.votes import vote
from forktree.terminal import Terminal

MODEL = Path(__file__).parent / "model"
WIDTH = 16  # samples, beams, particles
TEMPERATURE = 0.8
MAX_NEW_TOKENS = 48
TREE_LINES = 18


@dataclass
class Row:
    """A line of the final table."""

    name: str
    accuracy: float
    results: list[SearchResult]
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens run through the model, over all problems."""
        return sum(r.counters.model_tokens for r in self.results)

    @property
    def peak_slots(self) -> int:
        """Maximum of KV slots that one problem took."""
        return max(r.counters.peak_slots for r in self.results)


def load() -> tuple[Decoder, ValueHead]:
    """The shipped model in fp32 and its process-reward head."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = load_model(MODEL, dtype=torch.float32)
    head = ValueHead.load(MODEL / "prm_head.safetensors")
    return Decoder(model, load_tokenizer(MODEL), prefix_cache=False), head


def run(count: int, seed: int) -> None:
    """Solves `count` held-out problems by every search and prints the comparison."""
    console = Terminal()
    decoder, head = load()
    problems = list(islice(task.problems("held_out", seed), count))
    stage = _Stage(console, decoder, problems, seed)
    console.print(f"[bold]{count} held-out problems[/], such as {problems[0].strip()!r}:")
    console.print("combine the numbers by + and -, two at a time and one line a step, until only the target is left\n")
    with stage:
        greedy = stage.solve("greedy", Greedy())
        sampling = stage.solve("sampling", Sample(temperature=TEMPERATURE))
        best = stage.solve(f"best of {WIDTH}", BestOfN(reward=head, num_samples=WIDTH, temperature=TEMPERATURE))
        beam = stage.solve(f"beam search, {WIDTH} beams", BeamSearch(num_beams=WIDTH))
        particles = stage.solve(
            f"particle filter, {WIDTH} particles",
            ParticleFilter(reward=head, num_particles=WIDTH, temperature=TEMPERATURE, step_delimiter="\n"),
        )
    votes = _majority_accuracy(problems, best.results)
    majority = Row(f"majority of {WIDTH} (the same samples)", votes, best.results, best.seconds)
    console.print(_table([greedy, sampling, best, majority, beam, particles]))
    _show_rescue(console, problems, greedy.results, particles.results)


class _Stage:
    """Runs searches under a live view: one progress bar a search, and the tree of the oldest problem at work."""

    def __init__(self, console: Console, decoder: Decoder, problems: Sequence[str], seed: int) -> None:
        self._decoder, self._problems, self._seed = decoder, problems, seed
        columns = (
            TextColumn("{task.description:36}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=console)
        self._live = Live(console=console, refresh_per_second=8, transient=True)
        self._shown_at = 0.0

    def __enter__(self) -> "_Stage":
        self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.__exit__(None, None, None)

    def solve(self, name: str, search: Search) -> Row:
        """Solves all problems by one search."""
        bar = self._progress.add_task(name, total=len(self._problems))
        began = time.perf_counter()
        results = []
        for result in self._decoder.search_iter(
            self._problems, search, max_new_tokens=MAX_NEW_TOKENS, seed=self._seed, on_step=self._draw
        ):
            results.append(result)
            self._progress.advance(bar)
        seconds = time.perf_counter() - began
        results.sort(key=lambda result: result.index)
        right = [task.is_correct(p, r.text) for p, r in zip(self._problems, results, strict=True)]
        return Row(name, float(np.mean(right)), results, seconds)

    def _draw(self) -> None:
        now = time.monotonic()
        if now - self._shown_at < 0.12:
            return
        self._shown_at = now
        active = self._decoder.engine.active
        parts: list[object] = [self._progress]
        if active:
            parts.append(Panel(sketch(self._decoder, active[0]), title="the search tree of one problem"))
        self._live.update(Group(*parts))  # type: ignore[arg-type]


def sketch(decoder: Decoder, search: Task) -> RichTree:
    """The nodes that a search's branches see: text of each, and how many branches it serves."""
    tree = decoder.worker.tree
    branches = tree.owned(search.index)
    tips, _ = tree.tips(branches)
    nodes = tree.visible_nodes(tips)
    serves = dict.fromkeys(nodes.tolist(), 0)
    for tip in tips.tolist():
        while tip >= 0:
            serves[tip] += 1
            tip = int(tree.parent[tip])
    order = nodes[np.argsort(tree.start[nodes], kind="stable")][:TREE_LINES]
    shown: dict[int, RichTree] = {}
    for node in order.tolist():
        label = Text(_text_of(decoder, tree, node))
        label.append(f"  x{serves[node]}", style="cyan")
        above = shown.get(int(tree.parent[node]))
        shown[node] = RichTree(label) if above is None else above.add(label)
    hidden = len(nodes) - len(order)
    first = shown[int(order[0])]
    if hidden:
        first.add(Text(f"... {hidden} more nodes", style="dim"))
    return first


def _text_of(decoder: Decoder, tree: Tree, node: int) -> str:
    begin, length = int(tree.arena.begin[node]), int(tree.length[node])
    text = decoder.tokenizer.decode(tree.arena.token[begin : begin + length].tolist())
    return text.replace("\n", "\u23ce") or "(new)"


def _majority_accuracy(problems: Sequence[str], results: Sequence[SearchResult]) -> float:
    """Accuracy of the most frequent answer among each problem's samples; the first sampled wins a tie."""
    right = []
    for problem, result in zip(problems, results, strict=True):
        texts = [candidate.text or "" for candidate in result.candidates]
        share = vote(Answers.read(texts, task.answer).group)
        right.append(task.is_correct(problem, texts[int(np.argmax(share))]))
    return float(np.mean(right))


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="held-out accuracy", caption="tokens: run through the model, all problems together")
    table.add_column("search")
    for name in ("accuracy", "tokens", "peak KV slots of a problem", "tokens/s"):
        table.add_column(name, justify="right")
    for row in rows:
        speed = f"{row.tokens / row.seconds:,.0f}"
        table.add_row(row.name, f"{row.accuracy:.1%}", f"{row.tokens:,}", f"{row.peak_slots:,}", speed)
    return table


def _show_rescue(
    console: Console,
    problems: Sequence[str],
    greedy: Sequence[SearchResult],
    particles: Sequence[SearchResult],
) -> None:
    """A problem that greedy decoding gets wrong and the particle filter right, step by step."""
    for problem, wrong, right in zip(problems, greedy, particles, strict=True):
        if task.is_correct(problem, right.text) and not task.is_correct(problem, wrong.text):
            table = Table(title=f"{problem.strip()}: one that greedy decoding gets wrong")
            for name in ("greedy", "particle filter", "reward"):
                table.add_column(name)
            rewards = [f"{score:.3f}" for score in right.best.hypothesis.step_rewards]
            lines = zip(wrong.text.splitlines(), right.text.splitlines(), rewards, strict=False)
            labels = task.label_steps(problem, wrong.text)
            for (line, good, reward), is_right in zip(lines, labels, strict=False):
                table.add_row(Text(line, style="" if is_right else "red"), Text(good, style="green"), reward)
            console.print(table)
            return
