"""What is shown is HTML in which other people's text does nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from taskres_hf.app import showing
from taskres_hf.app.session import Added, Answer, Guess, Picture, Session

HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "' onload='alert(1)", "${alert(1)}", "{{constructor}}",
    "`x`", "@children", "\x1b[31mred", "=cmd()", "</div>",
]  # fmt: skip


def _page(name: str) -> str:
    """Everything that shows a name."""
    picture = Picture("key", name, name, torch.zeros(2), "data:image/jpeg;base64,")
    guess = Guess(picture, name, 0.5)
    answer = Answer(name, "data:image/jpeg;base64,", ((name, 0.9),), (name, 0.4), True)
    return "".join(
        [
            showing.told([name]), showing.added(Added(1, 2, (name,), (name,))), showing.strip([guess]),
            showing.judged(picture, guess), showing.answers([answer, Answer(name, error=name)]),
        ]
    )  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_text_of_others_does_nothing(name: str) -> None:
    tags = re.compile(r"<[^>]*>")
    assert tags.findall(_page(name).replace(showing.safe(name), "")) == tags.findall(
        _page("plain").replace("plain", "")
    )
    shown = showing.safe(name)
    assert not set(shown) & set("<>'\"`${}@\x1b")


def test_the_report_says_how_it_was_measured_and_what_zero_shot_gives(ready: Session) -> None:
    assert ready.outcome is not None
    metrics, text = ready.outcome.metrics, showing.report(ready)
    low, high = metrics["accuracy_interval"]
    for share in (metrics["accuracy"], metrics["zero_shot_accuracy"], low, high):
        assert showing.percent(share) in text
    assert "cross-validation on 18 pictures" in text
    assert "95 % interval" in text


def test_the_summary_leads_on(session: Session, food: Path) -> None:
    assert "Name the classes first" in showing.summary(session, [])
    session.set_classes(["fruit", "vegetable"])
    assert "No pictures yet" in showing.summary(session, [])
    session.add_files([food / "class" / "fruit" / "0.png"], "fruit")
    text = showing.summary(session, session.zero_shot())
    assert "1 picture." in text
    assert "Fewer than two pictures: fruit, vegetable" in text
    assert "Not trained yet" in showing.report(session)


def test_many_notes_are_counted() -> None:
    text = showing.told(str(number) for number in range(100))
    assert "and 88 more" in text
    assert showing.told([]) == ""
