"""The settings: checked, parsed by transformers' parser, and never showing the token."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import asdict, replace
from typing import Any, get_args, get_type_hints

import pytest
from accelerate.tracking import get_available_trackers
from transformers import HfArgumentParser

from taskres_hf import TaskResTrainingArguments
from taskres_hf.embedding.engines.choose import ENGINES, PRECISIONS
from taskres_hf.errors import ConfigurationError, MissingExtraError
from taskres_hf.training.arguments import _TRUTH_VALUES, EngineName, PrecisionName, is_test_split


def _parse(*words: str) -> TaskResTrainingArguments:
    (arguments,) = HfArgumentParser(TaskResTrainingArguments).parse_args_into_dataclasses(list(words))
    return arguments


def test_the_parser_of_transformers_takes_them() -> None:
    arguments = _parse(
        "--output_dir", "run", "--recipe", "paper", "--shots", "4", "--augment_online", "false", "--report_to", "none",
        "--learning_rate", "1e-3", "--label_map", '{"cat": "tabby cat"}', "--cache_dir", "cache", "--no_closed_form",
        "--disable-tqdm", "true", "--hub-token", "hf_secret", "--save_total_limit", "-1",
    )  # fmt: skip
    assert (arguments.output_dir, arguments.recipe, arguments.shots) == ("run", "paper", 4)
    assert (arguments.augment_online, arguments.closed_form, arguments.disable_tqdm) == (False, False, True)
    assert (arguments.learning_rate, arguments.report_to, arguments.cache_dir) == (1e-3, [], "cache")
    assert arguments.label_map == {"cat": "tabby cat"}
    assert _parse() == TaskResTrainingArguments()


@pytest.mark.parametrize("words", [("--recipe", "best"), ("--engine", "tensorrt"), ("--on_short", "pad")])
def test_the_parser_knows_the_choices(words: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parse(*words)
    assert "invalid choice" in capsys.readouterr().err


def test_choices_are_those_of_the_engines() -> None:
    assert get_args(EngineName) == ENGINES
    assert get_args(PrecisionName) == PRECISIONS


@pytest.mark.parametrize(
    "options",
    [
        {"shots": 0}, {"shots": True}, {"recipe": "best"}, {"views": -1}, {"views": True}, {"seed": 1.5},
        {"learning_rate": float("nan")}, {"weight_decay": -1}, {"num_train_epochs": 0}, {"engine": "gpu"},
        {"views": 2, "augment_online": True}, {"precision": "fp8"}, {"on_error": "ignore"}, {"on_short": "pad"},
        {"crop": "centre"}, {"save_total_limit": 1.5}, {"eval_strategy": "steps"}, {"label_map": "{cat}"},
        {"label_map": '{"cat": 1}'}, {"report_to": "tensorbord"}, {"report_to": ["none", "wandb"]},
    ],
)  # fmt: skip
def test_bad_settings_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        TaskResTrainingArguments(**options)


@pytest.mark.parametrize("nothing", [None, "none", [], ["none"]])
def test_reporting_to_nobody(nothing: Any) -> None:
    assert TaskResTrainingArguments(report_to=nothing).report_to == []


def test_all_trackers_are_those_installed() -> None:
    assert TaskResTrainingArguments(report_to="all").report_to == sorted(map(str, get_available_trackers()))


@pytest.mark.parametrize(("tracker", "package"), [("wandb", "wandb"), ("comet_ml", "comet-ml")])
@pytest.mark.parametrize("as_list", [False, True])
def test_a_missing_tracker_is_an_error_that_names_its_package(
    tracker: str, package: str, as_list: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(MissingExtraError, match=f"pip install {package}"):
        TaskResTrainingArguments(report_to=[tracker] if as_list else tracker)


def test_the_token_is_masked_wherever_settings_go() -> None:
    arguments = TaskResTrainingArguments(hub_token="hf_secret", label_map={"a": "b"})
    shown = [
        repr(arguments), str(arguments.hub_token), str(asdict(arguments)), arguments.to_json_string(),
        str(arguments.to_dict()), str(arguments.to_sanitized_dict()), str(vars(arguments)), json.dumps(vars(arguments)),
        str(pickle.dumps(arguments)), str(pickle.dumps(asdict(arguments))), str(vars(copy.deepcopy(arguments))),
        str(pickle.dumps(copy.deepcopy(arguments))),
    ]  # fmt: skip
    assert not [text for text in shown if "hf_secret" in text]
    assert arguments.to_dict()["hub_token"] == "<HUB_TOKEN>"
    assert arguments.token == "hf_secret"
    assert replace(arguments, seed=2).token == "hf_secret"
    assert TaskResTrainingArguments(**arguments.to_dict()).token is None  # the mask is no token


def test_settings_survive_json() -> None:
    arguments = TaskResTrainingArguments(shots=4, label_map={"a": "b"}, augment_online=True, hub_private_repo=True)
    assert TaskResTrainingArguments(**json.loads(arguments.to_json_string())) == arguments
    flat = arguments.to_sanitized_dict()
    assert all(isinstance(value, (bool, int, float, str)) for value in flat.values())


def test_names_of_test_splits() -> None:
    assert all(map(is_test_split, ["test", "Test", "test[:50%]", "testing", "train+test"]))
    assert not any(map(is_test_split, [None, "", "validation", "train", "val", "latest"]))


def test_a_copy_has_no_token_rather_than_a_wrong_one() -> None:
    arguments = TaskResTrainingArguments(hub_token="hf_secret")
    assert arguments.token == "hf_secret"
    assert copy.deepcopy(arguments).token is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "`seed` must be"), ({"seed": 2**70}, "`seed` must be"),
        ({"greater_is_better": "no"}, "`greater_is_better` must be True or False or None"),
        ({"closed_form": None}, "`closed_form` must be True or False"), ({"learning_rate": True}, "`learning_rate`"),
        ({"metric_for_best_model": None}, "`metric_for_best_model`"), ({"report_to": 3}, "`report_to`"),
        ({"label_map": "place"}, "neither 'position' nor JSON"), ({"label_map": {"cat": 1}}, "class name"),
        ({"label_map": "[1]"}, "class name"),
    ],
)  # fmt: skip
def test_what_would_be_misread_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TaskResTrainingArguments(**options)


def test_every_truth_value_is_checked() -> None:
    hints = get_type_hints(TaskResTrainingArguments)
    truths = {name for name, hint in hints.items() if hint is bool or bool in get_args(hint)}
    assert set(_TRUTH_VALUES) == truths


def test_what_chooses_the_epoch_looks_at_each() -> None:
    assert TaskResTrainingArguments(early_stopping_patience=2).eval_strategy == "epoch"
    assert TaskResTrainingArguments(load_best_model_at_end=True).eval_strategy == "epoch"
    assert TaskResTrainingArguments().eval_strategy == "no"
