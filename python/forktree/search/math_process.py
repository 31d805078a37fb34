"""The process that `MathEquality` talks to: a line of JSON in, two texts; "true" or "false" out. Run as a script."""

import json
import sys
from functools import lru_cache
from typing import Any

from math_verify import parse, verify


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Any:
    return parse(f"${text}$", parsing_timeout=None)


def _same(a: str, b: str) -> bool:
    """math-verify takes its two sides differently, so it is asked both ways."""
    x, y = _parsed(a), _parsed(b)
    return any(verify(p, q, timeout_seconds=None) for p, q in ((x, y), (y, x)))


def main() -> None:
    """Answers until its input ends."""
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    _same("1/2", "0.5")  # the first takes seconds: grammars are read
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        try:
            same = _same(*json.loads(line))
        except Exception:  # whatever parsing a text may raise
            same = False
        print(json.dumps(same), file=out, flush=True)


if __name__ == "__main__":
    main()
