"""Figures as SVG for a page: text stays text, and colours follow the page's light or dark theme."""

import hashlib
import io
import re
from typing import Any

from atoll.report.plot import FAINT, INK, PALETTE, SOFT

_VARIABLES = {INK: "--ink", SOFT: "--soft", FAINT: "--faint"} | {c: f"--c{i}" for i, c in enumerate(PALETTE)}

_PROLOGUE = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_METADATA = re.compile(r"\s*<metadata>.*?</metadata>", re.DOTALL)
_SIZE = re.compile(r'(<svg[^>]*?) width="[^"]*"')
_HEIGHT = re.compile(r'(<svg[^>]*?) height="[^"]*"')
_COLOURS = re.compile("|".join(map(re.escape, [*_VARIABLES])), re.IGNORECASE)


def themed(figure: Any, label: str) -> str:
    """A figure as an SVG element that fills its place.

    Args:
        figure: from `atoll.report.plot`.
        label: what the picture shows, for readers who cannot see it.

    Returns:
        Markup; all text in it is escaped.
    """
    from html import escape

    import matplotlib

    # Element ids are derived from the label, so that pictures on one page never share one.
    salt = hashlib.blake2b(label.encode(), digest_size=8).hexdigest()
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = _METADATA.sub("", _PROLOGUE.sub("", buffer.getvalue(), count=1), count=1)
    text = _HEIGHT.sub(r"\1", _SIZE.sub(r"\1", text, count=1), count=1)
    text = re.sub(r'id="(?:figure|axes|patch|line2d|text|xtick|ytick|matplotlib\.axis|legend)_\d+"', "", text)
    head, body = text.split(">", 1)
    body = _in_styles(body)
    return f'{head} role="img" aria-label="{escape(label, quote=True)}">{body}'


def _in_styles(body: str) -> str:
    """Replace the fixed colours inside style attributes by the page's variables."""

    def themed_style(match: re.Match[str]) -> str:
        return _COLOURS.sub(lambda colour: f"var({_VARIABLES[colour.group().lower()]})", match.group())

    return re.sub(r'style="[^"]*"', themed_style, body)
