"""The account: readable, bounded, harmless to show; and pictures that are there twice."""

from __future__ import annotations

import json

import pytest

from taskres_hf.data.reading import Account, LeftOut, SplitAccount, duplicates, printable, shorten


def test_lines_and_json_say_the_same() -> None:
    account = Account(
        "photos",
        "split folders with class folders",
        (
            SplitAccount("train", "Train/", "train", {"cat": 3, "dog": 1}),
            SplitAccount("test", "test/", "held out", {"cat": 1, "dog": 1}, 2),
        ),
        (LeftOut("pictures beside the class folders", 7, ("a.png", "b.png")),),
        {"n1": "cat"},
        ("A note.",),
    )
    assert account.lines() == [
        "photos: split folders with class folders",
        "  train from Train/: 4 pictures of 2 classes, 1 to 3 a class; to train on",
        "  test from test/: 4 pictures of 2 classes, 1 a class, 2 without a label; held out to measure on",
        "  classes: cat (3), dog (1)",
        "  names: n1 = cat",
        "  left out, pictures beside the class folders: 7 (a.png, b.png, ...)",
        "  A note.",
    ]
    value = json.loads(json.dumps(account.as_dict()))
    assert [(split["name"], split["pictures"], split["unlabelled"]) for split in value["splits"]] == [
        ("train", 4, 0), ("test", 4, 2),
    ]  # fmt: skip
    assert value["splits"][0]["classes"] == {"cat": 3, "dog": 1}
    assert value["left_out"] == [
        {"reason": "pictures beside the class folders", "count": 7, "examples": ["a.png", "b.png"]}
    ]
    assert (value["class_pairs"], value["notes"]) == ({"n1": "cat"}, ["A note."])


def test_bounded_whatever_there_is() -> None:
    classes = {f"class {number} {'x' * 1000}": number + 1 for number in range(10_000)}
    account = Account(
        "photos" * 1000,
        "class folders",
        (SplitAccount("train", "", "train", classes), *(SplitAccount(f"s{n}") for n in range(1000))),
        tuple(LeftOut(f"files ending in .{number}", 1, ("x" * 5000,) * 9) for number in range(1000)),
        {name: name for name in classes},
        tuple(f"note {number} " * 1000 for number in range(1000)),
    )
    text = json.dumps(account.as_dict())
    assert len(text) < 150_000
    train = account.as_dict()["splits"][0]
    assert (train["num_classes"], train["pictures"]) == (10_000, 50_005_000)
    assert list(train["smallest_classes"].values()) == list(range(1, 11))
    assert len(train["largest_classes"]) == 10
    assert max(map(len, account.lines())) < 10_000


def test_text_of_others_is_harmless() -> None:
    assert printable("a\x1b[31m\nb\udce9") == "a\\x1b[31m\\x0ab\\udce9"
    assert len(printable("x" * 10_000)) == 200
    assert shorten(list("abcdefg"), 3) == "a, b, c and 4 more"


def test_pictures_that_are_there_twice() -> None:
    found = duplicates(["a", "b", "a", "c", "c", "d"], [0, 1, 1, 2, 2, 0], ["x", "c", "a", "a"], [0, 0, 0, 0])
    assert found.conflicting == [(0, 2)]
    assert found.repeated == [(3, 4)]
    assert found.shared == [(3, 1), (0, 2), (0, 3)]
    assert duplicates(["a", "b"], [0, 1]) == ([], [], [])
    with pytest.raises(ValueError, match="1 digests and 2 labels"):
        duplicates(["a"], [0], ["a"], [0, 1])
