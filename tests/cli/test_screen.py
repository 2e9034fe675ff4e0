"""What reaches a terminal, and how an interrupted command ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import run

from taskres_hf.cli import screen, train
from taskres_hf.cli.screen import Interruption, when_interrupted
from taskres_hf.tables import json_text

DATA = Path(__file__).parents[2] / "taskres_hf" / "demo_data"


def test_a_terminal_obeys_nothing_that_a_name_holds(capsys: pytest.CaptureFixture[str]) -> None:
    screen.say("a\x1b[2Jb\udcff\u202ec\nd")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\udcff\\u202ec\nd\n"


def test_json_is_harmless_and_reads_back() -> None:
    value = {"name": "\x1b[31m\x9b2J\udcff\u202e\x7fé猫"}
    text = json_text(value, default=str)
    assert text.encode("utf-8")
    assert not any(character in text for character in "\x1b\x9b\udcff\u202e\x7f")
    assert "é猫" in text
    assert json.loads(text) == value


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_in_one_line(capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with Interruption() as interruption:
        when_interrupted(lambda: "All is kept: go on with --resume.")
        os.kill(os.getpid(), number)
        pytest.fail("the command went on")
    with pytest.raises(SystemExit) as stop:
        interruption.finish()
    assert stop.value.code == code
    assert capsys.readouterr().err == "Interrupted. All is kept: go on with --resume.\n"
    assert signal.getsignal(number) is before


def test_an_interrupt_inside_an_import_ends_with_the_same_code(tmp_path: Path) -> None:
    """CPython remembers such an interrupt, and would end `python -m` by the signal instead."""
    (tmp_path / "program.py").write_text(
        "from taskres_hf.cli.screen import Interruption\n"
        "with Interruption() as interruption:\n"
        "    exec('import os, signal; os.kill(os.getpid(), signal.SIGINT)\\nfor _ in range(10**6): pass')\n"
        "interruption.finish()\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-m", "program"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "Interrupted. Nothing was changed.\n")


def test_other_ends_are_left_alone() -> None:
    with pytest.raises(ValueError, match="x"), Interruption():
        raise ValueError("x")
    with pytest.raises(SystemExit), Interruption():
        sys.exit(3)
    with Interruption() as interruption:
        pass
    interruption.finish()


@pytest.mark.parametrize("save_epochs", [0, 2])
def test_an_interrupted_training_says_what_is_kept(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_epochs: int
) -> None:
    monkeypatch.setattr(train, "_measure", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    out = tmp_path / "out"
    code, text, error = run(
        capsys, "train", DATA / "faces", "--base-model", "shipped", "--shots", 1, "--epochs", 2, "-o", out, "--json",
        "--save-epochs", save_epochs,
    )  # fmt: skip
    assert code == 130
    assert text == ""
    last = error.splitlines()[-1]
    assert last.startswith("Interrupted. ")
    assert "Traceback" not in error
    if save_epochs:
        assert "checkpoint-2 is kept: run the same command with --resume" in last
    else:
        assert "in the cache" in last
        assert not (out / "config.json").exists()


@pytest.mark.parametrize(("quiet", "disabled"), [(False, False), (True, True)])
def test_download_bars_stay_unless_asked(quiet: bool, disabled: bool) -> None:
    program = (
        "from taskres_hf.cli.screen import quiet_libraries\n"
        f"quiet_libraries({quiet})\n"
        "from huggingface_hub.utils import are_progress_bars_disabled\n"
        "print(are_progress_bars_disabled())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == str(disabled)
