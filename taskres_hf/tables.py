"""One table for people and files: for a terminal (`rich`), as Markdown and as CSV, with user text made harmless."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_NUMBER = re.compile(r"^[+-]?\d[\d,]*(\.\d+)?( ?%| ?± ?\d+(\.\d+)?)?$")
_MARKDOWN = re.compile(r"([\\`*\[\]<|&~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=[A-Za-z]):(?=//)|(?<=www)\.)")
_GAP = 2  # between two columns
_NARROWEST = 8  # a text folded to fewer characters cannot be read
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# What JSON may hold raw but a terminal would obey, and halves of surrogate pairs (file names that are not UTF-8).
_RAW_IN_JSON = re.compile(f"[\x7f-\x9f\u2028\u2029\ud800-\udfff{''.join(sorted(_TURNING))}]")


def visible(text: str) -> str:
    r"""Text that a terminal only shows: control characters, line ends and changes of writing direction as `\x1b`.

    Lone surrogates (a file name that is not UTF-8) are shown the same way, so the result can always be encoded.
    """
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp") and character not in _TURNING:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: no emphasis, link, HTML or end of a table cell comes of it."""
    return _MARKDOWN.sub(r"\\\1", visible(text))


def percent(share: float) -> str:
    """A share from 0 to 1 as `12.3 %`."""
    return f"{100 * share:.1f} %"


def json_text(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """JSON on one line; what a terminal would obey is escaped, and it still reads back as the same value.

    Args:
        default: what to write instead of an object that JSON does not have, as in `json.dumps`.
    """
    text = json.dumps(value, ensure_ascii=False, default=default)
    return _RAW_IN_JSON.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def spreadsheet_text(text: str) -> str:
    """Text that a spreadsheet does not run as a formula: a leading `=`, `+`, `-`, `@`, tab or line end is quoted."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else text


@dataclass
class Table:
    """Rows under columns.

    Args:
        columns: C names.
        rows: each of C cells: text, whole numbers, floats or None (an empty cell). Floats are rounded to `digits` for
            people and written in full in CSV.
        title, caption: a line above and below.
        digits: decimals of floats.
        bold: numbers of rows to stress, such as the mean; negative ones count from the end.

    A column is set to the right when every cell in it is a number.

    Raises:
        ValueError: a row has another number of cells than there are columns.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str | None = None
    caption: str | None = None
    digits: int = 1
    bold: Sequence[int] = ()

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"Row {number} has {len(row)} cells under {len(self.columns)} columns: {row!r}.")

    def _texts(self) -> list[list[str]]:
        return [[self._text(cell) for cell in row] for row in self.rows]

    def _text(self, cell: Any) -> str:
        if isinstance(cell, float):
            return f"{cell:.{self.digits}f}"
        return "" if cell is None else str(cell)

    def _numeric(self) -> list[bool]:
        """Whether each column holds numbers only."""
        columns: Any = zip(*self._texts(), strict=True) if self.rows else [()] * len(self.columns)
        return [all(_NUMBER.match(text) for text in column if text) and any(column) for column in columns]

    def rich(self) -> Any:
        """Something that rich prints, as wide as its console: cells go on in the next line and nothing is cut."""
        return _Terminal(self)

    def markdown(self) -> str:
        """A GitHub table, with the title above and the caption below it."""
        rules = ["---:" if numeric else "---" for numeric in self._numeric()]
        lines = [_line(map(markdown_text, self.columns)), "|" + "|".join(rules) + "|"]
        lines += [_line(map(markdown_text, row)) for row in self._texts()]
        above = [markdown_text(self.title), ""] if self.title else []
        below = ["", markdown_text(self.caption)] if self.caption else []
        return "\n".join(above + lines + below)

    def _repr_html_(self) -> str:
        return self.html()

    def html(self) -> str:
        """An HTML table; names and texts are shown as they are."""

        def cells(tag: str, texts: Sequence[str], stressed: bool = False) -> str:
            made = []
            for text, numeric in zip(texts, self._numeric(), strict=True):
                inner = html.escape(visible(text))
                inner = f"<b>{inner}</b>" if stressed else inner
                made.append(f'<{tag} style="text-align:{"right" if numeric else "left"}">{inner}</{tag}>')
            return f"<tr>{''.join(made)}</tr>"

        bold = {index % len(self.rows) for index in self.bold} if self.rows else set()
        body = "".join(cells("td", row, index in bold) for index, row in enumerate(self._texts()))
        head = f"<thead>{cells('th', list(self.columns))}</thead>" if any(self.columns) else ""
        above, below = (f"<p>{html.escape(visible(text))}</p>" if text else "" for text in (self.title, self.caption))
        return f"{above}<table>{head}<tbody>{body}</tbody></table>{below}"

    def csv(self) -> str:
        """Comma-separated values with a header; text that a spreadsheet would run as a formula is quoted."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        for row in [self.columns, *self.rows]:
            writer.writerow([spreadsheet_text(cell) if isinstance(cell, str) else cell for cell in row])
        return stream.getvalue()


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


class _Terminal:
    """A table that fits the console it is printed on; one line a cell where even folded columns do not fit."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.rows = [[visible(text) for text in row] for row in table._texts()]
        self.columns = [visible(name) for name in table.columns]
        self.numeric = table._numeric()

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        table, widths = self.table, self._widths(options.max_width)
        if table.title:
            yield Text(visible(table.title), style="italic")
        yield self._grid(widths) if widths else self._records()
        if table.caption:
            yield Text(visible(table.caption), style="italic")

    def _widths(self, available: int) -> list[int]:
        """Width of each column, folded between words where possible; empty if even within words they do not fit."""
        from rich.cells import cell_len

        cells = [[name, *column] for name, column in zip(self.columns, zip(*self.rows, strict=True), strict=False)]
        if not self.rows:
            cells = [[name] for name in self.columns]
        whole = [max(map(cell_len, column)) for column in cells]
        words = [max((cell_len(word) for text in column for word in text.split()), default=1) for column in cells]
        room = available - _GAP * (len(cells) - 1)
        if sum(whole) <= room:
            return whole
        closed = [[text.replace(" ± ", "±") for text in column] for column in cells]
        closed_up = [max(map(cell_len, column)) for column in closed]
        if closed_up != whole and sum(closed_up) <= room:  # rather than folding a number away from its spread
            self.rows = [[text.replace(" ± ", "±") for text in row] for row in self.rows]
            return closed_up
        texts = [index for index, numeric in enumerate(self.numeric) if not numeric]
        for numbers, shortest in ((whole, words), (words, words), (words, [_NARROWEST] * len(words))):
            widths = [number if numeric else w for number, w, numeric in zip(numbers, whole, self.numeric, strict=True)]
            while sum(widths) > room:
                loose = [index for index in texts if widths[index] > shortest[index]]
                if not loose:
                    break
                # What a row is about is folded last.
                widths[max(loose, key=lambda index: (index != texts[0], widths[index]))] -= 1
            if sum(widths) <= room:
                return widths
        return []

    def _grid(self, widths: Sequence[int]) -> Any:
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        grid = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
        for name, width, numeric in zip(self.columns, widths, self.numeric, strict=True):
            grid.add_column(Text(name), justify="right" if numeric else "left", overflow="fold", width=width)
        stressed = {index % len(self.rows) for index in self.table.bold} if self.rows else set()
        for index, row in enumerate(self.rows):
            grid.add_row(*map(Text, row), style="bold" if index in stressed else None)
        return grid

    def _records(self) -> Any:
        from rich.text import Text

        lines = []
        for row in self.rows:
            lines += [f"{name}: {text}" for name, text in zip(self.columns, row, strict=True) if text] + [""]
        return Text("\n".join(lines), overflow="fold")
