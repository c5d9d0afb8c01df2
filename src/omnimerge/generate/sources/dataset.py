"""Prompts in a Hugging Face dataset saved on disk (`Dataset.save_to_disk`).

Rows are read as they are stored: no image, sound or video is decoded, and only the columns that
become prompts are touched. Nothing is downloaded, and no code of a dataset runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from omnimerge.checkpoint.small_file import read_json
from omnimerge.errors import CheckpointError, PromptError, suggestion
from omnimerge.generate.sources.columns import choose
from omnimerge.generate.sources.embedded import MediaFolder
from omnimerge.generate.sources.prompt import FIELDS, Gathering, Prompt
from omnimerge.generate.sources.tables import prompt_of

_BATCH = 64
_ONE = ("state.json", "dataset_info.json")
_SPLITS = "dataset_dict.json"


def read(
    folder: Path,
    split: str | None,
    columns: Mapping[str, str],
    store: MediaFolder,
    *,
    labels: bool,
) -> list[Prompt]:
    """Read a dataset, or one split of a DatasetDict.

    Args:
        folder: what `save_to_disk` wrote.
        split: the split; None for a dataset without splits, or with one.
        columns: field of a prompt to column. Others are read from the column of their own name,
            where there is one; without a column for it, the id is the row's number, from 0.
        store: where embedded images and sounds go.
        labels: whether to read answers; else their column is not touched.

    Returns:
        The prompts, in the order of the dataset.

    Raises:
        PromptError: if the folder cannot be read as a dataset, or naming every problem at once.
    """
    source = str(folder) if split is None else f"{folder}#{split}"
    table = _load(_table(folder, split))
    own = {field: field for field in FIELDS}
    chosen = choose(source, table.column_names, columns, own, labels=labels)
    gathering = Gathering(source, "row")
    for number, raw in enumerate(_rows(table, sorted(set(chosen.values()))), start=1):
        cells = {field: raw[column] for field, column in chosen.items()}
        cells.setdefault("id", number - 1)
        for field in ("answer", "kind"):
            cells[field] = _named(table, chosen.get(field), cells.get(field))
        gathering.add(number, *prompt_of(cells, folder, store))
    return gathering.finish("holds no rows")


def _table(folder: Path, split: str | None) -> Path:
    """The folder of the one table that is meant."""
    if (folder / _SPLITS).is_file():
        splits = _splits(folder / _SPLITS)
        if split is None and len(splits) == 1:
            return folder / splits[0]
        listed = ", ".join(splits)
        if split is None:
            raise PromptError(f"{folder} has the splits {listed}; say which: {folder}#{splits[0]}")
        if split not in splits:
            raise PromptError(
                f"{folder} has no split {split!r}{suggestion(split, splits)}; it has {listed}"
            )
        return folder / split
    if not all((folder / name).is_file() for name in _ONE):
        raise PromptError(
            f"{folder}: cannot be read (a folder without {' and '.join(_ONE)}, or {_SPLITS}); give "
            "a file of prompts, or the folder of a dataset that `save_to_disk` wrote"
        )
    if split is not None:
        raise PromptError(f"{folder} is one dataset without splits; leave out #{split}")
    return folder


def _splits(file: Path) -> list[str]:
    try:
        splits = read_json(file)["splits"]
    except (CheckpointError, KeyError) as error:
        raise PromptError(f"{file} cannot be read ({error}); save the dataset again") from error
    if not isinstance(splits, list) or not splits:
        raise PromptError(f"{file} names no splits; save the dataset again")
    names = [str(name) for name in splits]
    if foreign := [name for name in names if Path(name).name != name or name == ".."]:
        raise PromptError(f"{file} names {foreign[0]!r}, which is no folder in it")
    return names


def _load(folder: Path) -> Any:
    try:
        datasets = import_module("datasets")
    except ImportError:
        raise PromptError(
            f"{folder} is a dataset saved on disk, and the library that reads it is not installed; "
            "`pip install 'omnimerge[datasets]'`"
        ) from None
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:
        raise _unreadable(folder, error) from error


def _rows(table: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows as stored: an image is its bytes, a class is its number."""
    batches = table.select_columns(columns).with_format("arrow").iter(batch_size=_BATCH)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:
            raise _unreadable("the dataset", error) from error
        if batch is None:
            return
        yield from batch.to_pylist()


def _unreadable(source: object, error: Exception) -> PromptError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return PromptError(f"{source} cannot be read as a dataset ({reason}); save it again")


def _named(table: Any, column: str | None, value: Any) -> Any:
    """The name of a class, where a column holds classes by number."""
    name = getattr(table.features.get(column), "int2str", None)
    return value if value is None or name is None else name(value)
