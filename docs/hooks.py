"""What `make docs` adds to the pages: the commands, from their own help, and links that lead out of docs/."""

from __future__ import annotations

import posixpath
import re
from typing import Any

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from taskres_hf.cli.app import make_app

_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([^)#]+)(?:#[^)]*)?\)")


def commands_page() -> str:
    """The page of all commands: usage, arguments, options and defaults as `--help` has them."""
    command: Any = typer.main.get_command(make_app())
    context = command.make_context("taskres", [], resilient_parsing=True)
    text = get_docs_for_click(obj=command, ctx=context, name="taskres")
    text = re.sub(r"\[/?(?:bold|dim|italic|code)\]", "", text).replace("# `taskres`", "# Commands", 1)
    return re.sub(r"(`[^`]*`)|<", lambda match: match.group(1) or "&lt;", text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "commands.md", content=commands_page()))
    return files


def on_page_markdown(markdown: str, config: MkDocsConfig, **_: Any) -> str:
    """A link out of docs/ leads into the repository where its address is known (`repo_url`), else names the file."""

    def replaced(match: re.Match[str]) -> str:
        text, path = match.groups()
        if config.repo_url:
            return f"[{text}]({posixpath.join(config.repo_url, 'blob/main', path)})"
        return text if path.rsplit("/", 1)[-1] in text else f"{text} (`{path}`)"

    return _OUTSIDE.sub(replaced, markdown)
