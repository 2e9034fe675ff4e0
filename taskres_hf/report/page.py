"""The report: one HTML page about a classifier that needs nothing beside it, neither files nor a network."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..description import measured_on
from ..errors import ConfigurationError
from ..residual import MULTI_LABEL
from ..storage import check_can_write, write_bytes
from ..tables import percent, visible
from . import figures, findings
from .gathering import Evidence, Measured, Pictures, Subject, gather, read_subject
from .learning import Learning
from .thumbnails import Thumbnails

if TYPE_CHECKING:
    from ..modeling_taskres import TaskResCLIPForImageClassification
    from ..training import TaskResTrainingArguments

_MOST_CELLS = 20  # classes up to which the whole matrix of confusions is shown
_MOST_PAIRS = 40  # of classes, where there are more
_MOST_ROWS = 400  # of a table of classes
_MOST_PICTURES = 24  # of a list of pictures
_MOST_MATRIX = 40  # classes up to which the matrix is drawn as a figure
Row = dict[str, Any]


def write_report(
    model: TaskResCLIPForImageClassification | str | os.PathLike[str],
    output: str | os.PathLike[str] = "report.html",
    dataset: Any = None,
    *,
    split: str | None = None,
    folds: int = 5,
    thumbnails: int = 8,
    figures_dir: str | os.PathLike[str] | None = None,
    args: TaskResTrainingArguments | None = None,
    revision: str | None = None,
    base_model: Any = None,
    strength: float | None = None,
    name: str | None = None,
    dataset_revision: str | None = None,
    words: Sequence[str] | None = None,
    **data_options: Any,
) -> dict[str, Any]:
    """Write one HTML page that shows what a classifier does, for people who have never seen it.

    Accuracy beside zero-shot, gain and loss per class, confusions with their pictures, calibration, mistakes, labels
    that are likely wrong, pictures that lie in several splits, what it learned beyond the text of its classes, how it
    was trained and how to use it. Every number is of pictures that the classifier which answered was not trained on.
    The page loads nothing and runs nothing.

    Args:
        model: folder or Hub id of a classifier, or the model itself.
        output: the .html file to write.
        dataset: labelled pictures, as for `load_evaluation_data`, or what `load_training_data` gave. Without them the
            page tells what the artifact records.
        split: the split to measure on; by default test, else validation, else the only one.
        folds: of the cross-validation on the training pictures (at least 2), 0 for none.
        thumbnails: most pictures shown of each confusion; 0 shows no picture anywhere.
        figures_dir: also write the figures there, as PNG and SVG.
        args: how to read and embed pictures; what it says of training does not count. By default unreadable pictures
            are listed.
        revision: branch, tag or commit of the artifact. base_model: another place to load the base from. strength:
            from 0 (zero-shot) to 1 (as trained), instead of the stored one. All three for a `model` that is loaded.
        name: what the page calls the classifier, and its snippets load; by default the folder or Hub id.
        dataset_revision: branch, tag or commit of a Hub dataset.
        words: to tell what was learned in; by default colours, shapes, materials and the like, an empty list for none.
        **data_options: `config_name`, `image_column` and so on, of `load_evaluation_data`.

    Returns:
        For machines: `output`, `bytes`, `figures` (files), `metrics` (shown first) and what they were `measured_on`,
        `cross_validated`, `label_issues`, `equal_pictures`, `unreadable`, `learned`, `notes`.

    Raises:
        ConfigurationError: `output` is no .html file, a number is out of range, or the classifier gives several labels
            per picture. ArtifactError: the artifact is damaged or the output cannot be written. DataError: the dataset
            cannot be read or has other classes.
        MissingExtraError: matplotlib is not installed.
    """
    output, folder = Path(output), None if figures_dir is None else Path(figures_dir)
    check_report_output(output, folder)
    if min(folds, thumbnails) < 0 or folds == 1:
        raise ConfigurationError(
            f"`folds` must be 0 or at least 2 and `thumbnails` at least 0; got {folds} and {thumbnails}."
        )
    subject = read_subject(
        model, dataset is not None, name, revision=revision, base_model=base_model, strength=strength
    )
    check_reportable(subject.config)
    evidence = Evidence(notes=list(subject.notes))
    if dataset is not None and subject.model is not None:
        options = {"revision": dataset_revision, **data_options}
        found = gather(subject.model, dataset, args, split=split, folds=folds, **options)
        found.notes[:0] = evidence.notes
        evidence = found
    writer = _Page(subject, evidence, thumbnails, dataset is not None, words)
    content = writer.html().encode("utf-8", "backslashreplace")
    files = [] if folder is None else writer.write_figures(folder)
    write_bytes(output, content)
    return writer.facts() | {"output": str(output), "bytes": len(content), "figures": [str(file) for file in files]}


def check_reportable(config: Mapping[str, Any]) -> None:
    """Refuse a classifier that the page cannot show.

    Raises:
        ConfigurationError: it gives several labels per picture.
    """
    if config.get("problem_type") == MULTI_LABEL:
        raise ConfigurationError(
            "The report is for classifiers that give each picture one label; this one gives several, or none "
            f"(problem_type '{MULTI_LABEL}'). `taskres evaluate` measures it, with mAP and F1 of each class."
        )


def check_report_output(output: Path, figures_dir: Path | None = None) -> None:
    """Refuse, before any work, what a report cannot be written to.

    Raises:
        ConfigurationError: no .html file, or a folder where a file must be. ArtifactError: a folder that cannot be
            written. MissingExtraError: matplotlib is not installed.
    """
    figures.check_can_draw()
    if output.suffix.lower() not in (".html", ".htm"):
        raise ConfigurationError(f"A report is an HTML page: end its name in .html; got {output}.")
    if output.is_dir():
        raise ConfigurationError(f"{output} is a folder: give the name of a file to write.")
    if figures_dir is not None and figures_dir.exists() and not figures_dir.is_dir():
        raise ConfigurationError(f"{figures_dir} is a file: figures need a folder.")
    for folder in (output.absolute().parent, figures_dir):
        if folder is not None:
            check_can_write(folder)


# ---------------------------------------------------------------------- the page


class _Page:
    """What the template shows, piece by piece."""

    def __init__(
        self, subject: Subject, evidence: Evidence, per_cell: int, with_data: bool, words: Sequence[str] | None = None
    ) -> None:
        self.subject, self.evidence, self.per_cell, self.with_data = subject, evidence, per_cell, with_data
        self.measured: Measured | None = evidence.held_out or evidence.cross_validated
        recorded = subject.config.get("metrics") or {}
        self.metrics: Mapping[str, Any] = self.measured.metrics if self.measured else recorded
        names = {int(index): label for index, label in subject.config["id2label"].items()}
        self.class_names = [names[index] for index in sorted(names)]
        self.thumbnails = Thumbnails()
        self.learning = Learning(subject, self.class_names, self.measured, words)
        evidence.notes += self.learning.notes
        self.equal = findings.equal_pictures(evidence.splits)
        self.issues = self._issues()
        self.calibrations = (
            findings.calibrations(self.measured, subject.config.get("training")) if self.measured else []
        )

    def html(self) -> str:
        """The page."""
        import jinja2
        from markupsafe import Markup

        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("taskres_hf.report", "templates"), autoescape=True, trim_blocks=True,
            lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=_shown,
        )  # fmt: skip
        environment.filters |= {"percent": _percent, "points": _points, "code": _code, "word": _word}
        # The lists of pictures come first: where the bound on thumbnails is met, confusions go without.
        mistakes, uncertain = self._list("confident_mistakes"), self._list("least_certain")
        issues, equal = self._issue_pictures(), self._equal_pictures()
        learned, pairs = self.learning.classes(self._pictures), self.learning.pairs(self._pictures)
        confusions, drawn = self._confusions(), self._drawn("svg")
        return environment.get_template("page.html").render(
            subject=self.subject, evidence=self.evidence, with_data=self.with_data, metrics=self.metrics,
            measured_on=self._measured_on(), overall=self._overall(), classes=self.class_names,
            rows=findings.class_rows(self.metrics)[:_MOST_ROWS], mistakes=mistakes, uncertain=uncertain,
            issues=issues, issue_count=len(self.issues or ()), judged=self.issues is not None, equal=equal,
            equal_count=len(self.equal), confusions=confusions, calibrations=self.calibrations,
            learning=self.learning, learned=learned, pairs=pairs, apart=self.learning.turned_apart(),
            most_rows=_MOST_ROWS,
            origin=self._origin(), attention=self._attention(),
            figures={name: Markup(_inline(image, name)) for name, image in drawn.items()},
            versus=findings.paired(self.measured) if self.measured else None,
            linked={(cell["label"], cell["predicted"]) for cell in confusions["cells"] if cell["pictures"]}
            if confusions else set(),
            left_out=self.thumbnails.left_out,
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """The same for machines."""
        crossed, names = self.evidence.cross_validated, self.class_names
        issues = [
            {
                "split": measured.metrics["split"], "file": self._name(measured, row["row"]),
                "label": names[row["label"]], "suggested": names[row["suggested"]], "quality": float(row["quality"]),
            }
            for measured, row in self.issues or ()
        ]  # fmt: skip
        equal = [
            [{"split": (it := self.evidence.splits[number]).split, "file": it.name(place)} for number, place in group]
            for group in self.equal
        ]
        unreadable = [{"split": split, "file": file} for split, file in self.evidence.unreadable]
        return {
            "metrics": dict(self.metrics) or None, "measured_on": self._measured_on(),
            "cross_validated": dict(crossed.metrics) if crossed else None,
            "label_issues": issues if self.issues is not None else None, "equal_pictures": equal,
            "unreadable": unreadable, "learned": self.learning.facts(), "notes": self.evidence.notes,
        }  # fmt: skip

    def write_figures(self, folder: Path) -> list[Path]:
        """Each figure as PNG and SVG."""
        files = []
        for kind in ("png", "svg"):
            for name, content in self._drawn(kind).items():
                write_bytes(folder / f"{name}.{kind}", content)
                files.append(folder / f"{name}.{kind}")
        return files

    def _drawn(self, kind: str) -> dict[str, bytes]:
        drawn = {}
        if self.metrics.get("per_class"):
            drawn["accuracy"] = figures.accuracy_figure(self.metrics, kind)
        if self.calibrations:
            drawn["reliability"] = figures.reliability_figure(self.calibrations, kind)
        if self.measured is not None and kind != "svg" and len(self.class_names) <= _MOST_MATRIX:
            counts = findings.confusion_counts(self.measured)
            drawn["confusion"] = figures.confusion_figure(counts, self.class_names, kind)
        return drawn

    # ------------------------------------------------------------------ numbers

    def _measured_on(self) -> str:
        return measured_on(self.metrics, self.subject.config.get("strength", 1.0)) if self.metrics else ""

    def _overall(self) -> list[Row]:
        """Trained and zero-shot with their intervals; by cross-validation too, where it was not shown first."""
        if "accuracy" not in self.metrics:
            return []
        other = self.evidence.cross_validated
        sources = [self.metrics] + ([other.metrics] if other is not None and other is not self.measured else [])
        rows = []
        for metrics in sources:
            found, on = findings.overall_row(metrics), measured_on(metrics, self.subject.config.get("strength", 1.0))
            rows.append({"name": "trained", "accuracy": found["after"], "interval": found["interval"], "on": on})
            if found["before"] is not None:
                before = {"accuracy": found["before"], "interval": found["interval_before"]}
                rows.append({"name": "zero-shot", **before, "on": on})
        return rows

    def _attention(self) -> list[str]:
        """What a reader should not miss, one sentence each."""
        found, metrics = [], self.metrics
        before, after = metrics.get("zero_shot_accuracy"), metrics.get("accuracy")
        if before is not None and after is not None and after < before:
            found.append(
                f"Training made it worse here: {_percent(after)} against {_percent(before)} zero-shot. Serve zero-shot "
                "(strength 0), or train on more pictures."
            )
        lost = [row["name"] for row in findings.class_rows(metrics) if (row["gain"] or 0.0) < 0]
        if lost:
            more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
            names = ", ".join(map(visible, lost[::-1][:5]))
            found.append(f"{len(lost)} of {len(metrics['per_class'])} classes lost accuracy: {names}{more}.")
        if self.measured is not None and len(self.measured) < 100:
            found.append(f"Only {len(self.measured)} pictures were measured: the intervals are wide.")
        if untested := metrics.get("untested_classes"):
            found.append(f"Classes with a single picture, of which nothing was measured: {len(untested)}.")
        if self.issues:
            found.append(f"Suspicious labels: {len(self.issues)}. Look at the first of them under Labels.")
        if self.equal:
            found.append(f"Pictures in several splits or under several labels: {len(self.equal)}, see Duplicates.")
        if self.evidence.unreadable:
            found.append(f"Pictures that cannot be read and were left out: {len(self.evidence.unreadable)}.")
        return found

    def _confusions(self) -> Row | None:
        """The matrix, or of many classes the pairs, each cell with its pictures."""
        if self.measured is None:
            return None
        counts = findings.confusion_counts(self.measured)
        pairs = findings.confused_pairs(self.measured, 10_000)
        whole = len(self.class_names) <= _MOST_CELLS
        wrong = sum(pair["count"] for pair in pairs)
        shown = pairs if whole else pairs[:_MOST_PAIRS]
        right = [{"label": k, "predicted": k, "count": int(counts[k, k])} for k in range(len(counts))]
        cells = shown + ([row for row in right if row["count"]] if whole else [])
        shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
        for cell in cells:
            rows = findings.rows_of_cell(self.measured, cell["label"], cell["predicted"])
            cell["pictures"] = self._pictures(self.measured, rows[: self.per_cell])
        matrix = [
            [{"count": int(counts[a, b]), "share": float(shares[a, b])} for b in range(len(counts))]
            for a in range(len(counts))
        ] if whole else None  # fmt: skip
        return {"matrix": matrix, "cells": cells, "pairs": shown, "all_pairs": len(pairs), "wrong": wrong}

    # ------------------------------------------------------------------ pictures

    def _name(self, measured: Measured, row: int) -> str:
        return measured.pictures.name(measured.places[row]) if measured.pictures is not None else f"row {row}"

    def _pictures(self, measured: Measured, rows: list[int]) -> list[Row]:
        return [
            {
                "name": self._name(measured, row), "label": self.class_names[int(measured.labels[row])],
                "predicted": self.class_names[int(measured.predicted[row])], "confidence": measured.confidence[row],
                "address": self._address(measured.pictures, measured.places[row]) if measured.pictures else None,
                "split": measured.metrics.get("split"),
            }
            for row in rows
        ]  # fmt: skip

    def _address(self, pictures: Pictures, place: int) -> str | None:
        return self.thumbnails.of(pictures, place) if self.per_cell else None

    def _list(self, which: str) -> list[Row]:
        if self.measured is None:
            return []
        return self._pictures(self.measured, getattr(findings, which)(self.measured, _MOST_PICTURES // 2))

    def _issues(self) -> list[tuple[Measured, Row]] | None:
        """Labels that are likely wrong; None where cleanlab is not installed or there are no answers."""
        answers = [found for found in (self.evidence.cross_validated, self.evidence.held_out) if found is not None]
        if not answers or not findings.can_judge_labels():
            return None
        return [(measured, row) for measured in answers for row in findings.suspicious_labels(measured)]

    def _issue_pictures(self) -> list[Row]:
        ranked = sorted(self.issues or (), key=lambda issue: issue[1]["quality"])[:_MOST_PICTURES]
        return [self._pictures(measured, [row["row"]])[0] for measured, row in ranked]

    def _equal_pictures(self) -> list[Row]:
        rows = []
        for group in self.equal[:_MOST_PICTURES]:
            members = [(self.evidence.splits[number], place) for number, place in group]
            copies = [
                {"split": at.split, "name": at.name(place), "label": at.images.class_names[at.images.labels[place]]}
                for at, place in members
            ]
            rows.append({"address": self._address(*members[0]), "copies": copies[:8], "more": len(copies) - 8})
        return rows

    # ------------------------------------------------------------------ where it comes from

    def _origin(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """How the classifier came to be: headings with names and values."""
        config = self.subject.config
        drawn, data = dict(config.get("few_shot") or {}), dict(config.get("data") or {})
        if "indices" in drawn:
            drawn["indices"] = f"{len(drawn['indices'])} rows, in config.json"
        pictures = data.pop("train_pictures", None) or {}
        account = data.pop("account", None) or {}
        data |= {"different pictures": pictures.get("count"), "read as": account.get("kind")}
        data |= {f"split {row['name']}": _split_text(row) for row in account.get("splits") or ()}
        data |= {f"left out, {row['reason']}": row["count"] for row in account.get("left_out") or ()}
        made = {
            "base model": self.subject.base, "commit": config.get("base_model_revision"),
            "templates": config.get("templates"), "alpha": config.get("alpha"),
            "described classes": len(config.get("class_descriptions") or ()) or None,
            "strength": config.get("strength", 1.0),
            "enhanced base": config.get("enhanced_base"), "format": config.get("format_version"),
        }  # fmt: skip
        sections = [
            ("Classifier", made), ("Draw", drawn), ("Training", config.get("training")), ("Data", data),
            ("Versions", config.get("library_versions")),
        ]  # fmt: skip
        return [
            (title, [(str(key).replace("_", " "), _text(value)) for key, value in rows.items() if value is not None])
            for title, rows in sections
            if rows
        ]


def _split_text(row: Mapping[str, Any]) -> str:
    return f"{row.get('pictures')} pictures of {row.get('num_classes')} classes, {row.get('use') or 'not used'}"


def _text(value: Any) -> str:
    """A value of a config as one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items() if inner is not None)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _shown(value: Any) -> Any:
    """User text without what turns its direction or ends a line; the template's own markup as it is."""
    return visible(value) if type(value) is str else value


def _percent(share: float | None) -> str:
    return "" if share is None else percent(share)


def _points(gain: float | None) -> str:
    """A difference of shares in percentage points, with its sign."""
    if gain is None:
        return ""
    return "±0.0" if abs(gain) < 5e-4 else f"{100 * gain:+.1f}".replace("-", "−")


def _code(name: str) -> str:
    """A name as a Python string."""
    return repr(visible(name))


def _word(name: str) -> str:
    """A name as a word of a shell."""
    return shlex.quote(visible(name))


_HEAD = re.compile(r"^.*?(?=<svg )|<!--.*?-->", re.DOTALL)
_COLOUR = re.compile("|".join(figures.COLOURS.values()))
_NAMES = {value: f"var(--{name})" for name, value in figures.COLOURS.items()}


def _inline(svg: bytes, name: str) -> str:
    """An SVG to lie in the page: colours from the page's style, and names of its parts its own."""

    def adapt(tag: re.Match[str]) -> str:
        text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", tag.group())
        return _COLOUR.sub(lambda colour: _NAMES[colour.group()], text)

    text = re.sub(r"<[^>]*>", adapt, _HEAD.sub("", svg.decode("utf-8")))
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)
