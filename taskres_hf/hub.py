"""The upload: one commit that is there or not, tried again while the Hub is busy, resumed where it was cut."""

from __future__ import annotations

import email.utils
import json
import os
import shlex
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, get_session, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    hf_raise_for_status,
    http_backoff,
    validate_repo_id,
)

from .artifact import CONFIG, PROCESSOR, WEIGHTS, check_loads, differing, read_checked, rewrite
from .card import FIGURE, card_for, card_to_push, is_hub_id, is_of_older_release, model_card
from .errors import (
    LOG_IN,
    ArtifactError,
    ConfigurationError,
    HubError,
    TaskResError,
    answer_of,
    chain,
    no_answer,
    sent_token,
    status_of,
)
from .storage import is_path, read_json, write_bytes

__all__ = ["card_for", "is_hub_id", "model_card", "push_folder", "upload"]

# Seconds between tries, as the Hub's client has them; it tries most requests again by itself, but neither to create a
# repository or branch nor to commit. No push waits longer than `_PATIENCE` in all.
_WAITS = (1.0, 2.0, 4.0, 8.0, 8.0)
_PATIENCE = 300.0
_NO_ANSWER = 120.0  # seconds until a request without an answer is given up; the client would wait for ever
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_T = TypeVar("_T")


def upload(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    parent_commit: str | None = None,
    kept: str | os.PathLike[str] | None = None,
) -> Any:
    """Upload a folder in one commit; what somebody wrote into the card of the revision that is pushed to is kept.

    Answers that mean "later" (429, 5xx), dropped connections and other people's commits in between are met by trying
    again, for at most five minutes. Large files that arrived are not sent again, and a commit whose answer was lost is
    not made twice.

    Args:
        folder: its files are uploaded. repo_id: where to; created when missing.
        private: of a new repository. revision: a branch, made from `main` when missing, or a pull request's
            `refs/pr/1`. create_pr: open a pull request on `main` instead.
        parent_commit: refuse if the branch has moved on from this commit.
        kept: where the files are afterwards, for the message of an error; default `folder`.

    Returns:
        `huggingface_hub.CommitInfo`; of the last commit, where nothing had changed.

    Raises:
        HubError: the Hub cannot be reached, is busy or refuses; says where the files lie.
        ConfigurationError: `revision` cannot be pushed to, or `private` contradicts a public repository.
    """
    if create_pr and revision not in (None, "main"):
        raise ConfigurationError(
            f"create_pr=True opens a pull request on main; revision={revision!r} cannot be given with it. To push to a "
            "pull request that is there, give its refs/pr/NUMBER as revision alone."
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigurationError(f"{repo_id!r} cannot be a repository, such as me/pets-taskres: {error}") from error
    push = _Push(
        HfApi(token=token), token, repo_id, Path(folder), private, revision, create_pr,
        commit_message or "Upload TaskRes classifier", commit_description, parent_commit,
    )  # fmt: skip
    try:
        return _patiently(push.attempt, may_move=parent_commit is None)
    except TaskResError:
        raise
    except Exception as error:
        reason = _why_not_uploaded(error, repo_id, parent_commit)
        if reason is None:
            raise
        where = kept or folder
        raise HubError(
            f"The upload to {repo_id} failed: {reason} The classifier is whole in {where}; upload it from there "
            f"with: taskres push {shlex.quote(str(where))} {repo_id}"
        ) from error


# Arguments of `upload` that the model's own methods pass on.
PUSH_OPTIONS = ("token", "private", "revision", "create_pr", "commit_message", "commit_description", "parent_commit")


def push_written(write: Callable[[str], None], repo_id: str, **options: Any) -> Any:
    """Upload what `write` puts into a new folder, which stays for another try where the upload fails; see `upload`."""
    folder, keep = tempfile.mkdtemp(prefix="taskres-"), False
    try:
        write(folder)
        return upload(folder, repo_id, **options)
    except HubError:
        keep = True
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


class _Push:
    """One upload, which may take several attempts; each looks at the Hub anew, so that none does a thing twice."""

    def __init__(
        self, api: HfApi, token: Any, repo_id: str, folder: Path, private: bool | None, revision: str | None,
        create_pr: bool, message: str, description: str | None, parent: str | None,
    ) -> None:  # fmt: skip
        self.api, self.token, self.repo_id, self.folder, self.private = api, token, repo_id, folder, private
        self.revision, self.create_pr, self.parent = revision or "main", create_pr, parent
        self.message, self.description = message, description
        self.attempts = 0
        self.earlier: set[str] = set()  # pull requests of before the first attempt

    def attempt(self) -> Any:
        """Create what is missing, look at the card that is there, and commit."""
        self.attempts += 1
        repo = self.api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
        if self.private and not self.api.model_info(repo).private:
            raise ConfigurationError(
                f"The repository {repo} is there already and is public; private=True is for a new one. Make it private "
                "in its settings on the Hub, or leave private out."
            )
        head = self._head(repo)
        files = {path.name: path for path in sorted(self.folder.iterdir()) if path.is_file()}
        content: dict[str, Any] = dict(files)
        card = self._card(repo, head, files.get("README.md"))
        if card is not None:
            content["README.md"] = card
        made = self._made_before(repo) if self.create_pr and self.attempts > 1 else None
        if made is not None:
            return made
        commit = self.api.create_commit(
            repo, [CommitOperationAdd(name, value) for name, value in content.items()], commit_message=self.message,
            commit_description=self.description, revision=self.revision, create_pr=self.create_pr,
            parent_commit=self.parent or head,
        )  # fmt: skip
        if commit.oid == head and self.attempts == 1:
            warnings.warn(f"{repo} has all of this already: no commit was made.", stacklevel=5)
        return commit

    def _head(self, repo: str) -> str | None:
        """The commit that the branch is at, which is created where it is missing."""
        refs = self.api.list_repo_refs(repo, include_pull_requests=True)
        if self.attempts == 1:
            self.earlier = {ref.ref for ref in refs.pull_requests or []}
        heads = {ref.name: ref.target_commit for ref in refs.branches}
        if self.revision.startswith("refs/"):
            heads |= {ref.ref: ref.target_commit for ref in (*refs.branches, *(refs.pull_requests or []))}
            if self.revision not in heads:
                raise ConfigurationError(f"{repo} has no {self.revision} to push to: check its number.")
        elif self.revision in {ref.name for ref in refs.tags} - set(heads):
            raise ConfigurationError(
                f"{self.revision!r} is a tag of {repo}, which stays where it is: push to a branch."
            )
        elif self.revision not in heads and self.revision != "main":
            self.api.create_branch(repo, branch=self.revision, exist_ok=True)
            return heads.get("main")
        return heads.get(self.revision)

    def _card(self, repo: str, head: str | None, local: Path | None) -> bytes | None:
        """The card to upload, given the one on the revision that is pushed to; None to leave that one alone."""
        there = None if head is None else self._text(repo, head, "README.md")
        mine = None if local is None else local.read_bytes().decode("utf-8", "surrogateescape")
        beside = None
        if head is not None and is_of_older_release(there):
            try:
                beside = json.loads(self._text(repo, head, CONFIG) or "null")
            except ValueError:
                beside = None
        card = card_to_push(mine, there, beside if isinstance(beside, dict) else None)
        return None if card is None else card.encode("utf-8", "surrogateescape")

    def _text(self, repo: str, commit: str, file: str) -> str | None:
        """A file as it is on the Hub, not in the cache, which may hold an older one; None where there is none."""
        answer = http_backoff(
            "GET", hf_hub_url(repo, file, revision=commit), headers=build_hf_headers(token=self.token),
            follow_redirects=True,
        )  # fmt: skip
        try:
            hf_raise_for_status(answer)
        except EntryNotFoundError:
            return None
        return answer.content.decode("utf-8", "surrogateescape")

    def _made_before(self, repo: str) -> Any:
        """The pull request of an earlier attempt whose answer was lost, or None."""
        from huggingface_hub import CommitInfo

        refs = self.api.list_repo_refs(repo, include_pull_requests=True).pull_requests or []
        for ref in (ref for ref in refs if ref.ref not in self.earlier):
            first = self.api.list_repo_commits(repo, revision=ref.ref)[0]
            if first.title == self.message:
                link = f"{self.api.endpoint}/{repo}"
                return CommitInfo(
                    commit_url=f"{link}/commit/{ref.target_commit}", commit_message=self.message,
                    commit_description=self.description or "", oid=ref.target_commit,
                    pr_url=f"{link}/discussions/{ref.ref.rsplit('/', 1)[-1]}",
                )  # fmt: skip
        return None


# ---------------------------------------------------------------------------------------------------- trying again


def _patiently(attempt: Callable[[], _T], may_move: bool) -> _T:
    """What `attempt` returns, tried again while the Hub says later; the last error where it goes on saying so."""
    start = time.monotonic()
    for number, wait in enumerate((*_WAITS, None), start=1):
        try:
            with _answers_in_time():
                return attempt()
        except Exception as error:
            later = _later(error, may_move)
            pause = None if wait is None else max(wait, _asked_wait(error) or 0)
            if later is None or pause is None or time.monotonic() - start + pause > _PATIENCE:
                raise
            warnings.warn(f"The Hub: {later}. Trying again in {pause:.0f} s ({number} of {len(_WAITS)}).", stacklevel=4)
            time.sleep(pause)
    raise AssertionError("unreachable")


@contextmanager
def _answers_in_time() -> Iterator[None]:
    """Give requests a time limit where the client that is shared with the caller's own code has none."""
    client = get_session()
    before = client.timeout
    limits = (before.connect, before.read, before.write, before.pool)
    if limits == (None,) * 4:
        client.timeout = _NO_ANSWER
    try:
        yield
    finally:
        if limits == (None,) * 4:
            client.timeout = before


def _later(error: BaseException, may_move: bool) -> str | None:
    """Why an attempt may go better later; None where it will not."""
    status = status_of(error)
    if status == 412 and may_move:
        return "another commit came in between"
    if any(isinstance(cause, json.JSONDecodeError) for cause in chain(error)):
        return "it answered with something that is not JSON"
    reason = no_answer(error)
    if reason is None or (status is not None and status not in _BUSY) or "HF_HUB_OFFLINE" in reason:
        return None
    return reason


def _asked_wait(error: BaseException) -> float | None:
    """The seconds that an answer asks to wait: `Retry-After`, a number or a date, or the window of a rate limit."""
    answer = answer_of(error)
    if answer is None:
        return None
    value = str(answer.headers.get("retry-after") or "").strip()
    if value.isdigit():
        return float(value)
    if value:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return None
    try:
        from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]
    except ImportError:  # an older client
        return None
    window = parse_ratelimit_headers(answer.headers)
    return float(window.reset_in_seconds) if status_of(error) == 429 and window is not None else None


def _why_not_uploaded(error: BaseException, repo_id: str, parent_commit: str | None) -> str | None:
    """Why a push ended, and what to do, as sentences; None where it is an error of ours."""
    status, owner = status_of(error), repo_id.split("/")[0] if "/" in repo_id else "your account"
    later = _later(error, may_move=False)
    if later is not None:
        asked = _asked_wait(error)
        when = f"in {asked:.0f} s or more" if asked else "later"
        return f"the Hub did not take it ({later}), in several tries or because of the wait it asks for. Push {when}."
    if no_answer(error) is not None:
        return f"the Hub is not to be asked ({no_answer(error)})."
    if status == 401:
        if sent_token(error):
            return (
                "the Hub does not take the token that was sent: it is expired, revoked or mistyped. Log in again with "
                "`hf auth login`, or give a new one in HF_TOKEN or token=."
            )
        return f"you are not logged in: {LOG_IN}."
    if status == 403:
        return (
            f"the token has no right to write there (403). It needs the role write, in {owner} too if that is an "
            "organisation; or open a pull request with create_pr=True (--create-pr)."
        )
    if status == 412:
        return (
            f"the branch is no longer at {parent_commit}: somebody pushed in between. Look at what changed, and push "
            "with the new commit as parent_commit."
        )
    if status == 404 or any(isinstance(cause, RepositoryNotFoundError) for cause in chain(error)):
        return "there is no such repository, or the token may not see it: check the name."
    server = next(
        (getattr(cause, "server_message", None) for cause in chain(error) if hasattr(cause, "response")), None
    )
    if status is not None or (isinstance(error, ValueError) and "README.md" in str(error)):
        said = " ".join(str(server or error).split())[:300]
        return f"the Hub refuses it ({f'{status}: ' if status else ''}{said})."
    return None


# ---------------------------------------------------------------------------------------------------- a folder


# What an artifact's folder may hold that belongs on the Hub; checkpoints, settings of the run and notes do not.
_SHARED = (CONFIG, WEIGHTS, PROCESSOR, "README.md", "processor_config.json", "LICENSE")


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    parent_commit: str | None = None,
    include_code: bool = False,
    figure: bytes | None = None,
) -> Any:
    """Upload a saved artifact's files as they are; the base is not loaded.

    Checkpoints, run settings, hidden files and whatever else lies there stay behind. A base that is a folder of this
    machine is named by its last part only, in the uploaded config.json and a generated card.

    Args:
        folder: a saved artifact. repo_id: where to, such as `"me/pets-taskres"`; created when missing.
        private, revision, create_pr, commit_message, commit_description, parent_commit, token: see `upload`.
        include_code: add the module that `trust_remote_code=True` needs where the library is not installed.
        figure: a PNG for a generated card, such as `report.accuracy_figure(config["metrics"])`.

    Returns:
        `huggingface_hub.CommitInfo`.

    Raises:
        ArtifactError: the folder is no artifact, or would not load. HubError, ConfigurationError: see `upload`.
    """
    folder = Path(folder)
    check_loads(folder)
    with tempfile.TemporaryDirectory() as place:
        for name in (name for name in _SHARED if (folder / name).is_file()):
            write_bytes(Path(place, name), (folder / name).read_bytes())
        written, weights = Path(place, CONFIG), Path(place, WEIGHTS)
        config, _, processor = read_checked(written, weights)  # of the copy, which no other process saves into
        public = {**config, "base_model_name_or_path": public_base_name(str(config["base_model_name_or_path"]))}
        code = {} if "auto_map" not in config else {file.name: file.read_bytes() for file in folder.glob("*.py")}
        if include_code:
            public["auto_map"], code = AUTO_MAP, {REMOTE_FILE: remote_code()}
        for name, content in code.items():
            write_bytes(Path(place, name), content)
        if differing(public, read_json(written)):
            rewrite(Path(place), weights.read_bytes(), public, processor)  # signed anew
        if figure is not None:
            write_bytes(Path(place, FIGURE), figure)
        card = card_for(public, repo_id, None, folder / "README.md", figure is not None)
        write_bytes(Path(place, "README.md"), card)
        check_loads(place)
        return upload(
            place, repo_id, token=token, private=private, revision=revision, create_pr=create_pr,
            commit_message=commit_message, commit_description=commit_description, parent_commit=parent_commit,
            kept=folder,
        )  # fmt: skip


def public_base_name(name: str) -> str:
    """A base's name as the Hub may show it; warns where it is a folder of this machine."""
    if not is_path(name):
        return name
    short = Path(name).name
    warnings.warn(
        f"The base model is a folder of this machine, which the Hub cannot name: {short!r} is recorded, and loading "
        "will need base_model=. Load the base from the Hub to avoid this.",
        stacklevel=4,
    )
    return short


REMOTE_FILE = "modeling_taskres.py"
AUTO_MAP = {
    "AutoConfig": "modeling_taskres.TaskResConfig",
    "AutoModelForImageClassification": "modeling_taskres.TaskResCLIPForImageClassification",
}


def remote_code() -> bytes:
    """The one module that `trust_remote_code=True` runs where the library is not installed."""
    return resources.files("taskres_hf").joinpath("remote").joinpath(REMOTE_FILE).read_bytes()


def _without_code(path: Path) -> bytes:
    """A processor's file without the mention of code that its base has and the artifact has not."""
    content = path.read_bytes()
    values = json.loads(content) if path.suffix == ".json" and b"auto_map" in content else {}
    if "auto_map" not in values:
        return content
    del values["auto_map"]
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def side_files(image_processor: Any, include_code: bool) -> dict[str, bytes]:
    """An image processor's files, if there is one, and the module for `trust_remote_code` on request, by name."""
    files: dict[str, bytes] = {}
    if image_processor is not None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                image_processor.save_pretrained(folder)
                files = {path.name: _without_code(path) for path in Path(folder).iterdir()}
        except OSError as error:
            raise ArtifactError(
                f"Cannot write to {tempfile.gettempdir()}, where files are made: {error.strerror or error}. Nothing "
                "was changed; make room there, or set TMPDIR."
            ) from error
    if include_code:
        files[REMOTE_FILE] = remote_code()
    return files
