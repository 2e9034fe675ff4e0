"""Tables: the same rows for a terminal, Markdown and CSV; what users name things is shown, never obeyed."""

from __future__ import annotations

import csv
import io

import pytest
from rich.console import Console

from taskres_hf.tables import Table, markdown_text, spreadsheet_text, visible

HOSTILE = [
    "\x1b]0;owned\x07cat", "\x1b[2Jdog", "a\r\nb", "\u202egnp.exe", "\x9b31m", "n\udcefve", "[link](http://x.y)",
    "<img src=x>", "a|b", "`code`", "**b**", "_i_", "&lt;", "[red]rich[/red]", "\u2028next", "http://x.y", "www.x.y",
]  # fmt: skip


def _print(table: Table, width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False).print(table.rich())
    return stream.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_shown_and_not_obeyed(text: str) -> None:
    table = Table(["class", text], [[text, 1], ["cat", 2]], title=text, caption=text)
    shown = _print(table, 400)
    assert not set(shown) & set("\x1b\x07\r\x9b\u202e\u2028")
    shown.encode("utf-8")
    assert visible(text) in shown
    lines = table.markdown().splitlines()
    assert len(lines) == 8
    bars = [line.replace("\\|", "").count("|") for line in lines[2:6]]
    assert bars == [3, 3, 3, 3]


def test_markdown_escapes_what_means_something_there() -> None:
    # What GitHub makes of these is the text itself.
    assert markdown_text("<b>*x*</b>") == "\\<b>\\*x\\*\\</b>"
    assert markdown_text("[a](http://b.c)") == "\\[a\\](http\\://b.c)"
    assert markdown_text("_a_ snake_case a -> b") == "\\_a\\_ snake_case a -> b"
    assert markdown_text("a\nb|c\\") == "a\\\\x0ab\\|c\\\\"


def test_names_of_any_language_stay_as_they_are() -> None:
    for text in ("Käfer", "猫", "👩‍🌾", "קפה", 'it\'s 50 % - a "b"'):
        assert visible(text) == text == markdown_text(text)


def test_numbers_stand_right_and_text_left() -> None:
    table = Table(["task", "images", "score", "spread", "note"], [["food", 149, 41.26, "41.3 ± 0.5", "1 of 2"]])
    assert table.markdown().splitlines()[1] == "|---|---:|---:|---:|---|"
    assert table.markdown().splitlines()[2] == "| food | 149 | 41.3 | 41.3 ± 0.5 | 1 of 2 |"
    assert Table(["a", "b"], [["x", None], ["y", 1]]).markdown().splitlines()[1:3] == ["|---|---:|", "| x |  |"]
    assert Table(["a"], []).markdown() == "| a |\n|---|"


def test_eighty_columns_cut_nothing() -> None:
    name = "all-categories -> fluent-emoji-high-contrast"
    columns = ["dataset", "recipe", "zero-shot", *(f"{n} shots" for n in (1, 2, 4, 8, 16))]
    table = Table(columns, [[name, "auto", "27.2", *["28.6 ± 0.5"] * 5]], title="t " * 60)
    for width in (80, 72):
        shown = _print(table, width)
        assert max(map(len, shown.splitlines())) <= width
        assert "…" not in shown
        rows = shown[shown.index("─") :].splitlines()[1:]
        first = rows[0].index("auto")
        assert "".join(line[:first] for line in rows).replace(" ", "") == name.replace(" ", "")
        assert shown.count("28.6") == shown.count("± 0.5") == 5
    assert "28.6 ± 0.5" in _print(table, 160)
    # Narrower than the numbers alone: a line for each cell.
    shown = _print(table, 40)
    assert shown.count("zero-shot: 27.2") == 1
    assert shown.count("28.6 ± 0.5") == 5


def test_a_number_and_its_spread_are_closed_up_before_they_are_torn_apart() -> None:
    table = Table(
        ["task", "zero-shot", *(f"{n} shots" for n in range(5))], [["animals-plants", 41.5, *["28.6 ± 0.5"] * 5]]
    )
    assert _print(table, 80).count("28.6±0.5") == 5
    assert _print(table, 100).count("28.6 ± 0.5") == 5


def test_what_a_row_is_about_is_folded_last() -> None:
    rows = [["a-name-to-copy-from-here", 1281167, "no commercial use"]]
    shown = _print(Table(["name", "train", "licence"], rows), 44)
    assert "a-name-to-copy-from-here" in shown
    assert "commercia\n" in shown.replace(" ", "")


def test_csv_holds_full_numbers_and_runs_no_formula() -> None:
    text = Table(["class", "accuracy"], [["=1+1", 0.123456789], ["a,b", None]]).csv()
    assert list(csv.reader(io.StringIO(text))) == [["class", "accuracy"], ["'=1+1", "0.123456789"], ["a,b", ""]]
    assert spreadsheet_text("-x") == "'-x"
    assert Table(["n"], [[-1.5]]).csv() == "n\n-1.5\n"


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="Row 1 has 1 cells"):
        Table(["a", "b"], [[1, 2], [3]])


def test_the_mean_is_stressed() -> None:
    table = Table(["a"], [["food"], ["mean"]], bold=[-1])
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, width=80).print(table.rich())
    assert "\x1b[1m" in next(line for line in stream.getvalue().splitlines() if "mean" in line)
    assert "\x1b[1m" not in next(line for line in stream.getvalue().splitlines() if "food" in line)
