"""The Hugging Face Hub: checkpoints from it, and merges to it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from omnimerge.checkpoint.links import check_inside
from omnimerge.checkpoint.small_file import open_small, read_json
from omnimerge.checkpoint.staging import MANIFEST_NAME
from omnimerge.errors import CheckpointError, OmnimergeError, OutputError, one_line

_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_REFERENCE = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")

SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.pt", "*.md", "*.tiktoken"]
SMALL_FILES += ["LICENSE*", "NOTICE*"]
# What training left, and weights in subfolders, which no checkpoint is read from.
NEVER = ["checkpoint-*/*", "global_step*/*", "optimizer.pt", "scheduler.pt", "rng_state*"]
NEVER += ["*/*.safetensors", "*/*.bin", "*/*.pt"]
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_PICKLES = ["pytorch_model*.bin", "adapter_model.bin"]
# Weights of what the repository held before: loaders would take them for the new ones.
_STALE = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_LICENSE = ("license", "license_name", "license_link")
_PLAIN = re.compile(r"\s+['\"]?\w")  # a word or a quoted text, no list
_BUSY = "try again later: what is complete is kept"


def is_reference(text: str) -> bool:
    """Return whether a text could be ``owner/name`` or ``owner/name@revision``.

    Args:
        text: what a user wrote.

    Returns:
        Whether it has that form.
    """
    return bool(_REFERENCE.fullmatch(text)) and not text.startswith(".")


def is_pinned(text: str) -> bool:
    """Return whether a text has the form ``owner/name@commit``, which gives the same bytes always.

    Args:
        text: what a user, or a manifest, says.

    Returns:
        Whether it has, with all 40 digits of the commit.
    """
    return is_reference(text) and bool(_COMMIT.fullmatch(text.partition("@")[2]))


def commit_of(folder: Path) -> str:
    """Return the commit that a folder of the Hub's cache holds.

    Args:
        folder: any folder.

    Returns:
        The commit's hash; empty for a folder that is not of the Hub's cache.
    """
    cached = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.name if cached and _COMMIT.fullmatch(folder.name) else ""


def pinned(reference: str, folder: Path) -> str:
    """Return a reference that gives the same bytes at any time.

    Args:
        reference: what the user wrote.
        folder: where it was found.

    Returns:
        ``owner/name@commit`` for what came from the Hub; a path as it is.
    """
    repo, commit = reference.partition("@")[0], commit_of(folder)
    named = folder.parent.parent.name == f"models--{repo.replace('/', '--')}"
    return f"{repo}@{commit}" if commit and named and is_reference(reference) else reference


def license_of(folder: Path) -> dict[str, str]:
    """Return what a checkpoint's model card says of its license.

    Args:
        folder: the checkpoint's folder, of the Hub or not.

    Returns:
        ``license``, and with it ``license_name`` and ``license_link`` where the card has them;
        empty if there is no card, it does not say, or it is none that may be opened.
    """
    try:
        stream = open_small(folder / "README.md")
        with TextIOWrapper(stream, encoding="utf-8", errors="replace") as card:
            front = re.match(r"---[ \t]*\n(.*?)\n---", card.read(1 << 16), re.DOTALL)
    except (CheckpointError, OSError):
        return {}
    # No YAML parser on a stranger's file: a few of its lines can make one take all memory.
    lines = front.group(1).splitlines() if front else []
    pairs = [line.partition(":")[::2] for line in lines]
    known = {
        key: one_line(value.strip().strip("'\""))
        for key, value in pairs
        if key in _LICENSE and _PLAIN.match(value)
    }
    return known if "license" in known else {}


def download(reference: str) -> Path:
    """Return the folder of a checkpoint on the Hub; what the cache has is not downloaded again.

    Args:
        reference: ``owner/name`` or ``owner/name@revision``.

    Returns:
        Its folder in the Hub's cache.

    Raises:
        CheckpointError: if the Hub does not give it, or what it gives is no checkpoint.
    """
    repo, _, revision = reference.partition("@")

    def say(reason: str) -> OmnimergeError:
        return CheckpointError(
            f"{reference!r} is no local folder, and the Hub did not give it: {reason}"
        )

    with _errors_told(repo, revision, say):
        folder = _snapshot(repo, revision, SMALL_FILES)
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise say("it has neither config.json nor adapter_config.json; is it a checkpoint?")
        commit = commit_of(folder) or revision
        index = next((name for name in _INDEXES if (folder / name).is_file()), "")
        if index:
            shards = _shards(folder / index)
            _snapshot(repo, commit, [_SINGLE[_INDEXES.index(index)], *shards])
            if missing := [name for name in shards if not (folder / name).is_file()]:
                raise say(
                    f"its {index} names {missing[0]}, which it lacks; give another revision, or "
                    "tell its owner"
                )
        else:
            _snapshot(repo, commit, ["*.safetensors"])
            if not any(folder.glob("*.safetensors")):  # an older repository
                _snapshot(repo, commit, _PICKLES)
        return folder


def check_push(repo: str) -> None:
    """Refuse what cannot be pushed, before a merge takes its time.

    Args:
        repo: ``owner/name``.

    Raises:
        OutputError: if the name has another form, the network is forbidden, or there is no token
            that may write.
    """
    from huggingface_hub import HfApi, constants, get_token

    def say(reason: str) -> OmnimergeError:
        return OutputError(f"cannot push to {repo!r}: {reason}")

    if not _REPO.fullmatch(repo) or repo.startswith("."):
        raise say("give owner/name, without a revision")
    if constants.HF_HUB_OFFLINE:
        raise say("HF_HUB_OFFLINE forbids the network; unset it")
    if get_token() is None:
        raise say("there is no token; log in with `hf auth login`, or set HF_TOKEN")
    with _errors_told(repo, "", say):
        known = HfApi().whoami()
    if known.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise say("the token may only read; log in with one that may write")


def push_command(out: Path, repo: str, private: bool) -> str:
    """Return the command that pushes a folder.

    Args:
        out: the folder.
        repo: ``owner/name``.
        private: create the repository private.

    Returns:
        For a shell.
    """
    options = ["--private"] if private else []
    return shlex.join(["omnimerge", "push", str(out), repo, *options])


def push(out: Path, repo: str, *, private: bool = False) -> str:
    """Upload the folder of a merge to the Hub, as one commit: all of it is there, or nothing.

    Weight files of an earlier model of the repository are removed by the same commit.

    Args:
        out: the folder.
        repo: ``owner/name``; created if there is none.
        private: create it private; one that exists and is public is refused.

    Returns:
        Where it can be seen.

    Raises:
        OutputError: if it is no complete folder of a merge, or the Hub does not take it. The
            folder stays as it is.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    files = _complete(out)
    check_push(repo)
    again = push_command(out, repo, private)

    def say(reason: str) -> OmnimergeError:
        return OutputError(
            f"{out} is complete, and was not pushed to {repo!r}: {reason}; push it again with "
            f"`{again}`"
        )

    api = HfApi()
    with _errors_told(repo, "", say):
        api.create_repo(repo, private=True if private else None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise OutputError(
                f"{out} is complete, and was not pushed to {repo!r}: it exists and is public; make "
                "it private in its settings, or give another name"
            )
        stale = [name for name in api.list_repo_files(repo) if _STALE.fullmatch(name)]
        done: Any = api.create_commit(
            repo,
            [CommitOperationDelete(name) for name in stale if name not in files]
            + [CommitOperationAdd(name, str(out / name)) for name in files],
            commit_message="Merged with omnimerge",
        )
    return f"{api.endpoint}/{repo}/tree/{done.oid}"


def _snapshot(repo: str, revision: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    found = snapshot_download(
        repo, revision=revision or None, allow_patterns=patterns, ignore_patterns=NEVER
    )
    return Path(found)


def _shards(index: Path) -> list[str]:
    """The files that an index names; what is wrong with them is said by who reads them."""
    weight_map = read_json(index).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    return sorted({name for name in names if isinstance(name, str) and Path(name).name == name})


def _complete(out: Path) -> list[str]:
    """The files of a merge's folder, if all that its manifest names are there."""
    try:
        promised = [*read_json(out / MANIFEST_NAME).get("files", {})]
    except (CheckpointError, TypeError) as error:
        raise OutputError(
            f"{out} is no merged checkpoint: it has no readable {MANIFEST_NAME}; give the folder "
            "that `omnimerge merge` wrote"
        ) from error
    if missing := [name for name in promised if not (out / name).is_file()]:
        raise OutputError(f"{out} lacks {missing[0]}, which its manifest names; merge again")
    found = [file.relative_to(out) for file in sorted(out.rglob("*")) if file.is_file()]
    found = [file for file in found if not any(part[0] == "." for part in file.parts)]
    check_inside(out, *(out / file for file in found))
    return [file.as_posix() for file in found]


@contextmanager
def _errors_told(repo: str, revision: str, say: Callable[[str], OmnimergeError]) -> Iterator[None]:
    """Turn whatever the client raises into one sentence."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, _transport_error()) as error:
        raise say(_reason(error, repo, revision)) from error


def _transport_error() -> Any:
    """The HTTPError of httpx, under the name that it has by the client's version."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]


def _reason(error: BaseException, repo: str, revision: str) -> str:
    from huggingface_hub import constants, errors, get_token

    page = f"{constants.ENDPOINT}/{repo}"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if get_token() is not None:
        login = f"use a token that may ({login})"
    told: list[tuple[Any, Callable[[Any], str] | str]] = [
        (
            errors.OfflineModeIsEnabled,
            "it is not in the local cache as a whole, and HF_HUB_OFFLINE forbids to download it; "
            "unset HF_HUB_OFFLINE, or give a folder",
        ),
        (errors.GatedRepoError, f"it is gated; ask for access on {page}, then {login}"),
        (
            errors.RevisionNotFoundError,
            f"it has no revision {revision!r}; {page}/branches lists its branches and tags",
        ),
        (
            errors.RepositoryNotFoundError,
            f"there is no such repository, or it is private; check the name, or {login}",
        ),
        (errors.DisabledRepoError, f"it was disabled; see {page}"),
        (errors.HfHubHTTPError, _status),
        (_transport_error(), _no_answer),
        (
            json.JSONDecodeError,
            f"what {constants.ENDPOINT} answers is not the Hub's; look for a proxy or a login page "
            "in between, and at HF_ENDPOINT",
        ),
    ]
    for kind, sentence in told:
        for each in _chain(error):
            if isinstance(each, kind):
                return sentence if isinstance(sentence, str) else sentence(each)
    return one_line(error) + (f" ({one_line(error.__cause__)})" if error.__cause__ else "")


def _no_answer(error: Exception) -> str:
    from huggingface_hub import constants

    kind = type(error).__name__
    return f"no answer from {constants.ENDPOINT} ({kind}: {one_line(error)}); {_BUSY}"


def _status(error: Any) -> str:
    """What an HTTP status means for the user."""
    status = int(error.response.status_code)
    if status == HTTPStatus.UNAUTHORIZED:
        return "it does not accept the token; log in again with `hf auth login`, or renew HF_TOKEN"
    if status == HTTPStatus.FORBIDDEN:
        return f"the token may not do that ({one_line(error.server_message or error)})"
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        wait = error.response.headers.get("Retry-After", "")
        wait = f"; wait {wait} s" if wait.isdigit() else ""
        return f"it limits the rate of requests (429){wait}; {_BUSY}"
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return f"it fails ({status}); {_BUSY}"
    return one_line(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
