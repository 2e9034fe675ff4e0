"""A run's settings as YAML: read, refused, written, and the same classifier again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from support import run

from taskres_hf.cli.run_config import read_file, write_run
from taskres_hf.errors import ConfigurationError

DATA = Path(__file__).parents[2] / "taskres_hf" / "demo_data"
KNOWN: dict[str, Any] = {
    "learning_rate": float | None, "shots": int | None, "class_names": str | None, "drop_unlabelled": bool,
    "templates": list[str] | None, "class_descriptions": Path | None,
}  # fmt: skip


def test_a_classifier_again_from_the_file_beside_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(DATA)
    (tmp_path / "names.json").write_text('{"sad face": "a crying face"}')
    code, _, error = run(
        capsys, "train", "faces", "--base-model", "shipped", "--shots", 2, "--seed", 7, "--epochs", 5, "--alpha", 0.3,
        "--template", "a face: {}.", "--template", "{}", "-o", tmp_path / "a", "--json", "--cpu",
    )  # fmt: skip
    assert code == 0, error
    monkeypatch.chdir(tmp_path)
    code, _, error = run(capsys, "train", "--config", "a/run.yaml", "-o", "b", "--json")
    assert code == 0, error
    first, again = (load_file(tmp_path / name / "model.safetensors")["residual"] for name in "ab")
    assert first.abs().max() > 0
    assert first.equal(again)
    assert (tmp_path / "a" / "run.yaml").read_text() == (tmp_path / "b" / "run.yaml").read_text()
    stored = yaml.safe_load((tmp_path / "a" / "run.yaml").read_text())
    assert stored["num_train_epochs"] == 5
    assert stored["device"] == "cpu"
    assert stored["templates"] == ["a face: {}.", "{}"]
    assert not {"output_dir", "hub_token", "resume", "overwrite", "as_json", "config"} & set(stored)


def test_what_is_typed_wins_over_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"base_model: shipped\ndataset: {DATA / 'faces'}\nshots: 1\nseed: 3\nnum_train_epochs: 3\npenalty: 1e-3\n"
        "report_to: none\n"
    )
    out = tmp_path / "out"
    assert run(capsys, "train", "--config", tmp_path / "run.yaml", "--seed", 1, "-o", out, "--json")[0] == 0
    stored = yaml.safe_load((out / "run.yaml").read_text())
    assert (stored["shots"], stored["seed"], stored["penalty"]) == (1, 1, 1e-3)


def test_what_is_typed_wins_over_what_it_rules_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text(str(list(range(30))))
    (tmp_path / "run.yaml").write_text(
        f"base_model: shipped\ndataset: {DATA / 'faces'}\nshots: 1\ndevice: cuda:99\nnum_train_epochs: 1\n"
    )
    command = ["train", "--config", tmp_path / "run.yaml", "--indices", rows, "--cpu", "-o", tmp_path / "out", "--json"]
    code, _, error = run(capsys, *command, "--on-short", "ignore")
    assert code == 0, error
    assert len(yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["indices"]) == 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shot: 4", r"no setting 'shot'; did you mean `shots`\?"),
        ("shots: many", "`shots` must be a whole number"),
        ("shots: true", "`shots` must be a whole number"),
        ("drop_unlabelled: yes please", "true or false"),
        ("learning_rate: fast", "a number"),
        ("templates: 3", "`templates` must be"),
        ("shots: 1\nshots: 2", "sets 'shots' twice"),
        ("class_names: {a: b, a: c}", "sets 'a' twice"),
        ("- shots", "`name: value` lines"),
        ("shots: [", "is not YAML"),
        ("shots: !!python/object/apply:os.system ['true']", "is not YAML"),
        ("hub_token: hf_x", "not read from a file"),
        ("resume: [1]\nas_json: true", "no setting"),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        read_file(tmp_path / "run.yaml", KNOWN)


def test_a_file_that_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, error = run(capsys, "train", "--config", tmp_path / "no.yaml")
    assert code == 1
    assert "no.yaml cannot be read" in error


def test_values_mean_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("learning_rate: 1e-3\nclass_names: [no, on, 2024-01-01, 'true']\nshots:\n")
    values = read_file(tmp_path / "run.yaml", KNOWN)
    assert values == {"learning_rate": 1e-3, "class_names": ["no", "on", "2024-01-01", "true"]}


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    values = {
        "class_names": ["no", "1e3", "yes", "12", "null", "~", "é\u2028", "a: b", "2024-01-01", ""],
        "learning_rate": 1e-5, "class_descriptions": {"cat": ["A cat: 'meow'."]}, "templates": ["{}"],
    }  # fmt: skip
    path = write_run(tmp_path, values | {"hub_token": "hf_secret", "push_to_hub": True, "output_dir": "x"})
    assert read_file(path, KNOWN) == values
    assert "hf_secret" not in path.read_text()
