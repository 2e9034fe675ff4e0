"""Short forms of long runs; `python -m fuzz soak` is the long one."""

from __future__ import annotations

from fuzz.soak import Samples, predict, with_broken


def test_predictions_stay_the_same_and_leave_no_open_files() -> None:
    outcome, samples = predict(400, samples=8)
    assert not [text for text in outcome.findings if "answer" in text or "open files" in text]
    assert samples.slope() < 20_000  # bytes; a picture that is kept has more


def test_broken_pictures_are_left_out_and_named_and_the_others_classified() -> None:
    assert not with_broken(200).findings


def test_a_leak_would_be_noticed() -> None:
    steady = Samples(list(range(0, 10_000, 500)), [10**9] * 20, [6] * 20)
    assert not steady.problems()
    leaking = Samples(steady.pictures, [10**9 + 200 * count for count in steady.pictures], list(range(20)))
    assert [text.split(" ")[0] for text in leaking.problems()] == ["memory", "open"]
