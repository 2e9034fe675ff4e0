"""The options that the commands of `taskres` take: one place each, with its help, its choices and its heading."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT_BASE = "openai/clip-vit-base-patch16"
BASE_VARIABLE = "TASKRES_BASE_MODEL"

DATA = "Dataset"
PROMPTS = "Class names and prompts"
MODEL = "Base model"
TRAINING = "Training"
SPEED = "Speed and device"
OUTPUT = "Output"


class Choice(str, Enum):
    """One of a few words: completed by the shell, refused when mistyped."""

    def __str__(self) -> str:
        return str(self.value)


class Recipe(Choice):
    AUTO = "auto"
    AUTO_V1 = "auto-v1"
    PAPER = "paper"


class EngineName(Choice):
    AUTO = "auto"
    TORCH = "torch"
    OPENVINO = "openvino"
    ONNXRUNTIME = "onnxruntime"


class WhichFolder(Choice):
    FIRST = "first"
    LAST = "last"


class PrecisionName(Choice):
    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"


class DtypeName(Choice):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class ShortClass(Choice):
    WARN = "warn"
    RAISE = "raise"
    IGNORE = "ignore"


class BrokenPicture(Choice):
    RAISE = "raise"
    SKIP = "skip"


class Average(Choice):
    RAW = "raw"
    NORMALIZED = "normalized"


class Side(Choice):
    TEXT = "text"
    IMAGE = "image"


class RowsOf(Choice):
    HEAD = "head"
    CLASS_MEANS = "class_means"
    CLASS_NAMES = "class_names"


class Underscores(Choice):
    REPLACE = "replace"
    KEEP = "keep"


class CropName(Choice):
    PROCESSOR = "processor"
    TORCHVISION = "torchvision"


def default_base_model() -> str:
    """What `--base-model` is when nobody says: `$TASKRES_BASE_MODEL`, else a public CLIP."""
    return os.environ.get(BASE_VARIABLE) or DEFAULT_BASE


def _devices() -> list[str]:
    return ["auto", "cpu", "cuda", "cuda:0", "mps"]


def _template_sets() -> list[str]:
    from ..prompts import named_templates

    return sorted(named_templates())


# ---------------------------------------------------------------------------------------------------- every command

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of tables.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.", rich_help_panel=OUTPUT)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=OUTPUT)]
Artifact = Annotated[str, typer.Argument(help="Folder or Hub id of a trained classifier.", show_default=False)]
Strength = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=1.0, metavar="S", rich_help_panel=MODEL, show_default=False,
        help="From 0 (zero-shot) to 1 (as trained); default: as saved.",
    ),
]  # fmt: skip
Rejecting = Annotated[
    bool,
    typer.Option(
        "--reject", help="Call pictures of no class unknown, by the threshold of `train --reject`.",
        rich_help_panel=MODEL,
    ),
]  # fmt: skip
UnknownLabel = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Label of rejected pictures; 'unknown' by default.", rich_help_panel=MODEL),
]
Revision = Annotated[
    str | None, typer.Option(metavar="REV", help="Branch, tag or commit of the classifier.", rich_help_panel=MODEL)
]

# ---------------------------------------------------------------------------------------------------- data

DATA_HELP = (
    "A folder of pictures (class/file.jpg, with or without train/ and test/ above), a table of paths and labels "
    "(.csv, .tsv, .jsonl, .parquet), a folder of train.parquet and test.parquet, or a Hub dataset id. Over a base of "
    "texts: a table of texts and labels."
)
DatasetArgument = Annotated[str | None, typer.Argument(metavar="DATASET", help=DATA_HELP, show_default=False)]
DatasetOption = Annotated[
    str | None, typer.Option("--dataset", hidden=True, help="The same as DATASET.", rich_help_panel=DATA)
]
ConfigName = Annotated[
    str | None,
    typer.Option("--dataset-config", metavar="NAME", help="Configuration of a Hub dataset.", rich_help_panel=DATA),
]
DatasetRevision = Annotated[
    str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a Hub dataset.", rich_help_panel=DATA)
]
ImageColumn = Annotated[
    str | None, typer.Option(metavar="NAME", help="Column of pictures; recognised by itself.", rich_help_panel=DATA)
]
LabelColumn = Annotated[
    str | None, typer.Option(metavar="NAME", help="Column of labels; recognised by itself.", rich_help_panel=DATA)
]
MultiLabel = Annotated[
    bool, typer.Option("--multi-label", help="Pictures have several labels each, or none.", rich_help_panel=DATA)
]
LabelSeparator = Annotated[
    str | None,
    typer.Option(
        metavar="MARK", help="Between several labels in a cell: | ; or , (recognised by itself).", rich_help_panel=DATA
    ),
]
LabelColumns = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES", help="Columns of 0 and 1, one per class: a comma list, or 'auto'.", rich_help_panel=DATA
    ),
]
ClassFolder = Annotated[
    WhichFolder | None,
    typer.Option(help="Which of nested folders is the class: the first, or that of the picture.", rich_help_panel=DATA),
]
LabelMap = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="JSON file {dataset name: model name}, or 'position' to match by number.",
        rich_help_panel=DATA,
    ),
]
DropUnlabelled = Annotated[
    bool, typer.Option("--drop-unlabelled", help="Leave out rows without a label.", rich_help_panel=DATA)
]
OnError = Annotated[
    BrokenPicture, typer.Option(help="Unreadable pictures: name them all and stop, or skip.", rich_help_panel=DATA)
]
TrainSplit = Annotated[
    str | None, typer.Option(metavar="NAME", help="Split to learn from; 'train'.", rich_help_panel=DATA)
]
EvalSplit = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Split to measure on: test, else validation. 'none': cross-validate instead.",
        rich_help_panel=DATA,
    ),
]
Holdout = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Keep this share of every class, such as 0.2, out of training and measure on it.",
        rich_help_panel=DATA,
    ),
]
Folds = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        help="Folds of the cross-validation that measures where no split is held out; 0 measures nothing.",
        rich_help_panel=DATA,
    ),
]
Indices = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Replay a draw: JSON list of rows, or a trained folder.", rich_help_panel=DATA),
]
OnShort = Annotated[ShortClass, typer.Option(help="A class with too few pictures.", rich_help_panel=DATA)]
Split = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Split to measure on: test, else validation, else the only one."),
]
IncludeTrainPictures = Annotated[
    bool,
    typer.Option(
        "--include-train-pictures",
        help="Also measure on pictures it was trained on; they are left out otherwise.",
        rich_help_panel=DATA,
    ),
]

# ---------------------------------------------------------------------------------------------------- the first eight

OutputDir = Annotated[
    Path | None,
    typer.Option("--output-dir", "-o", metavar="FOLDER", help="Folder to write; <dataset>-taskres by default."),
]
TrainBase = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        metavar="MODEL",
        show_default=False,
        help=f"Hub id or folder of a CLIP-like model, or 'shipped' for the small one in this package. "
        f"Default: ${BASE_VARIABLE}, else {DEFAULT_BASE}. A model of images alone will do too, "
        "and one of texts for texts.",
    ),
]
Shots = Annotated[int | None, typer.Option(min=1, metavar="N", help="Pictures per class to draw; all by default.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of the draw and of training.")]
Templates = Annotated[
    list[str] | None,
    typer.Option(
        "--template",
        metavar="TEXT",
        autocompletion=_template_sets,
        help="Prompt with {} for the class name, or a named set such as 'imagenet'. Repeat for an ensemble.",
    ),
]
ClassNames = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Class names in label order: .txt with one a line, .json (list, id2label, label2id), or a comma list.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", autocompletion=_devices, help="cpu, cuda, cuda:1, mps; the fastest by default."),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Settings of a run as YAML, such as the run.yaml beside a classifier; options given here win.",
    ),
]

# ---------------------------------------------------------------------------------------------------- prompts

Descriptions = Annotated[
    Path | None,
    typer.Option(
        "--descriptions",
        metavar="FILE",
        help="JSON file {class: sentence or list of sentences}, used as prompts.",
        rich_help_panel=PROMPTS,
    ),
]
PromptNames = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="JSON file {class: what prompts call it}.", rich_help_panel=PROMPTS),
]
PromptAverage = Annotated[
    Average, typer.Option(help="Average of a class's prompts; raw is as published.", rich_help_panel=PROMPTS)
]
UnderscoresOption = Annotated[
    Underscores,
    typer.Option(help="'tabby_cat' in prompts: 'tabby cat', or kept as published.", rich_help_panel=PROMPTS),
]
KeepUnderscores = Annotated[bool, typer.Option("--keep-underscores", hidden=True)]

# ---------------------------------------------------------------------------------------------------- base model

BaseModel = Annotated[
    str | None,
    typer.Option("--base-model", metavar="MODEL", help="Load the base from here instead.", rich_help_panel=MODEL),
]
FromClassifier = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="MODEL",
        show_default=False,
        help="Go on from a classifier, with its classes, prompts and base; see docs/classes.md.",
        rich_help_panel=MODEL,
    ),
]
BaseRevision = Annotated[
    str | None, typer.Option(metavar="REV", help="Branch, tag or commit of the base.", rich_help_panel=MODEL)
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the base run its own code.", rich_help_panel=MODEL)
]
Dtype = Annotated[
    DtypeName | None, typer.Option(help="Number type of the base; float32 by default.", rich_help_panel=MODEL)
]
Alpha = Annotated[float, typer.Option(metavar="X", help="Scale of the residual.", rich_help_panel=MODEL)]
BaseClassifier = Annotated[
    RowsOf | None,
    typer.Option(
        help="Over a model of pictures or of texts alone: its 'head', 'class_means', or of texts 'class_names'. "
        "Default: the head if it knows every class.",
        rich_help_panel=MODEL,
    ),
]
ResidualSide = Annotated[Side, typer.Option(help="What the residual is added to.", rich_help_panel=MODEL)]

# ---------------------------------------------------------------------------------------------------- training

RecipeOption = Annotated[
    Recipe,
    typer.Option(
        metavar="NAME",
        help="auto (fits at once, nothing to set), auto-v1 (by epochs) or paper (as published).",
        rich_help_panel=TRAINING,
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(
        "--epochs",
        "--num-train-epochs",
        min=1,
        metavar="N",
        rich_help_panel=TRAINING,
        help="Override the recipe; makes auto auto-v1.",
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        "--learning-rate",
        "--lr",
        metavar="X",
        help="Override the recipe; makes auto auto-v1.",
        rich_help_panel=TRAINING,
    ),
]
Views = Annotated[
    int, typer.Option(min=0, metavar="N", help="Augmented views cached per picture.", rich_help_panel=TRAINING)
]
AugmentOnline = Annotated[
    bool | None,
    typer.Option(
        "--augment-online",
        help="Augment afresh each epoch; recipe paper does by itself.",
        rich_help_panel=TRAINING,
    ),
]
EnhancedBase = Annotated[
    bool, typer.Option("--enhanced-base", help="Tune the text projection first (TaskRes*).", rich_help_panel=TRAINING)
]
Patience = Annotated[
    int | None,
    typer.Option(
        "--early-stopping-patience",
        min=1,
        metavar="N",
        help="Stop after N epochs without gain on a validation split or a hold-out.",
        rich_help_panel=TRAINING,
    ),
]
Reject = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Choose when a picture is of no class: reject at most this share, such as 0.05, of those that are.",
        rich_help_panel=TRAINING,
    ),
]
SaveEpochs = Annotated[
    int, typer.Option(min=0, metavar="N", help="Checkpoint every N epochs; 0: none.", rich_help_panel=TRAINING)
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.", rich_help_panel=TRAINING)]
ReportTo = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Tracker, such as tensorboard or wandb; repeatable.", rich_help_panel=TRAINING),
]

# ---------------------------------------------------------------------------------------------------- speed and device

Cpu = Annotated[bool, typer.Option("--cpu", hidden=True, help="The same as --device cpu.")]
Engine = Annotated[
    EngineName,
    typer.Option(
        metavar="ENGINE",
        help="What runs the frozen image tower: auto, torch, openvino or onnxruntime.",
        rich_help_panel=SPEED,
    ),
]
Precision = Annotated[PrecisionName, typer.Option(help="Numbers it computes with.", rich_help_panel=SPEED)]
Crop = Annotated[
    CropName | None,
    typer.Option(
        help="Whose centre crop to follow where they differ by a pixel: the model's own image processor's, or "
        "torchvision's, as the published code.",
        rich_help_panel=SPEED,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        metavar="N",
        help="Pictures a forward pass; the engine's best by default.",
        rich_help_panel=SPEED,
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Cached embeddings; $TASKRES_CACHE by default.", rich_help_panel=SPEED),
]

# ---------------------------------------------------------------------------------------------------- output

Fp16Residual = Annotated[bool, typer.Option("--fp16-residual", help="Half the file.", rich_help_panel=OUTPUT)]
IncludeCode = Annotated[
    bool,
    typer.Option("--include-code", help="Add the module trust_remote_code needs.", rich_help_panel=OUTPUT),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a classifier in the output folder.", rich_help_panel=OUTPUT)
]
PushTo = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="REPO", help="Upload it there afterwards.", rich_help_panel=OUTPUT),
]
Private = Annotated[bool, typer.Option("--private", help="Make that repository private.", rich_help_panel=OUTPUT)]
Report = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Also write a report as one HTML page.", rich_help_panel=OUTPUT),
]


def measuring_arguments(
    context: typer.Context, device: str | None, label_map: str | None, quiet: bool, **others: Any
) -> Any:
    """The options of a command that embeds and measures, for the trainer; torch's device is chosen on the way.

    Args:
        device: checked, see `values.check_device`. others: settings that the command decides by itself.
    """
    from ..training import TaskResTrainingArguments
    from .run_config import read_run, training_only
    from .values import read_label_map, use_device

    use_device(device)
    values = training_only(read_run(context, None)) | {"label_map": read_label_map(label_map), **others}
    values |= {"use_cpu": device == "cpu", "disable_tqdm": quiet}
    return TaskResTrainingArguments(**{name: value for name, value in values.items() if value is not None})
