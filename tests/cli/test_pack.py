"""`taskres pack`, and packed files given to `predict` and `serve`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import random_residual, run

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.demo import demo_dataset

CLASSES = {"food": ["fruit", "bread", "<b>soup</b>"], "signs": ["letter", "\x1b[31mred"]}


@pytest.fixture(scope="module")
def root(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two classifiers, and the packed file made of them."""
    root = tmp_path_factory.mktemp("packing")
    for seed, (name, classes) in enumerate(CLASSES.items()):
        model = TaskResCLIPForImageClassification.from_base(base, classes)
        random_residual(model, seed).save_pretrained(root / "made" / name)
    demo_dataset("food")["test"][0]["image"].convert("RGB").save(root / "a.png")
    return root


@pytest.fixture
def packed(root: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    file = root / "pool.safetensors"
    if not file.exists():
        code, out, _ = run(capsys, "pack", root / "made", "-o", file, "--quiet")
        assert (code, out.startswith("Packed 2 classifiers in ")) == (0, True)
    return file


def test_pack_list_and_unpack(packed: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "pack", packed, "--list")
    assert code == 0
    assert "food" in out
    assert "tiny-clip" in out
    _, out, _ = run(capsys, "pack", packed, "--list", "--json", "--classifier", "signs")
    assert [row["name"] for row in json.loads(out)["classifiers"]] == ["signs"]
    assert json.loads(out)["base_rows"] is True
    code, out, _ = run(capsys, "pack", packed, "--unpack", "-o", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(out)["folders"] == [str(tmp_path / "out" / name) for name in CLASSES]
    for file in (root / "made").rglob("*.*"):
        assert (tmp_path / "out" / file.relative_to(root / "made")).read_bytes() == file.read_bytes()
    code, out, _ = run(
        capsys, "pack", f"a={root}/made/food", "-o", tmp_path / "light.safetensors", "--no-base-rows", "--json"
    )
    assert json.loads(out)["classifiers"] == ["a"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--list", "--unpack"], 2), (["--list", "-o", "x"], 2), ([], 2), (["--unpack"], 2),
        (["--list", "--classifier", "dogs"], 1), (["-o", "x.bin"], 1),
    ],
)  # fmt: skip
def test_wrong_usage(packed: Path, arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "pack", packed, *arguments)[0] == code


def test_predict_with_one_of_a_pack(packed: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, wanted, _ = run(capsys, "predict", root / "made" / "food", root / "a.png", "--json", "--top-k", 3)
    code, found, _ = run(capsys, "predict", packed, root / "a.png", "--classifier", "food", "--json", "--top-k", 3)
    assert code == 0
    assert json.loads(found) == json.loads(wanted)
    code, _, error = run(capsys, "predict", packed, root / "a.png", "--classifier", "dogs")
    assert code == 1
    assert "no classifier 'dogs'" in error
    code, _, _ = run(capsys, "predict", root / "made" / "food", root / "a.png", "--classifier", "food")
    assert code == 2
    code, _, error = run(capsys, "predict", packed, root / "a.png", "--revision", "main")
    assert code == 2
    assert "--revision" in error


def test_predict_with_several(packed: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.png").write_bytes(b"")
    code, out, error = run(capsys, "predict", packed, root / "a.png", tmp_path / "broken.png", "--quiet")
    assert code == 3
    assert "\x1b" not in out
    assert [line.split(":")[0].strip() for line in out.splitlines()[1:]] == ["food", "signs"]
    assert "Skipped" in error
    _, out, _ = run(capsys, "predict", packed, root / "a.png", "--json")
    (row,) = json.loads(out)
    _, alone, _ = run(capsys, "predict", root / "made" / "signs", root / "a.png", "--json")
    (wanted,) = json.loads(alone)[0]["predictions"]
    assert row["classifiers"]["signs"][0]["label"] == wanted["label"]
    assert row["classifiers"]["signs"][0]["score"] == pytest.approx(wanted["score"], abs=1e-5)


def test_predict_with_several_to_one_file(
    packed: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "predict", packed, root / "a.png", "-o", tmp_path / "rows.csv", "--quiet")
    assert (code, out.strip()) == (0, f"1 pictures classified by 2 classifiers in {tmp_path / 'rows.csv'}")
    rows = (tmp_path / "rows.csv").read_text().splitlines()
    assert rows[0] == "file,classifier,label,score,error"
    assert [row.split(",")[1] for row in rows[1:]] == ["food", "signs"]
    assert "\x1b" not in rows[2]
    code, out, _ = run(capsys, "predict", root / "made", root / "a.png", "-o", tmp_path / "again.csv", "--json")
    told = json.loads(out)
    assert (code, told["classifiers"], told["classified"], told["skipped"]) == (0, ["food", "signs"], 1, 0)
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "rows.csv").read_bytes()
    some = ("--classifier", "signs", "--classifier", "food", "--strength", 0, "--top-k", 2)
    code, _, _ = run(capsys, "predict", packed, root / "a.png", "-o", tmp_path / "some.jsonl", *some)
    rows = [json.loads(line) for line in (tmp_path / "some.jsonl").read_text().splitlines()]
    assert [(row["classifier"], len(row["predictions"])) for row in rows] == [("signs", 2), ("food", 2)]
    assert run(capsys, "predict", packed, root / "a.png", "--reject", "-o", tmp_path / "x.csv")[0] == 2


def test_predict_with_one_of_a_folder_of_classifiers(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, wanted, _ = run(capsys, "predict", root / "made" / "food", root / "a.png", "--json")
    code, found, _ = run(capsys, "predict", root / "made", root / "a.png", "--classifier", "food", "--json")
    assert (code, json.loads(found)) == (0, json.loads(wanted))
    code, _, error = run(capsys, "predict", root / "made", root / "a.png", "--classifier", "dogs")
    assert (code, ": food, signs." in error) == (1, True)
    code, out, _ = run(
        capsys, "predict", root / "made", root / "a.png", "--output-dir", tmp_path / "parts", "--classifier", "food",
        "--classifier", "signs", "--json",
    )  # fmt: skip
    assert (code, json.loads(out)["rows"]) == (0, 2)


def test_a_pack_is_served(packed: Path, root: Path) -> None:
    pytest.importorskip("fastapi_offline", reason="needs the serve extra")
    from starlette.testclient import TestClient

    from taskres_hf.cli.pack import unpacked
    from taskres_hf.service import create_app

    with unpacked([str(packed), f"third={root}/made/food"]) as sources:
        app = create_app(sources)
    with TestClient(app) as client:
        assert [row["name"] for row in client.get("/v1/models").json()["models"]] == ["food", "signs", "third"]
        content = (root / "a.png").read_bytes()
        answers = [
            client.post(f"/v1/models/{name}/classify", content=content, headers={"Content-Type": "image/png"}).json()
            for name in ("food", "third")
        ]
    assert answers[0] == {**answers[1], "model": "food"}
    assert "fruit" in str(answers[0])
