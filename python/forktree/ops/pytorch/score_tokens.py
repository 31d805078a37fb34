"""`forktree.ops.score_tokens` by PyTorch operations on any device, fp64 too: the vocabulary goes by in chunks.

`score_chunks` keeps of each chunk what may still matter and forgets the logits. Of a row whose sampling truncates it
keeps the 64 most likely tokens: if all that it may sample are among them, that is enough. The other rows see the
vocabulary again, to find their threshold digit by digit and to sample from what reaches it. Which rows these are is
read from the device, once a call that truncates; edits are copied back from it once. Nothing else waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from forktree.ops.assemble import LmHead, VocabPass, VocabPassResult
from forktree.ops.checks import math_dtype
from forktree.ops.sampling import TILE, noise_of
from forktree.ops.token_request import REPETITION

CANDIDATES = 64  # most likely tokens kept of a row that truncates
SCRATCH = 12 << 20  # bytes, but for the allocator's rounding and what torch's operations take within
PER_LOGIT = 40  # bytes of the intermediate results of one logit at their peak
PER_ROW = 6 << 10  # bytes of a row: its candidates, or bins, and one tile of logits
PER_BEST = 48  # bytes of each of the k best
DIGIT = 8  # bits of a threshold found in one pass

Rows = slice | Tensor  # of the call
Chunks = Callable[[Rows], Iterator[tuple[int, Tensor]]]  # (first token, logits [rows, n]), first a multiple of TILE


def launch(hidden: Tensor, lm_head: LmHead, wanted: VocabPass) -> VocabPassResult:
    (weight, bias, scale, softcap), real = lm_head, math_dtype(hidden)
    size, vocab = hidden.shape[1], weight.shape[0]
    exact = hidden.dtype != real and hidden.is_cuda  # sums of 16-bit products that are not rounded to 16 bits
    widens = hidden.dtype != real and not exact
    block, some = _sizes(hidden, vocab, wanted.top_k, widens * size * real.itemsize)

    def chunks(of: Rows) -> Iterator[tuple[int, Tensor]]:
        h = hidden[of].to(real) if widens else hidden[of]
        for first in range(0, vocab, some):
            part = weight[first : first + some]
            z = torch.mm(h, part.T, out_dtype=real) if exact else F.linear(h, part.to(h.dtype))
            if bias is not None:
                z += bias[first : first + some].to(real)
            z *= scale
            if softcap is not None:
                z.div_(softcap).tanh_().mul_(softcap)
            yield first, z

    return score_chunks(chunks, hidden, vocab, block, wanted)


def pass_over_logits(logits: Tensor, wanted: VocabPass) -> VocabPassResult:
    """As `launch`, of logits `[T, V]` that are there already."""
    vocab, real = logits.shape[1], math_dtype(logits)
    block, some = _sizes(logits, vocab, wanted.top_k, 0)

    def chunks(of: Rows) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, vocab, some):
            yield first, logits[of, first : first + some].to(real)

    return score_chunks(chunks, logits, vocab, block, wanted)


def score_chunks(chunks: Chunks, like: Tensor, vocab: int, block: int, wanted: VocabPass) -> VocabPassResult:
    """What `launch` returns, of logits `[T, V]` that come in chunks, as often as asked for and the same each time.

    like: `[T, ...]`, of their device and type. block: rows done together.
    """
    rows, found = len(like), VocabPassResult.empty(like, wanted)
    shaping = Shaping.of(vocab, wanted)
    for begin in range(0, rows, block):
        part = slice(begin, min(begin + block, rows))
        _score(chunks, part, shaping, wanted.has_truncation, VocabPassResult(*(x[part] for x in found)))
    return found


def _score(chunks: Chunks, part: slice, shaping: Shaping | None, truncates: bool, found: VocabPassResult) -> None:
    """The rows of one block, into `found`."""
    mass, best = Mass(found.lse), Best(found.top_logits.shape[1])
    weighted = len(found.entropy) > 0
    if shaping is None:
        for first, z in chunks(part):
            mass.add(z, weighted)
            best.add(first, z)
    else:
        shaping = shaping.at(part)
        shaped, lead, candidates = Mass(found.lse), Lead(found.lse, shaping), Best(CANDIDATES if truncates else 0)
        for first, z in chunks(part):
            mass.add(z, weighted)
            best.add(first, z)
            s = shaping(first, z)
            shaped.add(s)
            lead.add(first, s, z)
            candidates.add(first, s, z)
        wrong = ~mass.lse.isfinite() | (shaped.lse == -torch.inf)
        sampled = lead.sampled(shaped)
        if truncates:
            few, enough = _sampled_among(candidates, shaping, shaped)
            sampled = tuple(b.where(shaping.truncates, a) for a, b in zip(sampled, few, strict=True))
            again = (shaping.truncates & ~enough & ~wrong).nonzero().squeeze(1)
            if len(again):
                rows = torch.arange(part.start, part.stop, device=again.device)[again]
                late = _sampled_again(chunks, rows, shaping.at(again), found.lse[again])
                for a, b in zip(sampled, late, strict=True):
                    a[again] = b
        token, logit, log_prob = sampled
        found.token.copy_(token.masked_fill(wrong, 0))
        found.token_logit.copy_(logit.masked_fill(wrong, torch.nan))
        found.shaped_log_prob.copy_(log_prob.masked_fill(wrong, torch.nan))
    found.lse.copy_(mass.lse)
    if weighted:
        found.entropy.copy_(mass.entropy)
    if best.keep:
        found.top_ids.copy_(best.ids)
        found.top_logits.copy_(best.values)


def _sizes(x: Tensor, vocab: int, top_k: int, weight: int) -> tuple[int, int]:
    """Rows of a block and tokens of a chunk. weight: bytes that each token of a chunk takes besides its logits.

    On a CPU a chunk is small enough for its caches: scratch stays below 5 % of [T, V] in fp32 once T is 16. Elsewhere a
    chunk is a quarter of the vocabulary, if SCRATCH allows.
    """
    own = PER_ROW + top_k * PER_BEST
    rows = max(1, min(len(x), SCRATCH // 2 // own))
    room = SCRATCH
    if x.is_cpu:
        room = min(room, max(256 << 10, rows * vocab // 6))
    some = (room - rows * own) // (rows * PER_LOGIT + weight)
    some = min(max(some, top_k // 4), -(-vocab // 4))
    return rows, max(some // TILE, 1) * TILE


# ---------------------------------------------------------------------- what is kept of the chunks


class Mass:
    """Log-sum-exp and entropy of each row, `[T]` fp64."""

    def __init__(self, like: Tensor) -> None:
        self.top = torch.full(like.shape, -torch.inf, dtype=torch.float64, device=like.device)
        self.sum, self.weighted = torch.zeros_like(self.top), torch.zeros_like(self.top)  # sum of e^d, of d e^d

    def add(self, x: Tensor, weighted: bool = False) -> None:
        """x: `[T, n]`."""
        top = torch.maximum(self.top, x.amax(dim=1).double())
        safe = top.masked_fill(top == -torch.inf, 0)
        e = (x - safe.to(x.dtype)[:, None]).exp_()
        shift = self.top - safe
        if weighted:
            self.weighted += self.sum * shift.clamp(min=torch.finfo(torch.float64).min)
            self.weighted *= shift.exp()
            self.weighted -= torch.special.entr(e).sum(dim=1)
        self.sum = self.sum * shift.exp() + e.sum(dim=1)
        self.top = top

    @property
    def lse(self) -> Tensor:
        """Log-sum-exp of each row."""
        return self.top + self.sum.log()

    @property
    def entropy(self) -> Tensor:
        """Entropy of each row, in nats."""
        return self.sum.log() - self.weighted / self.sum


class Best:
    """The `keep` largest of each row, largest first, lower ids first among equals."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.values = self.ids = self.logits = torch.empty(0)

    def add(self, first: int, x: Tensor, logits: Tensor | None = None) -> None:
        """x: `[T, n]`. logits: likewise, kept beside them."""
        if not self.keep:
            return
        before = self.values.shape[1] if self.values.ndim == 2 else 0
        merged = torch.cat([self.values, x], dim=1) if before else x
        merged, at = merged.sort(dim=1, descending=True, stable=True)
        self.values, at = merged[:, : self.keep].contiguous(), at[:, : self.keep].contiguous()
        new, ids = at >= before, at + (first - before)
        if before:
            old = at.clamp(max=before - 1)
            ids = ids.where(new, self.ids.gather(1, old))
        if logits is not None:
            beside = logits.gather(1, (at - before).clamp(min=0))
            self.logits = beside.where(new, self.logits.gather(1, old)) if before else beside
        self.ids = ids


class Lead:
    """Of each row the tile with the highest log-mass plus noise, of a greedy row that with the highest number."""

    def __init__(self, like: Tensor, shaping: Shaping) -> None:
        self.shaping = shaping
        self.score = torch.full_like(like, -torch.inf)
        self.tile = torch.zeros(like.shape, dtype=torch.long, device=like.device)
        self.inside = like.new_zeros(len(like), TILE)
        self.logits = like.new_zeros(len(like), TILE)

    def add(self, first: int, s: Tensor, logits: Tensor) -> None:
        """s, logits: `[T, n]`, shaped and as they are."""
        spare = -s.shape[1] % TILE
        inside, logits = (F.pad(x, (0, spare), value=-torch.inf).unflatten(1, (-1, TILE)) for x in (s, logits))
        numbers = first // TILE + torch.arange(inside.shape[1], device=s.device)
        exponential, _ = noise_of(self.shaping.keys, numbers)
        score = inside.logsumexp(dim=2) - exponential.log().to(s.dtype)
        score = inside.amax(dim=2).where(self.shaping.greedy[:, None], score)
        score, at = score.masked_fill(score.isnan(), -torch.inf).max(dim=1)
        row, ahead = torch.arange(len(s), device=s.device), score > self.score
        self.score = score.where(ahead, self.score)
        self.tile = numbers[at].where(ahead, self.tile)
        self.inside = inside[row, at].where(ahead[:, None], self.inside)
        self.logits = logits[row, at].where(ahead[:, None], self.logits)

    def sampled(self, shaped: Mass) -> tuple[Tensor, ...]:
        """Token, logit and log-prob of each row; the last under the shaped distribution, whose mass is `shaped`."""
        _, uniform = noise_of(self.shaping.keys, self.tile[:, None])
        mass = (self.inside - self.inside.amax(dim=1, keepdim=True)).exp().nan_to_num().cumsum(dim=1)
        within = _inverse(mass, uniform)
        within = self.inside.argmax(dim=1, keepdim=True).where(self.shaping.greedy[:, None], within)
        logit, s = (x.gather(1, within).squeeze(1) for x in (self.logits, self.inside))
        log_prob = (s - shaped.lse).to(s.dtype).masked_fill(self.shaping.greedy, 0)
        return self.tile * TILE + within.squeeze(1), logit, log_prob


def _inverse(mass: Tensor, uniform: Tensor) -> Tensor:
    """Where cumulative sums `mass [T, n]` pass the share `uniform [T, 1]` of all, `[T, 1]`."""
    at = torch.searchsorted(mass, uniform.to(mass.dtype) * mass[:, -1:], right=True)
    return torch.minimum(at, (mass < mass[:, -1:]).sum(dim=1, keepdim=True))  # after it is none


# ---------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Shaping:
    """How the logits of T rows become those that are sampled from, before top-k, top-p and min-p, and these."""

    keys: Tensor  # [T] int64
    temperature: Tensor  # [T] fp64, 1 for a greedy row
    greedy: Tensor  # [T]
    limit: Tensor  # [T] fp64: top-k where it leaves less than all, else 0
    top_p: Tensor
    min_p: Tensor
    edits: Edited | None
    allowed: Tensor | None  # [T, ceil(V / 32)] int32

    @classmethod
    def of(cls, vocab: int, wanted: VocabPass) -> Shaping | None:
        """None if nothing is sampled."""
        if wanted.keys is None or wanted.settings is None:
            return None
        temperature, limit, top_p, min_p = wanted.settings
        greedy = temperature == 0
        limit = limit.where(limit < vocab, 0)
        edited = None if wanted.edit_indptr is None else Edited.of(*(x.cpu() for x in wanted.edits if x is not None))
        temperature = temperature.masked_fill(greedy, 1)
        return cls(wanted.keys, temperature, greedy, limit, top_p, min_p, edited, wanted.allowed)

    def at(self, rows: Rows) -> Shaping:
        """That of some rows."""
        return Shaping(
            self.keys[rows],
            self.temperature[rows],
            self.greedy[rows],
            self.limit[rows],
            self.top_p[rows],
            self.min_p[rows],
            None if self.edits is None else self.edits.at(rows),
            None if self.allowed is None else self.allowed[rows],
        )

    @property
    def truncates(self) -> Tensor:
        """`[T]`."""
        return ~self.greedy & ((self.limit > 0) | (self.top_p < 1) | (self.min_p > 0))

    def __call__(self, first: int, z: Tensor) -> Tensor:
        """z `[T, n]`, logits of the tokens from `first` on. Returns a new tensor."""
        s = z.clone()
        if self.edits is not None:
            self.edits.apply(first, s)
        if self.allowed is not None:
            words = self.allowed[:, first // 32 : -(-(first + z.shape[1]) // 32), None]
            bits = (words >> torch.arange(32, dtype=torch.int32, device=z.device) & 1).flatten(1)
            s.masked_fill_(bits[:, : z.shape[1]] == 0, -torch.inf)
        return s.div_(self.temperature[:, None].to(s.dtype))

    def least(self, highest: Tensor) -> Tensor:
        """The threshold of min-p, `[T]`."""
        return highest + self.min_p.to(highest.dtype).log()


@dataclass(frozen=True)
class Edited:
    """Edits on the host, in ascending order of token: rows, tokens, operations, values.

    An edit that follows another of the same row and token is in the next layer.
    """

    num_rows: int
    layers: list[tuple[Tensor, ...]]

    @classmethod
    def of(cls, indptr: Tensor, ids: Tensor, ops: Tensor, values: Tensor) -> Edited:
        """From the CSR arrays of a request."""
        num_rows, at = len(indptr) - 1, torch.arange(len(ids))
        rows = torch.arange(num_rows).repeat_interleave(indptr.diff())
        follows = (ids.diff() == 0) & (rows.diff() == 0)
        start = at.masked_fill(F.pad(follows, (1, 0)), 0).cummax(dim=0).values
        layers: list[tuple[Tensor, ...]] = []
        for depth in range(int((at - start).max()) + 1):
            here = (at - start == depth).nonzero().squeeze(1)
            here = here[ids[here].argsort()]
            layers.append((rows[here], ids[here], ops[here], values[here]))
        return cls(num_rows, layers)

    def at(self, rows: Rows) -> Edited:
        """Those of some rows."""
        places = torch.arange(self.num_rows)[rows if isinstance(rows, slice) else rows.cpu()]
        place = torch.full((self.num_rows,), -1)
        place[places] = torch.arange(len(places))
        layers = []
        for row, *columns in self.layers:
            kept = place[row] >= 0
            layers.append((place[row][kept], *(x[kept] for x in columns)))
        return Edited(len(places), layers)

    def apply(self, first: int, s: Tensor) -> None:
        """Changes logits `[T, n]` of the tokens from `first` on, in place."""
        for layer in self.layers:
            low, high = torch.searchsorted(layer[1], torch.tensor([first, first + s.shape[1]])).tolist()
            row, token, op, value = (x[low:high].to(s.device, non_blocking=True) for x in layer)
            at = row, token.long() - first
            old, value = s[at], value.to(s.dtype)
            s[at] = torch.where(op == REPETITION, torch.where(old > 0, old / value, old * value), old + value)


def _sampled_among(candidates: Best, shaping: Shaping, shaped: Mass) -> tuple[tuple[Tensor, ...], Tensor]:
    """As `Lead.sampled`, from the most likely tokens alone; and of which rows they are enough, `[T]`."""
    c, limit = candidates.values, shaping.limit
    highest, last = c[:, :1], c[:, -1]
    e = (c - highest).double().exp().nan_to_num()
    place = (limit.clamp(1, c.shape[1]) - 1).long()[:, None]
    floor = c.gather(1, place).squeeze(1).masked_fill(limit == 0, -torch.inf)  # of top-k
    all_there = last == -torch.inf
    enough = all_there | (limit <= c.shape[1]) & (floor > last) | (limit == 0)
    left = e.where(c >= floor[:, None], 0)
    total = left.sum(dim=1).where(limit > 0, (shaped.lse - highest.squeeze(1)).exp())
    before = left.cumsum(dim=1) - left < (shaping.top_p * total)[:, None]
    nucleus = c.where(before, torch.inf).amin(dim=1)
    floor = torch.where(shaping.top_p < 1, torch.maximum(floor, nucleus), floor)
    floor = torch.maximum(floor, shaping.least(highest.squeeze(1)))
    enough &= all_there | (floor > last)

    ids, order = candidates.ids.sort(dim=1)
    kept = (c >= floor[:, None]).gather(1, order)
    e = e.gather(1, order).where(kept, 0)
    tile = ids // TILE
    exponential, uniform = noise_of(shaping.keys, tile)
    sums = F.pad(e.cumsum(dim=1), (1, 0))
    mass = sums.gather(1, torch.searchsorted(tile, tile, right=True)) - sums.gather(1, torch.searchsorted(tile, tile))
    at = (mass.clamp(min=0).log() - exponential.log()).argmax(dim=1, keepdim=True)
    inside = e.where(tile == tile.gather(1, at), 0).cumsum(dim=1)
    at = _inverse(inside, uniform.gather(1, at))
    token, s, logit = (
        x.gather(1, at).squeeze(1) for x in (ids, c.gather(1, order), candidates.logits.gather(1, order))
    )
    log_prob = (s - highest.squeeze(1)).double() - e.sum(dim=1).log()
    return (token, logit, log_prob.to(c.dtype)), enough


def _sampled_again(chunks: Chunks, rows: Tensor, shaping: Shaping, like: Tensor) -> tuple[Tensor, ...]:
    """As `Lead.sampled`, for rows whose threshold is somewhere in the vocabulary."""

    def shaped() -> Iterator[tuple[int, Tensor, Tensor]]:
        for first, z in chunks(rows):
            yield first, shaping(first, z), z

    mass = Mass(like)
    for _, s, _ in shaped():
        mass.add(s)
    highest = mass.top
    floor = torch.full_like(highest, -torch.inf).to(like.dtype)
    if (shaping.limit > 0).any():
        found = _threshold(shaped, highest, floor, shaping.limit, by_mass=False)
        floor = found.where(shaping.limit > 0, floor)
    if (shaping.top_p < 1).any():
        found = _threshold(shaped, highest, floor, shaping.top_p, by_mass=True)
        floor = found.where(shaping.top_p < 1, floor)
    floor = torch.maximum(floor, shaping.least(highest.to(like.dtype)))
    mass, lead = Mass(like), Lead(like, shaping)
    for first, s, z in shaped():
        s.masked_fill_(s < floor[:, None], -torch.inf)
        mass.add(s)
        lead.add(first, s, z)
    return lead.sampled(mass)


def _threshold(
    shaped: Callable[[], Iterator[tuple[int, Tensor, Tensor]]],
    highest: Tensor,
    floor: Tensor,
    limit: Tensor,
    by_mass: bool,
) -> Tensor:
    """The smallest s of each row above which there are fewer than `limit` tokens, or less than this share of the mass.

    `[T]`. Tokens below `floor` do not count. One pass is made for every DIGIT bits of s, most significant first.
    """
    real, signs = floor.dtype, 1 << DIGIT - 1
    bins = torch.empty(len(floor), 1 << DIGIT, dtype=torch.float64, device=floor.device)
    above = torch.zeros_like(bins[:, 0])  # the number or the mass of what is beyond this prefix
    prefix = torch.zeros_like(floor, dtype=CODES[real])
    highest_shift = 8 * real.itemsize - DIGIT
    for shift in range(highest_shift, -1, -DIGIT):
        bins.zero_()
        for _, s, _ in shaped():
            code = _code(s) >> shift
            counts = (s >= floor[:, None]) & (s > -torch.inf)
            if shift == highest_shift:
                code += signs  # the most significant digit has the sign
            else:
                counts &= code >> DIGIT == prefix[:, None]
                code &= (1 << DIGIT) - 1
            weight = (s - highest[:, None]).exp_() if by_mass else torch.ones_like(s, dtype=torch.float64)
            bins.scatter_add_(1, code.long(), weight.masked_fill_(~counts, 0))
        if by_mass and shift == highest_shift:
            limit = limit * bins.sum(dim=1)
        higher = bins.flip(1).cumsum(dim=1).flip(1) - bins
        found = ((bins > 0) & (above[:, None] + higher < limit[:, None])).int().argmax(dim=1, keepdim=True)
        above += higher.gather(1, found).squeeze(1)
        found = found.squeeze(1).to(prefix.dtype)
        prefix = found - signs if shift == highest_shift else prefix << DIGIT | found
    return _code(prefix.view(real)).view(real)


CODES = {torch.float32: torch.int32, torch.float64: torch.int64}


def _code(x: Tensor) -> Tensor:
    """Integers in the order of x; of their bits, taken as floating-point, those of x again."""
    bits = (x + 0.0).view(CODES[x.dtype])  # + 0: of one zero
    return bits ^ (bits >> 8 * x.dtype.itemsize - 1 & torch.iinfo(bits.dtype).max)
