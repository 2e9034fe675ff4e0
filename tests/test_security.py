"""What docs/security.md promises, each promise tried as somebody who crafts a file would; the rest is named there."""

from __future__ import annotations

import ast
import csv
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from hub_server import HubServer
from support import forge, run
from transformers import pipeline

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf import load_training_data
from taskres_hf.card import model_card
from taskres_hf.checking import sign
from taskres_hf.errors import ArtifactError, BaseModelError, TaskResError

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "taskres_hf").rglob("*.py"))

# ---------------------------------------------------------------------- code in files that are read

_MODULES = {"pickle", "cPickle", "joblib", "dill", "cloudpickle", "shelve", "marshal", "runpy", "code", "pty"}
_CALLS = {
    "torch.load", "torch.jit.load", "pandas.read_pickle", "pd.read_pickle", "yaml.load", "yaml.load_all",
    "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "eval", "exec", "compile", "input", "__import__",
}  # fmt: skip
_VALUES = {
    "allow_pickle": True,
    "weights_only": False,
    "trust_remote_code": True,
    "use_safetensors": False,
    "shell": True,
}


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe(tree: ast.AST) -> list[str]:
    """What in a module's code could run or unpickle what it reads, or ask for leave to."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"import {name}" for name in named if name.split(".")[0] in _MODULES]
        elif isinstance(node, ast.keyword):
            value = node.value.value if isinstance(node.value, ast.Constant) else None
            forbidden = {
                "allow_pickle": True,
                "weights_only": False,
                "trust_remote_code": True,
                "use_safetensors": False,
            }
            if (node.arg == "shell" and value) or (node.arg in forbidden and value is forbidden[node.arg]):
                found.append(f"{node.arg}={value}")
        elif isinstance(node, ast.Call):
            name = _name(node.func)
            constant = bool(node.args) and all(isinstance(argument, ast.Constant) for argument in node.args)
            if name in ("np.load", "numpy.load") and not any(word.arg == "allow_pickle" for word in node.keywords):
                found.append(f"{name} without allow_pickle=False")
            if name in _CALLS and not (name == "exec" and constant):
                found.append(name)
            if name.endswith("Image.open") and not any(word.arg == "formats" for word in node.keywords):
                found.append(f"{name} without formats")
    return found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from joblib import load", "torch.load(path, weights_only=True)", "np.load(path)",
        "np.load(path, allow_pickle=True)", "yaml.load(text, Loader=x)", "eval(text)", "exec(text)", "input('y/N')",
        "subprocess.run(text, shell=True)", "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, use_safetensors=False)", "PIL.Image.open(path)", "os.system(text)",
    ],
)  # fmt: skip
def test_the_scan_finds_what_it_looks_for(code: str) -> None:
    assert unsafe(ast.parse(code))


def test_nothing_unpickles_or_runs_what_it_reads_or_asks_for_leave() -> None:
    assert len(SOURCES) > 100
    found = {str(path.relative_to(ROOT)): unsafe(ast.parse(path.read_text(encoding="utf-8"))) for path in SOURCES}
    assert {path: what for path, what in found.items() if what} == {}


# ---------------------------------------------------------------------- code beside a model

EVIL = """
from pathlib import Path
Path(__file__).with_name("RAN").write_text("")
Path({marker!r}).write_text("")
"""


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Is there after a test only if code of a crafted folder ran; nobody may be asked whether to run it."""

    def asked(*_: Any) -> str:
        raise AssertionError("asked at the terminal")

    monkeypatch.setattr("builtins.input", asked)
    yield tmp_path / "RAN"
    assert not list(tmp_path.rglob("RAN"))


def _edit(path: Path, **values: Any) -> None:
    stored = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**stored, **values}))


def _crafted(source: str | Path, folder: Path, marker: Path, file: str, values: dict[str, Any]) -> Path:
    shutil.copytree(source, folder)
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    _edit(folder / file, **values)
    artifact = json.loads((folder / "config.json").read_text())["model_type"] == "taskres"
    return forge(folder) if artifact else folder  # who crafts one makes its checksums right


PROCESSOR = {"auto_map": {"AutoImageProcessor": "evil.Evil"}}
ARTIFACTS = {
    "beside its own": ("preprocessor_config.json", PROCESSOR),
    "instead of its own": ("preprocessor_config.json", {**PROCESSOR, "image_processor_type": "Evil"}),
    "in the other file": ("processor_config.json", {"image_processor": {**PROCESSOR, "image_processor_type": "Evil"}}),
    "a feature extractor": ("preprocessor_config.json", {"auto_map": {"AutoFeatureExtractor": "evil.Evil"}}),
    "in the config": ("config.json", PROCESSOR),
    "in another repository": ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "me/other--evil.Evil"}}),
}


@pytest.mark.parametrize("kind", ARTIFACTS)
def test_an_artifact_cannot_bring_code(kind: str, model: Model, tmp_path: Path, marker: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    crafted = _crafted(tmp_path / "saved", tmp_path / "crafted", marker, *ARTIFACTS[kind])
    with pytest.raises(ArtifactError, match="auto_map"):
        Model.from_pretrained(crafted)
    with pytest.raises((ArtifactError, ValueError, OSError), match="auto_map"):
        pipeline("image-classification", model=str(crafted))
    if kind != "in the other file":  # which is none of those that are signed
        with pytest.raises(ArtifactError):
            sign(crafted)


@pytest.mark.parametrize("kind", ["beside its own", "in the other file", "in the config"])
def test_neither_can_one_from_the_hub(kind: str, hub: HubServer, base: str, tmp_path: Path, marker: Path) -> None:
    hub.add_folder("tester/tiny-clip", base)
    Model.from_base("tester/tiny-clip", ["cat", "dog"]).push_to_hub("tester/animals")
    (tmp_path / "saved").mkdir()
    for name, content in hub.files("tester/animals").items():
        (tmp_path / "saved" / name).write_bytes(content)
    crafted = _crafted(tmp_path / "saved", tmp_path / "crafted", marker, *ARTIFACTS[kind])
    hub.repos["models/tester/animals"].commit({file.name: file.read_bytes() for file in crafted.iterdir()}, "main", "x")
    with pytest.raises(ArtifactError, match="auto_map"):
        Model.from_pretrained("tester/animals")
    with pytest.raises((ArtifactError, ValueError, OSError), match="auto_map"):
        pipeline("image-classification", model="tester/animals")


def test_a_base_with_code_needs_the_argument(model: Model, base: str, tmp_path: Path, marker: Path) -> None:
    values = {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Evil"}}
    crafted = _crafted(base, tmp_path / "crafted", marker, "config.json", values)
    with pytest.raises(BaseModelError, match="trust_remote_code=True"):
        Model.from_base(str(crafted), ["cat", "dog"])
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(BaseModelError, match="base_trust_remote_code=True"):
        Model.from_pretrained(tmp_path / "saved", base_model=str(crafted))
    forge(tmp_path / "saved", trust_remote_code=True, base_trust_remote_code=True)
    with pytest.raises(TaskResError, match=r"trust_remote_code|belong"):
        Model.from_pretrained(tmp_path / "saved", base_model=str(crafted))


def test_the_code_of_a_trusted_base_runs(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above is one of a door that opens."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    values = {"auto_map": {"AutoModel": "evil.Evil"}}
    crafted = _crafted(base, tmp_path / "crafted", tmp_path / "RAN", "config.json", values)
    with pytest.raises(Exception, match="Evil"):  # the module has no class of that name
        Model.from_base(str(crafted), ["cat", "dog"], trust_remote_code=True)
    assert (tmp_path / "RAN").exists()


@pytest.mark.parametrize(
    ("file", "values"),
    [
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"},
        ),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "me/other--evil.Evil"]}}),
        ("preprocessor_config.json", PROCESSOR),
        ("preprocessor_config.json", {**PROCESSOR, "image_processor_type": "Evil"}),
    ],
)
def test_tokenizer_and_processor_of_a_base_never_bring_code(
    file: str, values: dict[str, Any], base: str, tmp_path: Path, marker: Path
) -> None:
    crafted = _crafted(base, tmp_path / "crafted", marker, file, values)
    try:
        made = Model.from_base(str(crafted), ["cat", "dog"])
        made.save_pretrained(tmp_path / "saved")
    except BaseModelError:  # where nothing but the code could be taken
        return
    assert "auto_map" not in (tmp_path / "saved" / "preprocessor_config.json").read_text()
    assert Model.from_pretrained(tmp_path / "saved").image_processor is not None


# ---------------------------------------------------------------------- names in what was downloaded


def _renamed(hub: HubServer, **values: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in hub.files("tester/animals").items():
            Path(folder, name).write_bytes(content)
        forge(Path(folder), **values)
        files = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    hub.repos["models/tester/animals"].commit(files, "main", "edit")


@pytest.fixture
def pushed(hub: HubServer, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    hub.add_folder("tester/tiny-clip", base)
    Model.from_base("tester/tiny-clip", ["cat", "dog"]).push_to_hub("tester/animals")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, tmp_path / "me" / "here")  # a folder that a Hub id would mean too
    shutil.copytree(base, tmp_path / "here")
    return hub


@pytest.mark.parametrize(
    "name",
    [
        "BASE", "file://BASE", "../here", "me/../here", "./here", "here", "me/here", "~/model", "~", "..", "/",
        "C:\\here", "\\\\host\\share", "https://example.org/model", "//example.org/model", "hf://me/model", "a/b/c",
        "me/x?y", "", "me/x\n", "me/x\0",
    ],
)  # fmt: skip
def test_the_base_of_a_download_is_a_plain_id(name: str, pushed: HubServer, base: str) -> None:
    _renamed(pushed, base_model_name_or_path=name.replace("BASE", base))
    with pytest.raises((BaseModelError, ArtifactError)):
        Model.from_pretrained("tester/animals")
    if "\0" not in name:  # which is refused whatever is given instead
        assert Model.from_pretrained("tester/animals", base_model="tester/tiny-clip").class_names == ["cat", "dog"]


@pytest.mark.parametrize("key", ["base_model_revision", "base_model_subfolder"])
@pytest.mark.parametrize("value", ["../..", "/etc", "a/../../b", "~/x", "..\\x", "a?b=c", "x\n"])
def test_what_a_download_names_stays_in_its_repository(key: str, value: str, pushed: HubServer) -> None:
    _renamed(pushed, **{key: value})
    with pytest.raises(ArtifactError, match="leads out of the repository"):
        Model.from_pretrained("tester/animals")


def test_a_table_that_names_files_elsewhere_says_so_and_reads_pictures_only(tmp_path: Path) -> None:
    for name in ("in/1.png", "out/2.png"):
        (tmp_path / name).parent.mkdir()
        PIL.Image.new("RGB", (9, 9), (len(name), 9, 9)).save(tmp_path / name)
    table = tmp_path / "in" / "labels.csv"
    table.write_text("file,label\n1.png,cat\n../out/2.png,dog\n")
    notes = "\n".join(load_training_data(str(table)).account.lines())
    assert "lie outside of" in notes
    assert "1 of 2, such as ../out/2.png" in notes
    table.write_text(f"file,label\n1.png,cat\n{tmp_path}/in/1.png,cat\n")
    assert "outside" not in "\n".join(load_training_data(str(table)).account.lines())
    table.write_text("file,label\n1.png,cat\n/etc/passwd,dog\n")
    data = load_training_data(str(table))
    with pytest.raises(TaskResError, match="damaged or not a picture"):
        data.train.image(1)


# ---------------------------------------------------------------------- text that leaves the library

HOSTILE = [
    "\x1b]0;owned\x07cat", "=1+1", "<img src=x onerror=alert(1)>", "[click](javascript:alert(1))", "a|b",
    "\u202egnp.exe", "```\n# big", "@SUM(A1)",
]  # fmt: skip


def _hostile(kind: str) -> Callable[[str], bool]:
    """Whether text would be obeyed by a terminal, a spreadsheet or a page."""
    if kind == "terminal":
        return lambda text: bool(set(text) & set("\x1b\x07\x9b\u202e"))
    if kind == "spreadsheet":
        return lambda text: text.startswith(("=", "@", "+", "-", "\t", "\r"))
    return lambda text: "<img" in text or "\n# big" in text or "[click](javascript" in text


def test_class_names_are_shown_and_never_obeyed(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    folder = tmp_path / "saved"
    Model.from_base(base, HOSTILE).save_pretrained(folder)
    pictures = tmp_path / "<img src=x>"
    pictures.mkdir()
    for number, name in enumerate(("=2+2.png", "\x1b[31mred.png")):
        PIL.Image.new("RGB", (9, 9), (9, 9, number)).save(pictures / name)
    options = ("--top-k", len(HOSTILE))
    for arguments in (("info", folder), ("info", folder, "--json"), ("predict", folder, pictures, *options)):
        code, out, err = run(capsys, *arguments)
        assert code == 0
        assert not _hostile("terminal")(out + err)
        assert "owned" in out
    run(capsys, "predict", folder, pictures, *options, "--output", tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as stream:
        cells = [cell for row in csv.reader(stream) for cell in row]
    assert not any(map(_hostile("spreadsheet"), cells))
    assert not any(map(_hostile("terminal"), cells))
    assert "'=1+1" in cells


def test_a_card_shows_what_a_loaded_config_says_and_obeys_nothing(trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    text = " ".join(HOSTILE)
    config["id2label"] = {str(number): name for number, name in enumerate(HOSTILE)}
    config |= {"templates": [f"{text} {{}}."], "base_model_name_or_path": f"/x/{text.replace('/', '')}"}
    for key in ("training", "few_shot", "library_versions", "data"):
        config[key] = {**(config.get(key) or {}), "method": text, "recipe": text, "shots": text, text: text, "id": text}
    card = model_card(config)
    body = card.split("---", 2)[2]
    assert not _hostile("terminal")(body)
    prose = "".join(part for number, part in enumerate(body.split("`")) if number % 2 == 0 or "\n" in part)
    assert not _hostile("page")(prose)
    assert "alert(1)" in prose
    assert card.count("\n---\n") == 1
