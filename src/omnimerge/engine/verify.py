"""Hold a merged checkpoint against its manifest, its target and its recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from omnimerge.checkpoint.small_file import read_json
from omnimerge.checkpoint.writer import MANIFEST_NAME
from omnimerge.engine._verify_folder import CannotLookError, WrittenFolder
from omnimerge.engine._verify_inputs import MergedAgain
from omnimerge.errors import CheckpointError, OmnimergeError, OutputError

_Look = Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        state: ``ok``, ``failed``, or ``skipped`` where it could not be looked at.
        details: what was found, one sentence each.
    """

    name: str
    state: Literal["ok", "failed", "skipped"]
    details: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the check for JSON."""
        return {"name": self.name, "state": self.state, "details": list(self.details)}


def verify(out: Path, *, deep: bool = False, tensors: int = 20, seed: int = 0) -> list[Check]:
    """Verify the folder of a merge, a composition or an adapter, whichever its manifest says it is.

    Args:
        out: the folder.
        deep: also compute merged tensors again from the recipe, on the CPU; needs the inputs.
        tensors: how many, at least 1; all if there are fewer.
        seed: which ones.

    Returns:
        The checks, in order. Those that need inputs which are gone or have changed are skipped.

    Raises:
        OutputError: if the folder was not written by a merge.
    """
    described = _manifest(Path(out))
    with closing(WrittenFolder(Path(out), described)) as folder:
        checks: list[tuple[str, _Look]] = [("checksums of the files", folder.checksums)]
        again = None if "adapter" in described else MergedAgain(folder)
        headers = (folder.headers, *([again.headers] if again else []))
        checks += [
            ("names, shapes and dtypes", lambda: chain.from_iterable(look() for look in headers)),
            ("finite numbers", lambda: folder.finite(again.copied if again else _nothing)),
        ]
        if again and "composed" in described:
            checks += [
                ("unmerged tensors are the target's", again.kept),
                ("towers and projectors are their models'", again.parts),
            ]
        elif again:
            checks += [
                ("tied tensors", again.tied),
                ("unmerged tensors are the target's", again.kept),
                ("other files are the target's", again.files),
            ]
        if deep:
            name = f"{tensors} merged tensors computed again"
            computed = (lambda: again.again(max(1, tensors), seed)) if again else _no_adapter
            checks.append((name, computed))
        return [_run(name, look) for name, look in checks]


def _nothing(_: str) -> list[tuple[int, int]]:
    return []  # an adapter copies nothing


def _no_adapter() -> Iterator[str]:
    raise CannotLookError("an adapter is not computed again; write it again and compare the files")


def _run(name: str, look: _Look) -> Check:
    found: list[str] = []
    try:
        found.extend(look())
    except CannotLookError as reason:
        if not found:
            return Check(name, "skipped", (str(reason),))
    except OmnimergeError as error:
        found.append(str(error))
    return Check(name, "failed" if found else "ok", tuple(found))


_KINDS = {
    "adapter": dict,
    "composed": dict,
    "devices": dict,
    "tensors": dict,
    "recipe": dict,
    "inputs": dict,
    "files": dict,
    "forced": list,
}


def _manifest(out: Path) -> dict[str, Any]:
    try:
        found = read_json(out / MANIFEST_NAME)
        if not ("adapter" in found or {"tensors", "recipe"} <= set(found)):
            raise ValueError("it holds no merge")
        for key, kind in _KINDS.items():
            if not isinstance(found.get(key, kind()), kind):
                raise ValueError(f"its {key} are damaged")
        if not all(isinstance(each, str) for each in found.get("forced", ())):
            raise ValueError("its forced are damaged")
        for name, entry in found.get("tensors", {}).items():
            texts = (entry.get(key, "") for key in ("stored", "part", "from"))
            if not all(isinstance(each, str) for each in texts):
                raise ValueError(f"its tensor {name!r} is damaged")
    except (CheckpointError, ValueError, AttributeError) as error:
        reason = error if isinstance(error, CheckpointError) else f"{MANIFEST_NAME}: {error}"
        raise OutputError(
            f"{out} is no merged checkpoint: {reason}; give the folder that `omnimerge merge` wrote"
        ) from error
    return found
