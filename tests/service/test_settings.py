"""Settings out of range, and what it takes to serve."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("fastapi_offline", reason="needs the serve extra")


from taskres_hf.errors import ConfigurationError, MissingExtraError
from taskres_hf.service import create_app
from taskres_hf.service.settings import ServiceSettings


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_batch": 0}, "`max_batch` must be a whole number from 1"),
        ({"max_batch": 2.5}, "whole number"),
        ({"max_wait_ms": float("nan")}, "`max_wait_ms`"),
        ({"timeout_s": True}, "`timeout_s`"),
        ({"max_bach": 3}, "did you mean 'max_batch'"),
    ],
)
def test_wrong_settings_are_refused(artifacts: dict[str, str], settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        create_app(artifacts["food"], **settings)


def test_settings_need_nothing_of_the_extra() -> None:
    assert ServiceSettings().max_body == 10_000_000


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fastapi_offline", None)
    with pytest.raises(MissingExtraError, match=r"pip install \"taskres_hf\[serve\]\""):
        create_app("anything")
