"""Draws docs/assets/measured.svg from the files in bench/results. Needs matplotlib (`pip install -e ".[plots]"`).

    python bench/plot.py
"""

import json
from pathlib import Path
from statistics import median

import matplotlib
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
RESULTS, TARGET = ROOT / "bench" / "results", ROOT / "docs" / "assets" / "measured.svg"
OURS, SHADE = "#00796b", "#b2dfdb"


def decoding() -> list[tuple[str, float, float]]:
    """Each case of `decode.py`: its name, times faster than transformers, times less KV memory."""
    cases = json.loads((RESULTS / "decode-cpu.json").read_text())["cases"]
    found = []
    for case in cases:
        theirs, ours = (median(case["seconds"][side]) for side in ("transformers", "forktree"))
        found.append((case["case"], theirs / ours, case["kv_mb"][0] / case["kv_mb"][1]))
    return found


def attention() -> list[tuple[str, float, float]]:
    """Each bf16 case of `tree_attention.py`: its name, times faster than SDPA as users write it, and than its best."""
    cases = json.loads((RESULTS / "tree_attention-cpu.json").read_text())["cases"]
    found = []
    for case in cases:
        ms = case["median_ms"]
        if case["dtype"] == "bf16":
            best = min(ms["sdpa"], ms["sdpa fast"])
            found.append((case["case"], ms["sdpa"] / ms["forktree"], best / ms["forktree"]))
    return found


def bars(axes: plt.Axes, rows: list[tuple[str, float, float]], title: str, labels: tuple[str, str]) -> None:
    """Two bars a row, with their values."""
    for i, (_, *values) in enumerate(reversed(rows)):
        for value, shift, color in zip(values, (0.2, -0.2), (OURS, SHADE), strict=True):
            axes.barh(i + shift, value, 0.36, color=color)
            axes.text(value * 1.05, i + shift, f"{value:.2g}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [name for name, *_ in reversed(rows)], fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(0.9, 2.2 * max(max(values) for _, *values in rows))
    axes.axvline(1, color="#777", linewidth=0.8)
    axes.set_xticks([1, 10], ["1x", "10x"])
    axes.set_title(title, fontsize=10, loc="left")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (OURS, SHADE)]
    axes.legend(handles, labels, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draws both panels."""
    matplotlib.rcParams["svg.hashsalt"] = "forktree"  # the same file every time
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    bars(left, decoding(), "decoding beside transformers", ("times faster", "times less KV memory"))
    bars(right, attention(), "tree attention beside SDPA", ("than SDPA as written", "than SDPA's fastest form"))
    figure.savefig(TARGET, metadata={"Date": None})


if __name__ == "__main__":
    main()
