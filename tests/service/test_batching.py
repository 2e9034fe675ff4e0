"""Batches: who is in one, who is left out, and what happens to the others."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi_offline", reason="needs the serve extra")

from taskres_hf.pool import PoolView
from taskres_hf.service.batching import Batcher, Predictions, Waiting

NOBODY = PoolView(torch.empty(0, 0), torch.empty(0), {})
PATIENCE = 600.0  # seconds, after which a test is told to fail rather than to wait


def _answer(items: Sequence[Waiting]) -> list[Predictions | Exception]:
    return [{"it": [{"label": str(item.top_k), "score": 1.0}]} for item in items]


def _batcher(sizes: list[int], answer: Any = _answer, turn: Any = None, **options: Any) -> Batcher:
    values = {"max_batch": 4, "max_wait": 0.0, **options}
    return Batcher(answer, turn=turn or threading.Lock(), on_batch=sizes.append, **values)


def _put(batcher: Batcher, *numbers: int) -> list[Waiting]:
    items = [Waiting(NOBODY, (), number) for number in numbers]
    for item in items:
        batcher.expect()
        batcher.put(item)
    return items


def _labels(items: Sequence[Waiting]) -> list[str]:
    return [item.future.result(PATIENCE)["it"][0]["label"] for item in items]


def test_pictures_that_wait_pass_together_in_order_and_no_batch_is_too_large() -> None:
    sizes: list[int] = []
    turn = threading.Lock()
    batcher = _batcher(sizes, turn=turn)
    with turn:  # the tower is busy with another base
        items = _put(batcher, *range(10))
    assert _labels(items) == [str(number) for number in range(10)]
    assert sizes == [4, 4, 2]
    batcher.close(PATIENCE)


def test_one_alone_does_not_wait_and_company_that_is_being_decoded_is_waited_for() -> None:
    sizes: list[int] = []
    batcher = _batcher(sizes, max_wait=10 * PATIENCE)
    assert _labels(_put(batcher, 1)) == ["1"]
    for _ in range(2):
        batcher.expect()
    items = [Waiting(NOBODY, (), number) for number in (2, 3)]
    batcher.put(items[0])
    assert not items[0].future.done()
    batcher.put(items[1])
    assert _labels(items) == ["2", "3"]
    assert sizes == [1, 2]
    batcher.expect()
    batcher.give_up()  # it cannot be decoded, so the next has company no more
    _put(batcher, 4)[0].future.cancel()
    batcher.close(PATIENCE)


def test_who_waits_no_more_is_left_out() -> None:
    sizes: list[int] = []
    turn = threading.Lock()
    batcher = _batcher(sizes, turn=turn)
    with turn:
        items = _put(batcher, 1, 2, 3)
        items[1].future.cancel()
    assert _labels([items[0], items[2]]) == ["1", "3"]
    assert sizes == [2]


def test_what_fails_does_not_spoil_its_neighbours() -> None:
    def answer(items: Sequence[Waiting]) -> list[Predictions | Exception]:
        if any(item.top_k == 2 for item in items):
            raise RuntimeError("the tower cannot take it")
        return _answer(items)

    turn = threading.Lock()
    batcher = _batcher([], answer, turn)
    with turn:
        items = _put(batcher, 1, 2, 3)
    assert _labels([items[0], items[2]]) == ["1", "3"]
    with pytest.raises(RuntimeError, match="cannot take"):
        items[1].future.result(PATIENCE)
    assert _labels(_put(batcher, 4)) == ["4"]  # the thread goes on


def test_closing_answers_what_was_taken_and_takes_no_more() -> None:
    turn = threading.Lock()
    batcher = _batcher([], turn=turn)
    with turn:
        items = _put(batcher, *range(9))
        closing = threading.Thread(target=batcher.close, args=(PATIENCE,))
        closing.start()
    closing.join(PATIENCE)
    assert _labels(items) == [str(number) for number in range(9)]
    assert _put(batcher, 1)[0].future.cancelled()
