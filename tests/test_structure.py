"""The order of layers: data flows one way, and a module imports only from those before it."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "taskres_hf"
# From the first to the last; a wing (a folder) may import what stands before it, and its own files in its order.
ORDER = [
    "_version", "errors", "tables", "registration", "storage", "machine", "prompts", "residual", "evaluation",
    "schema", "artifact", "description", "openclip",
    "encoders", "base_model", "base_classifier", "configuration_taskres", "card", "hub", "notebook", "serving",
    "rejection", "classes.rows", "classes.merging", "classes.changing", "classes", "modeling_taskres",
    "alone.labels", "alone.linear_head", "alone.towers", "alone", "vision.tower", "vision.modeling", "vision",
    "language.encoding", "language.tower", "language.modeling", "language", "pictures", "picture_files",
    "data.reading", "data.listing", "data.labelled", "data.stratified", "data.multi_label", "data.folders",
    "data.tables", "data.sources", "data.texts", "data.training_data", "data", "few_shot",
    "embedding.stored", "embedding.preprocessing", "embedding.engines.onednn", "embedding.engines.rewriting",
    "embedding.engines.devices", "embedding.engines.choose", "embedding.engines.proving", "embedding.engines",
    "embedding.workers", "embedding.embedder", "embedding.cache", "embedding.texts", "embedding.features",
    "embedding",
    "training.arguments", "training.recipes", "training.enhanced_base", "training.minimising", "training.whitened",
    "training.beside_head", "training.multi_label", "training.measuring", "training.shots", "training.strength",
    "training.steps", "training.callbacks", "training.run", "training.evaluating", "training.trainer",
    "training.new_classes", "training",
    "methods.inputs", "methods.method", "methods.selection", "methods.towers", "methods.tip_adapter", "methods.ape",
    "methods.clap", "methods.class_mean", "methods.clip_adapter", "methods.clip_lora", "methods.coop",
    "methods.cross_modal", "methods.gda", "methods.linear_probe", "methods.lp_plus_plus", "methods.proker",
    "methods.prolip", "methods.taskres", "methods.zero_shot", "methods.saving", "methods.all", "methods",
    "prediction_files", "predicting", "demo", "checking.signing", "checking.verifying", "checking",
    "paper.datasets", "paper.cells", "paper.reports", "paper.runner", "paper.tasks", "paper.memory",
    "paper.figures", "paper.comparison", "paper.compare", "paper.checkpoints", "paper",
    "analysis.magnitude", "analysis.showing", "analysis.analyzing", "analysis.difficulty", "analysis.transfer",
    "analysis.learned", "analysis.learning_curve", "analysis.planning", "analysis.labelling", "analysis.suggesting",
    "analysis",
    "report.gathering", "report.findings", "report.figures", "report.thumbnails", "report.learning", "report.page",
    "report",
    "export.fused", "export.formats", "export.web", "export.exporting", "export",
    "pool.naming", "pool.stacked", "pool.answering", "pool.bases", "pool.packing", "pool.classifiers", "pool",
    "cluster.inputs", "cluster.outputs", "cluster.workers", "cluster.running", "cluster",
    "service.settings", "service.batching", "service.classifiers", "service.uploads", "service.observing",
    "service.app", "service.running", "service",
    "features", "suite", "benchmarking", "importing",
    "app.looking", "app.session", "app.registry", "app.showing", "app.layout", "app",
    "cli.screen", "cli.values", "cli.run_config", "cli.options", "cli.texts", "cli.report", "cli.train", "cli.plan",
    "cli.compare", "cli.analyze", "cli.difficulty", "cli.engines", "cli.evaluate", "cli.pack", "cli.embed",
    "cli.predict", "cli.suggest", "cli.serve", "cli.share", "cli.classes", "cli.check", "cli.export", "cli.paper",
    "cli.demo", "cli.browser", "cli.app", "cli",
    "cli.__main__", "__main__", "__init__",
]  # fmt: skip
_LONGEST_FILE = 500
_LONGEST_FUNCTION = 60  # lines, the docstring not counted
# The parameters of a command are its options, a line each, and those of `from_base` are what a user may say.
_LONG_FUNCTIONS = {
    "cli.train.train", "cli.embed.embed", "cli.predict.predict", "modeling_taskres.from_base",
    "language.modeling.from_base",
}  # fmt: skip
# Relative imports per file, on average: at the top of files, and with those inside functions, which only defer them.
_MOST_IMPORTS = {"core": (2.49, 2.67), "package": (4.11, 5.14)}
# What the reference of 0.1 named and where it is now; imports of the old names keep working.
_MOVED = ("features", "suite", "benchmarking", "importing")
_OLD_NAMES = {
    "features": {"embedding.features": ["ImageFeatures", "embed_images"], "embedding.stored": ["StoredFeatures"]},
    "suite": {"paper.datasets": ["suite_datasets", "open_dataset"]},
    "benchmarking": {"paper.runner": ["run_benchmark"], "paper.reports": ["write_reports", "published_results"]},
    "importing": {"paper.checkpoints": ["import_checkpoint", "read_checkpoint"]},
    "demo": {"demo": ["demo_model", "demo_tasks", "demo_dataset"]},
    "prompts": {"prompts": ["named_templates"]},
}


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


# The files in remote/ are copied beside artifacts and exports, and import nothing of the package.
FILES = {_module(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "remote"}


def _imports(module: str, path: Path) -> set[str]:
    """Modules of the package that are imported when this one is."""
    found = set()
    here = module.split(".") if path.name == "__init__.py" and module != "__init__" else module.split(".")[:-1]
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            start = here[: len(here) - node.level + 1]
            name = ".".join([*start, *(node.module or "").split(".")]).strip(".")
            inner = {".".join([name, alias.name]).strip(".") for alias in node.names}
            found |= inner & set(FILES) or {name}
    return found


def test_no_test_imports_the_conftest() -> None:
    """pytest loads it under another name: a second copy would start a second Hub, and tests would speak to both."""
    files = Path(__file__).parent.rglob("*.py")
    pattern = re.compile(r"^\s*(?:from|import) (?:tests\.)?conftest\b", re.MULTILINE)
    assert not [file.name for file in files if pattern.search(file.read_text())]


def test_every_module_has_its_place() -> None:
    assert sorted(ORDER) == sorted(FILES)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_those_before_it(module: str) -> None:
    if module in FILES:
        later = {name for name in _imports(module, FILES[module]) if ORDER.index(name) >= ORDER.index(module)}
        assert not later


def _count(path: Path, everywhere: bool) -> int:
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else tree.body
    return sum(isinstance(node, ast.ImportFrom) and node.level > 0 for node in nodes)


@pytest.mark.parametrize("which", _MOST_IMPORTS)
def test_files_need_few_others(which: str) -> None:
    flat = [module for module, path in FILES.items() if path.parent == PACKAGE and not module.startswith("__")]
    core = [module for module in flat if module not in _MOVED]
    paths = [FILES[module] for module in (core if which == "core" else FILES)]
    averages = [sum(_count(path, everywhere) for path in paths) / len(paths) for everywhere in (False, True)]
    assert all(found <= most for found, most in zip(averages, _MOST_IMPORTS[which], strict=True)), averages


@pytest.mark.parametrize("module", ORDER)
def test_no_file_is_longer_than_one_sitting(module: str) -> None:
    assert module not in FILES or len(FILES[module].read_text().splitlines()) <= _LONGEST_FILE


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    docstring = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(function) else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def test_no_function_is_longer_than_a_screen() -> None:
    longer = {
        f"{module}.{node.name}"
        for module, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and _length(node) > _LONGEST_FUNCTION
    }
    assert longer <= _LONG_FUNCTIONS


@pytest.mark.parametrize("old", _OLD_NAMES)
def test_imports_of_old_names_keep_working(old: str) -> None:
    module = import_module(f"taskres_hf.{old}")
    for home, names in _OLD_NAMES[old].items():
        for name in names:
            assert getattr(module, name) is getattr(import_module(f"taskres_hf.{home}"), name)
