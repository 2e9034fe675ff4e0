"""What an event tells when it goes wrong; the page itself is driven in test_browser."""

from __future__ import annotations

import pytest

from taskres_hf.errors import DataError

gradio = pytest.importorskip("gradio", reason="the app needs gradio")


def test_an_error_of_several_lines_is_shown_as_lines() -> None:
    from taskres_hf.app.layout import _told

    @_told
    def fails() -> None:
        raise DataError("2 pictures cannot be read:\n  <b>.png\x1b")

    with pytest.raises(gradio.Error) as raised:
        fails()
    assert raised.value.message == "2 pictures cannot be read:<br>  &lt;b&gt;.png\\x1b"
