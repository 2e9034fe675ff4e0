"""What a user sees of the options: help that fits 80 columns, what is needed first, choices that complete."""

from __future__ import annotations

import enum
import re
import shlex
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import typer
from support import run

from taskres_hf.cli import options
from taskres_hf.cli.app import COMMANDS, SUMMARIES, make_app
from taskres_hf.training import arguments

FIRST = {
    "--output-dir", "--base-model", "--shots", "--seed", "--template", "--class-names", "--device", "--config",
}  # fmt: skip


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def _panels(text: str) -> dict[str, list[str]]:
    """Heading to long options, in the order of the help."""
    panels: dict[str, list[str]] = {}
    for line in text.splitlines():
        if heading := re.match(r"╭─ (.+?) ─", line):
            current = panels.setdefault(heading.group(1), [])
        elif option := re.match(r"│ \*? *(--[\w-]+)", line):
            current.append(option.group(1))
    return panels


def test_train_shows_the_eight_that_people_need_first(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, "train", "--help")
    assert code == 0
    panels = _panels(text)
    assert list(panels)[:2] == ["Arguments", "Options"]
    assert set(panels["Options"]) == FIRST | {"--help"}
    assert len(panels) >= 7
    assert sum(map(len, panels.values())) > 40
    assert "openai/clip-vit-base-patch16" in " ".join(re.sub(r"[│\s]+", " ", text).split())
    assert "TASKRES_BASE_MODEL" in text


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_80_columns(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, text, error = run(capsys, *filter(None, [command]), "--help")
    assert code == 0
    assert error == ""
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert len(text) > 500


def test_the_list_of_commands_is_that_of_their_own_help_though_none_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = typer.main.get_command(make_app()).commands.values()  # type: ignore[attr-defined]
    for command in commands:
        assert SUMMARIES[command.name] == command.short_help == " ".join(command.help.split("\n\n")[0].split())
    assert list(SUMMARIES) == list(COMMANDS)
    monkeypatch.setattr("taskres_hf.cli.app.COMMANDS", dict.fromkeys(COMMANDS, ("missing", "", "Panel")))
    text = re.sub(r"[│\s]+", " ", run(capsys, "--help")[1])
    assert all(f"{name} {summary}" in text for name, summary in SUMMARIES.items())
    assert "Did you mean 'train'?" in run(capsys, "trains")[2]


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_one_spelling_of_the_device(capsys: pytest.CaptureFixture[str], command: str) -> None:
    panels = _panels(run(capsys, command, "--help")[1])
    assert "--device" in panels["Options"]
    assert not any("--cpu" in names for names in panels.values())


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("--recipe", options.Recipe), ("--engine", options.EngineName), ("--precision", options.PrecisionName),
        ("--on-short", options.ShortClass), ("--on-error", options.BrokenPicture), ("--dtype", options.DtypeName),
        ("--prompt-average", options.Average), ("--residual-side", options.Side), ("--crop", options.CropName),
        ("--underscores", options.Underscores),
    ],
)  # fmt: skip
def test_a_mistyped_choice_is_wrong_usage(
    capsys: pytest.CaptureFixture[str], option: str, choices: type[enum.Enum]
) -> None:
    code, _, error = run(capsys, "train", "photos", option, "nope")
    assert code == 2
    assert option in error
    for choice in choices:
        assert f"'{choice.value}'" in error


@pytest.mark.parametrize(
    ("choices", "name"),
    [
        (options.Recipe, "RecipeName"), (options.EngineName, "EngineName"), (options.PrecisionName, "PrecisionName"),
        (options.ShortClass, "OnShort"), (options.BrokenPicture, "OnError"), (options.CropName, "Crop"),
    ],
)  # fmt: skip
def test_choices_are_those_of_the_library(choices: type[enum.Enum], name: str) -> None:
    assert {choice.value for choice in choices} == set(typing.get_args(getattr(arguments, name)))


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("taskres ev", ["evaluate"]),
        ("taskres train --recipe ", ["auto", "auto-v1", "paper"]),
        ("taskres evaluate x --engine o", ["openvino", "onnxruntime"]),
        ("taskres train --template clip-", ["clip-7", "clip-80"]),
        ("taskres predict x --device c", ["cpu", "cuda", "cuda:0"]),
    ],
)
def test_the_shell_completes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str, found: list[str]
) -> None:
    monkeypatch.setenv("_TASKRES_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    code, text, _ = run(capsys)
    assert code == 0
    assert text.split() == found


def test_completion_is_installed_for_taskres(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("There is no bash here to install a completion for.")
    # The shell that calls is the one that is found; a second command keeps bash from giving way to the first.
    script = f"{shlex.quote(sys.executable)} -m taskres_hf --install-completion && true"
    environment = {"HOME": str(tmp_path), "PATH": "/"}
    done = subprocess.run([bash, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "bash completion installed" in done.stdout
    assert "_TASKRES_COMPLETE" in (tmp_path / ".bash_completions" / "taskres.sh").read_text()


def test_the_program_is_called_as_the_user_called_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "taskres_hf", "info", "--help"], capture_output=True, text=True, check=True
    )
    assert "Usage: python -m taskres_hf info" in done.stdout


def test_every_option_that_a_message_names_exists() -> None:
    """Messages of the library give the option in brackets after the argument: `class_folder= (--class-folder)`."""
    package = Path(options.__file__).parents[1]
    pattern = r"(?<!var)[(,] ?(--[a-z][a-z-]+)"  # CSS has var(--name)
    named = {option for path in package.rglob("*.py") for option in re.findall(pattern, path.read_text())}
    parameters = [
        parameter for command in typer.main.get_command(make_app()).commands.values() for parameter in command.params
    ]
    known = {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}
    assert "--class-folder" in named
    assert named <= known
