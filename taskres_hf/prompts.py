"""From class names to the prompts whose text embeddings make the base classifier."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from importlib import resources
from typing import Any

from .errors import ClassNamesError, ConfigurationError

DEFAULT_TEMPLATE = "a photo of a {}."
_UNDERSCORES = ("replace", "keep")
_MEANINGLESS = re.compile(r"^(\d+|n\d{8})$")  # a bare number or a WordNet id


@cache
def named_templates() -> dict[str, tuple[str, ...]]:
    """The template sets that can be named instead of spelled out.

    `"clip-80"` and `"clip-7"` (OpenAI's ImageNet prompts and the seven they select), `"imagenet"` (the seven and
    `"a photo of a {}."`, as TaskRes uses) and one set per benchmark dataset, such as `"oxford_pets"`.

    Returns:
        Name to templates, each with one `{}` for the class name.
    """
    text = resources.files("taskres_hf").joinpath("templates.json").read_text(encoding="utf-8")
    return {name: tuple(templates) for name, templates in json.loads(text).items() if not name.startswith("_")}


def resolve_templates(templates: str | Sequence[str] | None) -> list[str]:
    """A template, a list of templates or the name of a set, as a list of templates.

    Args:
        templates: one template with `{}` for the class name, several (an ensemble), a name from
            `named_templates()`, or None for `"a photo of a {}."`.

    Raises:
        ConfigurationError: empty list, not a string, no `{}` in a template, or an unknown name.
    """
    if templates is None:
        return [DEFAULT_TEMPLATE]
    if isinstance(templates, str):
        if "{" not in templates and "}" not in templates:
            known = named_templates()
            if templates in known:
                return list(known[templates])
            raise ConfigurationError(
                f"The template {templates!r} has no '{{}}' to put the class name in, and no template set has that "
                f"name. Write for example 'a photo of a {{}}.', or use one of: {', '.join(sorted(known))}."
            )
        templates = [templates]
    if not isinstance(templates, Iterable):
        raise ConfigurationError(
            f"`templates` must be one template or several, such as 'a photo of a {{}}.'; got {templates!r:.80}."
        )
    resolved = list(templates)
    if not resolved:
        raise ConfigurationError("`templates` is empty: give at least one, for example 'a photo of a {}.'.")
    for template in resolved:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ConfigurationError(
                f"A template needs exactly one '{{}}' to put the class name in; got {template!r}. "
                "Write for example 'a photo of a {}.'."
            )
    return resolved


def check_class_names(class_names: Any, minimum: int = 2) -> list[str]:
    """Class names in label order, normalised to NFC and stripped.

    Args:
        class_names: a sequence of names, a mapping from label id to name, or a `datasets.ClassLabel`.
        minimum: fewest classes accepted; a classifier needs two.

    Raises:
        ClassNamesError: none or too few classes, an empty name, a name that is not a string, or two names that
            are the same after normalisation.
    """
    names = getattr(class_names, "names", class_names)
    if isinstance(names, str):
        raise ClassNamesError(f"`class_names` must be a list of names; got the single string {names!r}.")
    if isinstance(names, Mapping):
        names = _names_from_mapping(names)
    if names is None or not isinstance(names, Iterable):
        raise ClassNamesError("No class names: pass class_names=['tabby cat', 'beagle', ...] or a datasets.ClassLabel.")
    names = list(names)
    for position, name in enumerate(names):
        if not isinstance(name, str):
            raise ClassNamesError(f"Class names must be strings; number {position} is {name!r}.")
    cleaned = [unicodedata.normalize("NFC", name).strip() for name in names]
    if len(cleaned) < minimum:
        raise ClassNamesError(
            f"A classifier needs at least {minimum} classes; got {len(cleaned)}: {cleaned}. "
            "Pass the names of all classes in label order."
        )
    empty = [position for position, name in enumerate(cleaned) if not _bare(name)]
    if empty:
        raise ClassNamesError(f"Class names must not be empty; numbers {empty} are. Give each class a name.")
    first: dict[str, int] = {}
    for position, name in enumerate(cleaned):
        if name in first:
            raise ClassNamesError(
                f"Class names must differ; {name!r} is both number {first[name]} and number {position}. "
                "Rename one, for example 'crane (bird)' and 'crane (machine)'."
            )
        first[name] = position
    warn_of_equals(cleaned, [_bare(name) for name in cleaned], "class names")
    meaningless = [name for name in cleaned if _MEANINGLESS.match(name)]
    if meaningless:
        warnings.warn(
            f"{len(meaningless)} class names say nothing to a text encoder (such as {meaningless[0]!r}): the base "
            "classifier will be near chance. Pass class_names= with words.",
            stacklevel=3,
        )
    return cleaned


def class_prompts(
    class_names: Sequence[str],
    templates: str | Sequence[str] | None = None,
    *,
    underscores: str = "replace",
    descriptions: Mapping[str, Sequence[str] | str] | None = None,
    prompt_names: Mapping[str, str] | None = None,
) -> list[list[str]]:
    """The prompts of each class.

    Args:
        class_names: names in label order, K of them.
        templates: see `resolve_templates`. With `descriptions`, None means the descriptions alone.
        underscores: `"replace"` writes `tabby_cat` as `tabby cat`; `"keep"` leaves it, as the published TaskRes code
            does (its class names reach the tokenizer verbatim).
        descriptions: sentences per class name, as in CuPL's JSON files; used as whole prompts. A string is one
            sentence.
        prompt_names: what stands in a prompt instead of a class name, for names that say little or must differ where
            their prompts do not (ImageNet has two classes called `missile`).

    Returns:
        K lists of prompts.

    Raises:
        ConfigurationError: bad template, unknown `underscores`, a class without a description, or a name in
            `prompt_names` that is no class.
    """
    if underscores not in _UNDERSCORES:
        raise ConfigurationError(f"`underscores` must be one of {_UNDERSCORES}; got {underscores!r}.")
    resolved = resolve_templates(templates) if templates is not None or descriptions is None else []
    prompts = []
    missing = []
    descriptions = sentences_by_class(descriptions)
    _check_prompt_names(prompt_names, class_names)
    for name in class_names:
        words = (prompt_names or {}).get(name, name)
        words = words.replace("_", " ") if underscores == "replace" else words
        sentences = [template.replace("{}", words) for template in resolved]
        if descriptions is not None:
            described = descriptions.get(name, descriptions.get(words))
            if not described or not all(text.strip() for text in described):
                missing.append(name)
                continue
            sentences += list(described)
        prompts.append(sentences)
    _check_encodable(prompts)
    if missing:
        raise ConfigurationError(
            f"`descriptions` needs a non-empty list of sentences for each class; missing for {missing[:5]}"
            f"{' ...' if len(missing) > 5 else ''} ({len(missing)} of {len(class_names)})."
        )
    return prompts


def _check_encodable(prompts: Sequence[Sequence[str]]) -> None:
    for prompt in (prompt for group in prompts for prompt in group):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # as of a file name that is not UTF-8
            raise ConfigurationError(
                f"The prompt {prompt!r} holds bytes that are not text: rename the class, or give prompt_names= for it."
            ) from error


def sentences_by_class(descriptions: Mapping[str, Sequence[str] | str] | None) -> dict[str, list[str]] | None:
    """Descriptions with a list of sentences per class; a string is one sentence.

    Raises:
        ConfigurationError: not a mapping from names to sentences.
    """
    if descriptions is None:
        return None
    if not isinstance(descriptions, Mapping):
        raise ConfigurationError(
            f"`descriptions` must be a mapping from class names to sentences; got a {type(descriptions).__name__}."
        )
    ready = {}
    for name, sentences in descriptions.items():
        several = [sentences] if isinstance(sentences, str) else sentences
        if not isinstance(several, Sequence) or not all(isinstance(text, str) for text in several):
            raise ConfigurationError(f"The description of {name!r} must be a list of sentences; got {sentences!r:.80}.")
        ready[str(name)] = list(several)
    return ready


def prompts_digest(prompts: Sequence[Sequence[str]], average: str) -> str:
    """Digest of the prompts in class order and of how they are averaged."""
    return _digest(tuple(map(tuple, prompts)), average)


@lru_cache(maxsize=1)  # an artifact's are asked for several times while it is loaded
def _digest(prompts: tuple[tuple[str, ...], ...], average: str) -> str:
    text = json.dumps([average, prompts], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def warn_of_equals(names: Sequence[str], keys: Sequence[Any], what: str) -> None:
    """Warn of names that the base cannot tell apart, naming up to five pairs."""
    first: dict[Any, int] = {}
    pairs = [(names[first[key]], names[row]) for row, key in enumerate(keys) if first.setdefault(key, row) != row]
    if pairs:
        shown = ", ".join(f"{one!r} and {other!r}" for one, other in pairs[:5])
        warnings.warn(
            f"{len(pairs)} pair{'s' if len(pairs) > 1 else ''} of {what} are the same to a text encoder, or nearly: "
            f"{shown}{' ...' if len(pairs) > 5 else ''}. Zero-shot cannot tell them apart: are they one class? "
            "If not, give prompt_names= or class_descriptions= that differ.",
            stacklevel=4,
        )


def _bare(name: str) -> str:
    """A name without what a text encoder hardly sees: case, underscores, spaces, look-alike or invisible characters."""
    visible = "".join(character for character in name if unicodedata.category(character) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", visible).replace("_", " ").split()).casefold()


def _check_prompt_names(prompt_names: Mapping[str, str] | None, class_names: Sequence[str]) -> None:
    if prompt_names is None:
        return
    if not isinstance(prompt_names, Mapping):
        raise ConfigurationError(f"`prompt_names` must be a mapping; got a {type(prompt_names).__name__}.")
    unknown = sorted(str(name) for name in set(prompt_names) - set(class_names))
    if unknown:
        raise ConfigurationError(f"`prompt_names` speaks of classes that do not exist: {unknown[:5]}.")
    bad = [name for name, words in prompt_names.items() if not isinstance(words, str) or not words.strip()]
    if bad:
        raise ConfigurationError(f"`prompt_names` must give words for {bad[0]!r}; got {prompt_names[bad[0]]!r}.")


def _names_from_mapping(mapping: Mapping[Any, Any]) -> list[Any]:
    """`{0: "cat"}`, `{"0": "cat"}` (id2label) or `{"cat": 0}` (label2id), as names in label order."""
    try:
        if all(isinstance(value, int) for value in mapping.values()):
            by_id = {int(value): key for key, value in mapping.items()}
        else:
            by_id = {int(key): value for key, value in mapping.items()}
    except (TypeError, ValueError):
        raise ClassNamesError(
            f"A mapping of classes must be id to name or name to id; got {dict(list(mapping.items())[:3])!r}."
        ) from None
    if sorted(by_id) != list(range(len(mapping))):
        raise ClassNamesError(
            f"Label ids must run from 0 to {len(mapping) - 1} without gaps; got {sorted(by_id)[:10]}."
        )
    return [by_id[index] for index in range(len(by_id))]
