"""The Hub is a local server, every cache a temporary folder: nothing leaves the machine, nothing stays on it."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

_SERVER = HubServer()
_SERVER.start()
_HOME = tempfile.TemporaryDirectory(prefix="taskres-tests-")
# huggingface_hub reads these when it is imported.
os.environ.update(
    HF_ENDPOINT=_SERVER.url,
    HF_HOME=f"{_HOME.name}/hf",
    HF_TOKEN=_SERVER.token,
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TASKRES_CACHE=f"{_HOME.name}/taskres",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # of processes that tests start; of this one, below
    PYTHONWARNINGS="ignore::DeprecationWarning",
)

# A shell ignores Ctrl-C for what it starts in the background, and whatever is started from there inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch  # noqa: E402

torch.set_num_threads(1)

from support import TASK  # noqa: E402

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments  # noqa: E402
from taskres_hf.demo import demo_dataset, demo_model, demo_tasks  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests that embed as on several cores leave them to torch, where every later test would compete for them."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """The Hub's stand-in, empty; what could not be uploaded is kept in a temporary folder of the tests."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
    _SERVER.reset()
    yield _SERVER
    _SERVER.over.set()
    _SERVER.reset()


@pytest.fixture(scope="session")
def base() -> str:
    """Folder of the shipped checkpoint."""
    return demo_model()


@pytest.fixture(scope="session")
def splits() -> Any:
    """A real task: 8 classes, 179 training and 159 test pictures."""
    return demo_dataset(TASK)


@pytest.fixture(scope="session")
def spec() -> dict[str, Any]:
    return demo_tasks()[TASK]


@pytest.fixture(scope="session")
def photo_folder() -> Path:
    """Folder of the photographs, which are no part of the project; tests of them are skipped where they are not."""
    from benchmarks.photos import missing, photo_root

    if reason := missing():
        pytest.skip(reason)
    return photo_root()


@pytest.fixture
def model(base: str, spec: dict[str, Any]) -> TaskResCLIPForImageClassification:
    """A zero-shot classifier for that task."""
    return TaskResCLIPForImageClassification.from_base(base, spec["classes"], spec["template"])


@pytest.fixture(scope="session")
def trained(base: str, spec: dict[str, Any], splits: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained, evaluated and saved classifier; do not change it."""
    folder = tmp_path_factory.mktemp("trained") / "artifact"
    model = TaskResCLIPForImageClassification.from_base(base, spec["classes"], spec["template"])
    arguments = TaskResTrainingArguments(shots=4, seed=1, on_short="ignore", dataset_name=TASK, disable_tqdm=True)
    trainer = TaskResTrainer(model, arguments, splits["train"], splits["test"])
    trainer.train()
    trainer.evaluate()
    trainer.save_model(folder)
    return folder


@pytest.fixture(scope="session")
def pixel_values(base: str, splits: Any) -> torch.Tensor:
    """Eight real pictures, prepared."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(base, backend="pil")
    return processor(images=[splits["test"][i]["image"] for i in range(8)], return_tensors="pt")["pixel_values"]
