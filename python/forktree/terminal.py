"""Prints text to people; text from outside cannot control their terminal."""

import unicodedata
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# control characters (C0, DEL, C1), format characters (bidi overrides, zero widths), lone surrogates, line separators
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def visible(text: str) -> str:
    """Returns `text` with characters that a terminal might obey, or not show, written as escapes; line feeds stay."""
    return "".join(
        c.encode("unicode_escape").decode() if c != "\n" and unicodedata.category(c) in HIDDEN else c for c in text
    )


def one_line(error: BaseException | str) -> str:
    """Returns the message of an error as one line of at most 500 characters; the error's type if it has none."""
    return visible(" ".join(str(error).split()))[:500] or (type(error).__name__ if error else "")


class Terminal(Console):
    """A console that passes all text through `visible`; only rich itself styles it and moves the cursor."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments of what rich renders, their text made visible."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)
