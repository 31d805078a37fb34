"""The plan as one int32 buffer: its header, sections and fields, named here and nowhere else.

The buffer begins with a header of sizes and section offsets, so that whoever reads it finds every section by name:
`sections` here, `plan_view` in C++ and CUDA, constants in Triton. Kernels read the offsets on the device, so a captured
graph follows whatever plan lies at its address.

Kernels trust a plan that `plan_attention` made. `torch.ops.forktree.tree_attention` is given bare tensors: on the CPU
it validates them at every call, on a GPU it believes them, as looking would wait for the device. Whoever did not get a
buffer from `AttentionPlan.on` validates it first, by `forktree._core.check_plan_buffer`.

    python -m forktree.plan.format [ROOT]

writes `csrc/plan/format.h` and `triton_kernels/plan_format.py` of the source tree ROOT (default: the one that this file
belongs to); both are committed, and `tests/plan/test_format.py` holds them equal to what is generated.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby
from pathlib import Path
from typing import Self

from forktree.plan.layout import TreeLayout
from forktree.types import IntArray

LIVE = TreeLayout.ALL  # stop of a segment that ends where its node does, also after growing
MAGIC = 0x464B5432  # "FKT2": first entry of every plan


class Field(IntEnum):
    """Place of a field within its record of int32; `note` says what it holds."""

    note: str

    def __new__(cls, note: str) -> Self:
        """The next place of the record."""
        field = int.__new__(cls, len(cls.__members__))
        field._value_ = len(cls.__members__)
        field.note = note
        return field


class Header(Field):
    """Sizes, what the plan was made for, and where each section begins."""

    MAGIC = "says that this is a plan, and of which version"
    SIZE = "entries of the whole buffer"
    NUM_ROWS = "R, query rows"
    NUM_TOKENS = "T, output tokens"
    NUM_ITEMS = "W"
    NUM_SEGS = "Q"
    NUM_NODES = "N"
    NUM_PARTIALS = "P"
    NUM_EMPTY_TOKENS = "Z"
    NUM_MASK_WORDS = ""
    NUM_QO_HEADS = ""
    NUM_KV_HEADS = ""
    HEAD_DIM = "of queries and keys"
    VALUE_DIM = "what the plan was priced for; no kernel reads it"
    BYTES_PER_TOKEN = "of K and V, all KV heads; likewise"
    WINDOW = "positions a row sees, its own included; 0 = all"
    ITEM_OFFSET = "where a section begins, in entries from the start of the buffer"
    SEG_OFFSET = ""
    MERGE_INDPTR_OFFSET = ""
    MERGE_PARTIAL_OFFSET = ""
    EMPTY_TOKENS_OFFSET = ""
    ROW_OFFSET = ""
    NODE_LEN_OFFSET = ""
    ROW_POS_OFFSET = ""
    MASK_OFFSET = ""


class Item(Field):
    """A group of plan rows that walks segments of its own."""

    ROW_BEGIN = "plan rows [row_begin, row_end)"
    ROW_END = ""
    SEG_BEGIN = "segments [seg_begin, seg_end), top first"
    SEG_END = ""
    PARTIAL = "partial of its first row, or -1: writes the output itself"


class Seg(Field):
    """Tokens at offsets [start, stop) of a node, for some rows of an item."""

    INDEX_BEGIN = "offset o has slot slot_index[index_begin + o]"
    START = ""
    STOP = "or LIVE: where the node ends, also after it grew"
    NODE = ""
    ROW_LO = "concerns plan rows [row_lo, row_hi)"
    ROW_HI = ""
    POS = "offset o has position pos + o"
    CONTIGUOUS = "1: its slots are consecutive numbers"


class Row(Field):
    """A plan row: a query row of the layout, and what it sees of its context's tip."""

    ROW = "of the layout: its query is q[row], its position row_pos[row]"
    TOKEN = "output it belongs to"
    TIP = "node whose tokens from offset tail on the rows of its context see differently, or -1"
    TAIL = ""
    LAST = "last offset of the tip it sees: its own if causal, that of its last bit if masked, else LIVE"
    MASK = "word of mask where its bits begin (bit j: may it see offset tail + j), or -1"


@dataclass(frozen=True)
class Section:
    """A run of records, or of single numbers if `record` is None."""

    name: str
    count: Header  # how many
    note: str
    record: type[Field] | None = None
    extra: int = 0  # entries beyond `count`
    element: str = "int32_t"  # of single numbers, in C++

    @property
    def offset(self) -> Header:
        """The header's field that says where the section begins."""
        return Header[f"{self.name.upper()}_OFFSET"]

    @property
    def width(self) -> int:
        """Entries of the buffer for each of the section's."""
        return len(self.record) if self.record else 1


SECTIONS = (
    Section("item", Header.NUM_ITEMS, "[W]", Item),
    Section("seg", Header.NUM_SEGS, "[Q]", Seg),
    Section("merge_indptr", Header.NUM_TOKENS, "[T+1] CSR: output token -> partials, in path order", extra=1),
    Section("merge_partial", Header.NUM_PARTIALS, "[P]"),
    Section(
        "empty_tokens",
        Header.NUM_EMPTY_TOKENS,
        "[Z] output tokens that no item writes and nothing is merged for, ascending",
    ),
    Section("row", Header.NUM_ROWS, "[R] of each plan row", Row),
    Section("node_len", Header.NUM_NODES, "[N] tokens of each node now: rewritten when nodes grow, as is"),
    Section("row_pos", Header.NUM_ROWS, "[R] position of each row of the layout"),
    Section("mask", Header.NUM_MASK_WORDS, "draft masks, as in the layout", element="uint32_t"),
)
HEADER_WIDTH = len(Header)
_PLACES = [(x.name, int(x.offset), int(x.count), x.extra, x.width) for x in SECTIONS]  # enums are slow to look up


def sections(buffer: IntArray) -> dict[str, IntArray]:
    """Views of a plan's sections by name: [count, fields] of records, [count] of numbers.

    Args:
        buffer: a plan, int32; trusted (see `_core.check_plan_buffer`).
    """
    header = buffer[:HEADER_WIDTH].tolist()
    views = {}
    for name, offset, count, extra, width in _PLACES:
        begin, size = header[offset], (header[count] + extra) * width
        view = buffer[begin : begin + size]
        views[name] = view.reshape(-1, width) if width > 1 else view
    return views


# ---------------------------------------------------------------------- generated files

GENERATED = "Generated by `python -m forktree.plan.format` from python/forktree/plan/format.py: do not edit."
RECORDS = (Header, Item, Seg, Row)


def cpp_header() -> str:
    """Text of `csrc/plan/format.h`."""
    lines = [
        f"// {GENERATED}",
        "// The plan as one int32 buffer: a header, then sections at the offsets it names.",
        "#pragma once",
        "",
        "#include <cstdint>",
        "",
        '#include "common/numeric.hpp"',
        "",
        "namespace forktree {",
        "",
        "constexpr int32_t LIVE = INT32_MAX;  // stop of a segment that ends where its node does, also after growing",
        "",
    ]
    for record in RECORDS:
        lines += [f"// {record.__doc__}", f"struct {record.__name__} {{"]
        if record is Header:
            lines.append(f"    static constexpr int32_t MAGIC = {MAGIC:#x};")
        lines += _aligned([(f"    int32_t {field.name.lower()};", field.note) for field in record])
        lines += ["};", ""]
    lines += ["// Pointers to the sections of a buffer.", "struct PlanView {", "    const Header* header;"]
    lines += _aligned([(f"    const {_element(x)}* {x.name};", x.note) for x in SECTIONS])
    lines += [
        "};",
        "",
        "// Trusts the header: see `validate` in plan/validate.hpp.",
        "FORKTREE_INLINE PlanView plan_view(const int32_t* buffer) {",
        "    const Header* header = reinterpret_cast<const Header*>(buffer);",
        "    PlanView view{};",
        "    view.header = header;",
    ]
    for section in SECTIONS:
        place = f"buffer + header->{section.offset.name.lower()}"
        if _element(section) != "int32_t":
            place = f"reinterpret_cast<const {_element(section)}*>({place})"
        lines.append(f"    view.{section.name} = {place};")
    lines += [
        "    return view;",
        "}",
        "",
        "// A section, as the header has it.",
        "struct Section {",
        "    const char* name;",
        "    int32_t Header::* offset;",
        "    int32_t Header::* count;",
        "    int32_t extra, width;  // entries beyond count; int32 each takes",
        "",
        "    int64_t size(const Header& header) const { return (int64_t(header.*count) + extra) * width; }",
        "};",
        "",
        "constexpr Section SECTIONS[] = {",
    ]
    for section in SECTIONS:
        offset, count = section.offset.name.lower(), section.count.name.lower()
        lines.append(
            f'    {{"{section.name}", &Header::{offset}, &Header::{count}, {section.extra}, {section.width}}},'
        )
    lines += ["};", "", "}  // namespace forktree"]
    return "\n".join(lines) + "\n"


def triton_constants() -> str:
    """Text of `triton_kernels/plan_format.py`."""
    lines = [f'"""{GENERATED}"""', "", "import triton.language as tl", "", f"LIVE = tl.constexpr({LIVE})"]
    for record in RECORDS:
        lines.append(f"\n# {record.__doc__}")
        prefix = record.__name__.upper()
        if record is not Header:
            lines.append(f"{prefix}_WIDTH = tl.constexpr({len(record)})")
        lines += [f"{prefix}_{field.name} = tl.constexpr({field.value})" for field in record]
    return "\n".join(lines) + "\n"


def _element(section: Section) -> str:
    return section.record.__name__ if section.record else section.element


def _aligned(lines: list[tuple[str, str]]) -> list[str]:
    """Code and comments; comments of consecutive lines begin in one column, as clang-format has them."""
    texts: list[str] = []
    for has_note, run in groupby(lines, key=lambda line: bool(line[1])):
        codes_and_notes = list(run)
        width = max(len(code) for code, _ in codes_and_notes)
        texts += [f"{code:{width}}  // {note}" if has_note else code for code, note in codes_and_notes]
    return texts


def generated(root: Path) -> dict[Path, str]:
    """What the generated files of a source tree must hold, by path."""
    return {
        root / "csrc" / "plan" / "format.h": cpp_header(),
        root / "triton_kernels" / "plan_format.py": triton_constants(),
    }


if __name__ == "__main__":
    for path, text in generated(Path(sys.argv[1] if sys.argv[1:] else Path(__file__).parents[3])).items():
        path.write_text(text)
