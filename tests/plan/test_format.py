"""The format of plans is written down once: what is generated from it says the same."""

from pathlib import Path

import numpy as np
import pytest

from forktree.plan import format as plan_format
from forktree.plan.format import SECTIONS, Header, generated, sections
from forktree.plan.plan import plan_attention
from layouts import KINDS, random_layout

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", [str(path.relative_to(ROOT)) for path in generated(ROOT)])
def test_generated_files_are_up_to_date(path):
    assert (ROOT / path).read_text() == generated(ROOT)[ROOT / path], "run `python -m forktree.plan.format`"


@pytest.mark.parametrize("kind", KINDS)
def test_sections_fill_the_buffer_in_order(kind):
    layout = random_layout(3, kind).layout
    buffer = plan_attention(layout, num_qo_heads=4, num_kv_heads=2, head_dim=8).buffer
    parts = sections(buffer)
    assert [x.size for x in parts.values()] == np.diff([*(buffer[s.offset] for s in SECTIONS), buffer.size]).tolist()
    assert buffer[Header.ITEM_OFFSET] == len(Header) and buffer[Header.SIZE] == buffer.size
    assert np.array_equal(parts["row_pos"], layout.row_pos) and np.array_equal(parts["node_len"], layout.node_len)
    for name in ("item", "seg", "row"):
        record = getattr(plan_format, name.capitalize())
        assert parts[name].shape[1] == len(record)
