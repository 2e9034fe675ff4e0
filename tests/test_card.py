"""The model card: what it says, and that what people write into it stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import HubServer
from huggingface_hub import ModelCard
from support import random_residual

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.card import _OLD_MARKER, END, card_to_push, collection_card, model_card, renewed
from taskres_hf.cli.app import main
from taskres_hf.errors import ConfigurationError
from taskres_hf.hub import push_folder
from taskres_hf.report import figure_for_card

Model = TaskResCLIPForImageClassification


@pytest.fixture
def config(trained: Path) -> dict[str, Any]:
    return json.loads((trained / "config.json").read_text())


@pytest.fixture
def online(hub: HubServer, base: str, spec: dict[str, Any]) -> Model:
    """A classifier whose base lives on the Hub."""
    hub.add_folder("tester/tiny-clip", base)
    return random_residual(Model.from_base("tester/tiny-clip", spec["classes"], spec["template"]))


def _header(card: str | bytes) -> dict[str, Any]:
    return ModelCard(card.decode() if isinstance(card, bytes) else card).data.to_dict()


def test_card_says_what_the_artifact_is(trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    config["base_model_name_or_path"] = "openai/clip-vit-base-patch32"
    card = model_card(config, "me/animals")
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "taskres_hf"
    assert header["pipeline_tag"] == "image-classification"
    assert header["base_model"] == "openai/clip-vit-base-patch32"
    assert header["model-index"][0]["results"][0]["metrics"][0]["value"] == pytest.approx(
        config["metrics"]["accuracy"], abs=1e-3
    )
    for text in ("zero-shot", "me/animals", "reptile or frog", "a drawing of a {}.", "| shots per class | 4 |"):
        assert text in card
    assert "| recipe | auto |" in card
    assert "num_train_epochs" not in card  # that recipe has none
    low, high = config["metrics"]["accuracy_interval"]
    assert f"allow: {100 * low:.1f} to {100 * high:.1f} %" in card
    assert "## Intended use and limits" in card
    assert "interval" not in model_card(config | {"metrics": {**config["metrics"], "accuracy_interval": "a|b"}})


def test_card_says_the_strength_and_the_one_measured_at(trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    assert "strength" not in model_card(config)
    card = model_card({**config, "strength": 0.5, "training": {"method": "gda"}})
    assert "| strength | 0.5 " in card
    assert "(159 pictures, at strength 1.0)" in card
    assert "| method | gda |" in card
    card = model_card({**config, "strength": 0.5, "metrics": {**config["metrics"], "strength": 0.5}})
    assert "(159 pictures)" in card


def test_card_names_a_dataset_only_if_the_hub_can_have_it(trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    for name, expected in (("food", None), ("me/food", ["me/food"])):
        config["data"] = {"id": name, "name": name}
        assert yaml.safe_load(model_card(config).split("---")[1]).get("datasets") == expected


def test_card_cannot_be_broken_by_names(trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    config["id2label"]["0"] = "a|b<script>alert(1)</script>\n---\n`x`"
    card = model_card(config, "me/x")
    assert "<script>" not in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "taskres_hf"


# ---------------------------------------------------------------------- what people add


def _edited(card: str) -> str:
    """With a licence, a tag, and a paragraph above and below."""
    card = card.replace("library_name:", "license: mit\nlibrary_name:", 1).replace("tags:\n", "tags:\n- zoo\n", 1)
    return card.replace("<!-- generated", "Above.\n\n<!-- generated", 1) + "\n## Limits\n\nBelow, with ünïcode.\n"


def test_an_unedited_card_is_made_anew_whole(config: dict[str, Any]) -> None:
    with_data = {**config, "data": {"id": "me/food", "name": "food"}}
    assert renewed(model_card(with_data, "me/x", ["zoo"]), model_card(config)) == model_card(config)
    assert renewed(model_card(with_data).replace("\n", "\r\n"), model_card(config)) == model_card(config)


def test_text_and_metadata_that_people_added_stay(config: dict[str, Any]) -> None:
    old = {**config, "alpha": 0.125, "metrics": {**config["metrics"], "accuracy": 0.125}}
    card = renewed(_edited(model_card(old)), model_card(config))
    for text in ("Above.", "## Limits\n\nBelow, with ünïcode.", f"| alpha | {config['alpha']} |"):
        assert card.count(text) == 1
    assert "0.125" not in card
    assert card.index("Above.") < card.index("-class image classifier") < card.index(END) < card.index("## Limits")
    header = _header(card)
    assert header["license"] == "mit"
    assert {"zoo", "taskres"} <= set(header["tags"])
    results = list(header["model-index"])
    assert len(results) == 1
    assert results[0]["results"][0]["metrics"][0]["value"] == pytest.approx(config["metrics"]["accuracy"], abs=1e-4)
    assert renewed(card, model_card(config)) == card


def test_results_that_people_added_stay(config: dict[str, Any]) -> None:
    theirs = {"task": {"type": "image-classification"}, "dataset": {"type": "zoo", "name": "Zoo"}}
    entry = {"name": "me", "results": [{**theirs, "metrics": [{"type": "f1", "value": 0.5}]}]}
    header, _, body = model_card(config).removeprefix("---\n").partition("\n---\n")
    values = yaml.safe_load(header)
    values["model-index"].append(entry)
    text = f"---\n{yaml.safe_dump(values)}---\n{body}"
    unmeasured = {**config, "metrics": None}
    for now, count in ((unmeasured, 1), (config, 2)):
        index = yaml.safe_load(renewed(text, model_card(now)).split("---\n")[1])["model-index"]
        assert len(index) == count
        assert entry in index


@pytest.mark.parametrize(
    "card",
    ["Our own words.", "---\nlicense: mit\n---\n# Ours", "---\n: [ no\n---\nWords", "---\n- a list\n---\nWords", ""],
)
def test_a_card_without_marks_is_a_persons(config: dict[str, Any], card: str) -> None:
    assert renewed(card, model_card(config), config) == card


def test_text_between_the_marks_is_not_lost_either(config: dict[str, Any]) -> None:
    card = model_card(config).replace("## Training", "Collected in May.\n\n## Training")
    with pytest.warns(UserWarning, match="between the marks"):
        assert renewed(card, model_card({**config, "alpha": 2.0})) == card


def test_a_card_of_before_there_were_marks(config: dict[str, Any]) -> None:
    start = model_card(config, "me/x").split("<!-- generated")[1].split("-->")[0]
    older = model_card(config, "me/x").replace(f"<!-- generated{start}-->", _OLD_MARKER).replace(f"\n{END}\n", "")
    fresh = model_card({**config, "alpha": 2.0}, "me/x")
    assert renewed(older, fresh, config) == fresh
    for edited in (older + "\nMore.\n", older.replace("## Training", "Words\n\n## Training")):
        assert renewed(edited, fresh, config) == edited
    assert renewed(older, fresh, None) == older  # nothing tells whether it was edited


def _assert_kept(text: str) -> None:
    """What `_edited` added is there still, beside the new settings."""
    assert "Below, with ünïcode." in text
    assert "| alpha | 0.25 |" in text
    assert _header(text)["license"] == "mit"


def test_saving_again_keeps_what_was_added(model: Model, tmp_path: Path) -> None:
    random_residual(model).save_pretrained(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(_edited(readme.read_text()), encoding="utf-8")
    model.classifier.alpha = 0.25
    model.save_pretrained(tmp_path)
    text = readme.read_text(encoding="utf-8")
    _assert_kept(text)


def test_pushing_again_keeps_what_was_added_on_the_hub(online: Model, hub: HubServer) -> None:
    online.push_to_hub("tester/animals")
    card = hub.files("tester/animals")["README.md"].decode()
    repo = hub.repos["models/tester/animals"]
    repo.commit({"README.md": _edited(card).encode()}, "main", "edit")
    online.classifier.alpha = 0.25
    online.push_to_hub("tester/animals")
    text = hub.files("tester/animals")["README.md"].decode()
    _assert_kept(text)


def test_the_card_of_the_revision_pushed_to_is_looked_at(online: Model, hub: HubServer) -> None:
    online.push_to_hub("tester/animals")
    card = hub.files("tester/animals")["README.md"].decode()
    repo = hub.repos["models/tester/animals"]
    online.push_to_hub("tester/animals", revision="tidy")
    repo.commit({"README.md": (card + "On the branch.\n").encode()}, "tidy", "edit")
    repo.commit({"README.md": (card + "On main.\n").encode()}, "main", "edit")
    online.classifier.alpha = 0.25
    online.push_to_hub("tester/animals", revision="tidy")
    text = hub.files("tester/animals", "tidy")["README.md"]
    assert b"On the branch." in text
    assert b"On main." not in text
    assert b"| alpha | 0.25 |" in text
    online.push_to_hub("tester/animals", create_pr=True)
    assert b"On main." in hub.files("tester/animals", "refs/pr/1")["README.md"]


def test_local_words_reach_the_hub_where_none_of_its_own_are_lost(
    online: Model, hub: HubServer, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    online.save_pretrained(folder)
    readme = folder / "README.md"
    readme.write_text(readme.read_text() + "\nFirst words.\n")
    push_folder(folder, "tester/animals")
    readme.write_text(readme.read_text() + "\nMore words.\n")
    push_folder(folder, "tester/animals")
    assert b"First words.\n\nMore words." in hub.files("tester/animals")["README.md"]
    there = hub.files("tester/animals")["README.md"] + b"\nWords of a colleague.\n"
    hub.repos["models/tester/animals"].commit({"README.md": there}, "main", "edit")
    readme.write_text(readme.read_text() + "\nStill more.\n")
    with pytest.warns(UserWarning, match="bring them together"):
        push_folder(folder, "tester/animals")
    assert b"Words of a colleague." in hub.files("tester/animals")["README.md"]


def test_a_hand_written_card_is_brought_up_to_date_by_hand(config: dict[str, Any]) -> None:
    assert card_to_push("Ours.\nMore.\n", "Ours.\n") == "Ours.\nMore.\n"
    assert card_to_push("Ours.\n", model_card(config)) == "Ours.\n"
    assert card_to_push(model_card(config), "Theirs.\n") == "Theirs.\n"
    assert card_to_push(None, "Theirs.\n") == "Theirs.\n"
    with pytest.warns(UserWarning, match="by hand"):
        assert card_to_push("Ours.\n", "Theirs.\n") == "Theirs.\n"


def test_an_older_card_on_the_hub_is_told_by_the_config_beside_it(
    hub: HubServer, trained: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    start = model_card(config).split("<!-- generated")[1].split("-->")[0]
    older = model_card(config).replace(f"<!-- generated{start}-->", _OLD_MARKER).replace(f"\n{END}\n", "")
    folder = tmp_path / "a"
    shutil.copytree(trained, folder)
    push_folder(folder, "tester/animals")
    repo = hub.repos["models/tester/animals"]
    public = json.loads(hub.files("tester/animals")["config.json"])
    older = older.replace(Path(config["base_model_name_or_path"]).name, Path(public["base_model_name_or_path"]).name)
    for text, new in ((older, True), (older + "Words.\n", False)):
        repo.commit({"README.md": text.encode()}, "main", "an older release")
        push_folder(folder, "tester/animals")
        assert (END.encode() in hub.files("tester/animals")["README.md"]) is new


# ---------------------------------------------------------------------- a figure, and a list of classifiers


def test_the_figure_of_the_report_is_pushed_with_the_card(
    hub: HubServer, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib (pip install taskres_hf[report])")
    folder = tmp_path / "animals"
    shutil.copytree(trained, folder)
    with pytest.raises(SystemExit) as stop:
        main(["push", str(folder), "tester/animals", "--quiet"])
    assert not stop.value.code
    files = hub.files("tester/animals")
    assert files["accuracy.png"].startswith(b"\x89PNG")
    assert b"](accuracy.png)" in files["README.md"]
    assert "](accuracy.png)" not in (folder / "README.md").read_text()  # there is none beside it
    monkeypatch.setattr("taskres_hf.report.figures.find_spec", lambda name: None)
    assert figure_for_card(folder) is None


def test_classifiers_over_one_base_are_listed(config: dict[str, Any]) -> None:
    config["base_model_name_or_path"] = "openai/clip-vit-base-patch32"
    hostile = {**config, "id2label": {"0": "a|b", "1": "<script>"}, "metrics": None}
    card = collection_card({"me/animals": config, "me/odd": hostile}, "Zoo\n# <b>")
    assert _header(card)["base_model"] == "openai/clip-vit-base-patch32"
    assert f"{100 * config['metrics']['accuracy']:.1f} %" in card
    assert "not measured" in card
    assert "<script" not in card
    assert "<b>" not in card
    with pytest.raises(ConfigurationError, match="have 2: "):
        collection_card({"a": config, "b": {**config, "base_model_name_or_path": "me/other"}}, "Zoo")
