"""Tables and text as HTML, which notebooks show."""

from collections.abc import Iterable, Sequence
from html import escape

MOST_ROWS = 20


def html(value: object) -> str:
    """Escape a value for HTML. Names of files and classes need not be valid UTF-8."""
    return escape(str(value).encode("utf-8", "backslashreplace").decode())


def html_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table. Columns and values are escaped."""
    lines = ["".join(f"<th>{html(name)}</th>" for name in columns)]
    lines += ["".join(f"<td>{html(value)}</td>" for value in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
