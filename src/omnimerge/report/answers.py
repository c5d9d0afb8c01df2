"""The answers of a search, for people: read from disk, compared, and packed into a page.

Two answers count as the same here if they are equal case aside, as in the published scripts,
whatever distance the search was told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from omnimerge.report.words import marked, same_words
from omnimerge.search.study import CHECKS_NAME

if TYPE_CHECKING:
    from omnimerge.search import SearchResult

PAGE_LIMIT = 1_500_000  # bytes of answers in a page that compares any two points
TEXT_LIMIT = 4000  # characters of one answer there
TABLE_LIMIT = 200_000  # characters in the table that needs no script
_TABLE_ROWS = 40
_TABLE_TEXT = 1000
_MOST_COLUMNS = 60
_MOST_PAIRS = 12
_PARENTS = {"target": "the target alone", "donor": "the donor alone"}


@dataclass(frozen=True, eq=False)
class Column:
    """The answers of one model.

    Attributes:
        key: what the page's address calls it: ``0.2``, ``target``.
        label: what it is called on the page: ``alpha 0.2``.
        values: axis -> coefficient; empty for a parent.
        texts: prompt id -> answer.
        kinds: prompt id -> a number; equal for answers that are equal case aside.
    """

    key: str
    label: str
    values: Mapping[str, float]
    texts: Mapping[str, str]
    kinds: Mapping[str, int]


@dataclass(frozen=True)
class Cell:
    """One answer in the table that needs no script.

    Attributes:
        pieces: (text, whether it is marked as different).
        kind: ``chosen`` for the chosen point's, ``alike`` for one that equals it, or nothing.
        more: how many characters were left out.
        absent: whether there is none.
        note: how it differs from the chosen point's, where no mark tells.
    """

    pieces: list[tuple[str, bool]]
    kind: str = ""
    more: int = 0
    absent: bool = False
    note: str = ""


@dataclass(frozen=True)
class Table:
    """The chosen point against those beside it.

    Attributes:
        columns: the compared models; the chosen point is one of them.
        rows: (prompt id, cells) of prompts that are answered differently.
        differing: how many prompts are.
        same: (prompt id, answer) of the first prompts that are not.
        alike: how many prompts are not.
    """

    columns: list[Column]
    rows: list[tuple[str, list[Cell]]]
    differing: int
    same: list[tuple[str, str]]
    alike: int


@dataclass(frozen=True)
class Packed:
    """What the page's script reads.

    Attributes:
        text: JSON without ``<``, ``>`` and ``&``.
        prompts: how many prompts are in it.
        missing: how many prompts that change are not.
        columns: how many models are in it.
        cut: whether answers were cut.
    """

    text: str
    prompts: int
    missing: int
    columns: int
    cut: bool


class Answers:
    """All answers of a search that could be read.

    Args:
        folder: the search's folder.
        result: its result.
        read: whether there are answers; points that followed given ones have none of their own.

    Attributes:
        ids: the prompts' ids, in order.
        columns: the points whose answers are there, then the parents.
        chosen: the chosen point's column; None where its answers cannot be read.
        beside: the columns of its neighbours, or of a parent where there are none.
        changing: ids of the prompts that are not answered the same everywhere.
        problems: sentences about what could not be read.
    """

    def __init__(self, folder: Path, result: SearchResult, *, read: bool = True) -> None:
        self.ids: list[str] = []
        self.columns: list[Column] = []
        self.problems: list[str] = []
        self._known: dict[str, int] = {}
        single = len(result.axes) == 1
        for point in result.points if read else ():
            label = f"{result.axes[0].name} {point.label}" if single else point.label
            self._add(folder, point.responses, point.label, label, point.values)
        for parent, label in _PARENTS.items():
            name = f"{CHECKS_NAME}/{parent}.jsonl"
            if self.columns and (folder / name).is_file():
                self._add(folder, name, parent, label, {})
        self.chosen = self._at(result.selected)
        self.beside = self._neighbours() if self.chosen else []
        self.changing = [i for i in self.ids if self._kinds(i, self.columns) > 1]

    def differing(self, a: Column, b: Column) -> int:
        """Count the prompts that two models answer differently.

        Args:
            a: one.
            b: the other.

        Returns:
            The count.
        """
        return sum(self._kinds(i, (a, b)) > 1 for i in self.ids)

    def pairs(self) -> list[list[int]]:
        """Return how many prompts any two models answer differently; nothing for many models."""
        if not 2 <= len(self.columns) <= _MOST_PAIRS:
            return []
        return [[self.differing(a, b) for b in self.columns] for a in self.columns]

    def table(self) -> Table | None:
        """Compare the chosen point with those beside it, for readers without JavaScript.

        Returns:
            The table; None where there is nothing to compare.
        """
        if self.chosen is None or not self.beside:
            return None
        columns = [c for c in self.columns if c is self.chosen or c in self.beside]
        differing = [i for i in self.ids if self._kinds(i, columns) > 1]
        known = self.chosen.texts
        alike = [i for i in self.ids if i in known and self._kinds(i, columns) == 1]
        rows: list[tuple[str, list[Cell]]] = []
        spent = 0
        for prompt in differing[:_TABLE_ROWS]:
            cells = [self._cell(prompt, column) for column in columns]
            spent += sum(len(text) for cell in cells for text, _ in cell.pieces)
            if rows and spent > TABLE_LIMIT:
                break
            rows.append((prompt, cells))
        same = [(i, _clip(known[i], 200)[0]) for i in alike[:100]]
        return Table(columns, rows, len(differing), same, len(alike))

    def pack(self, limit: int = PAGE_LIMIT) -> Packed:
        """Pack the answers for the page's script.

        What differs around the chosen point goes first, then what changes anywhere, then the rest,
        as far as the limit goes. Every text is there once.

        Args:
            limit: bytes of the answers.

        Returns:
            The packed answers.
        """
        columns = self._packed_columns()
        texts: dict[str, int] = {}
        rows: dict[str, list[int]] = {}
        spent = 0
        for prompt in self._by_interest():
            new = {c.texts[prompt] for c in columns if prompt in c.texts} - texts.keys()
            spent += sum(len(_json(text[:TEXT_LIMIT]).encode("utf-8", "ignore")) for text in new)
            spent += 8 * len(columns)
            if rows and spent > limit:
                break
            # A model that did not answer has no text.
            rows[prompt] = [
                texts.setdefault(c.texts[prompt], len(texts)) if prompt in c.texts else -1
                for c in columns
            ]
        kinds: dict[str, int] = {}
        shown = [i for i in self.ids if i in rows]
        missing = sum(i not in rows for i in self.changing)
        data = {
            "columns": [{"key": c.key, "label": c.label} for c in columns],
            "a": columns.index(self.beside[0]) if self.beside else 0,
            "b": columns.index(self.chosen) if self.chosen else len(columns) - 1,
            "ids": shown,
            "rows": [rows[i] for i in shown],
            "texts": [text[:TEXT_LIMIT] for text in texts],
            "kinds": [kinds.setdefault(text.lower(), number) for text, number in texts.items()],
            "more": {n: len(t) - TEXT_LIMIT for t, n in texts.items() if len(t) > TEXT_LIMIT},
            "prompts": len(self.ids),
            "missing": missing,
        }
        return Packed(_json(data), len(rows), missing, len(columns), bool(data["more"]))

    def _add(
        self, folder: Path, name: str, key: str, label: str, values: Mapping[str, float]
    ) -> None:
        """Read one file, or say why not."""
        try:
            texts = _read(folder, name)
        except OSError as error:
            self.problems.append(f"{name} cannot be read ({error.strerror}): no answers of {label}")
            return
        except (ValueError, KeyError, TypeError):
            self.problems.append(f"{name} holds no answers that can be read: none of {label}")
            return
        if self.ids and not set(self.ids) & texts.keys():
            self.problems.append(f"{name} answers other prompts: no answers of {label}")
            return
        self.ids = self.ids or list(texts)
        known = self._known
        kinds = {i: known.setdefault(text.lower(), len(known)) for i, text in texts.items()}
        self.columns.append(Column(key, label, values, texts, kinds))

    def _at(self, values: Mapping[str, float]) -> Column | None:
        return next((column for column in self.columns if column.values == values), None)

    def _neighbours(self) -> list[Column]:
        """The nearest points on both sides along each axis, or a parent where there are none."""
        assert self.chosen is not None
        here, found = self.chosen.values, []
        for axis, value in here.items():
            line = [c for c in self.columns if c.values and _differ_in(c.values, here) == {axis}]
            below = [c for c in line if c.values[axis] < value]
            above = [c for c in line if c.values[axis] > value]
            found += [max(below, key=lambda c: c.values[axis])] if below else []
            found += [min(above, key=lambda c: c.values[axis])] if above else []
        return found or [column for column in self.columns if not column.values][:1]

    def _kinds(self, prompt: str, columns: Sequence[Column]) -> int:
        """How many different answers some models give to a prompt, case aside."""
        return len({c.kinds[prompt] for c in columns if prompt in c.kinds})

    def _cell(self, prompt: str, column: Column) -> Cell:
        assert self.chosen is not None
        own = self.chosen.texts.get(prompt, "")
        kind = "chosen" if column is self.chosen else ""
        if prompt not in column.texts:
            return Cell([], kind, absent=True)
        shown, more = _clip(column.texts[prompt], _TABLE_TEXT)
        if kind or self._kinds(prompt, (column, self.chosen)) == 1:
            return Cell([(shown, False)] if shown else [], kind or "alike", more)
        chosen, longer = _clip(own, _TABLE_TEXT)
        pieces, note = marked(shown, chosen), ""
        if pieces and not any(differs for _, differs in pieces):
            note = "lacks words of the chosen answer"
            if same_words(shown, chosen):
                note = "differs further on" if more or longer else "differs in white space only"
        return Cell(pieces, kind, more, note=note)

    def _by_interest(self) -> list[str]:
        near = [c for c in (self.chosen, *self.beside) if c is not None]
        changing = set(self.changing)
        rank = {i: 0 if self._kinds(i, near) > 1 else 1 if i in changing else 2 for i in self.ids}
        return sorted(self.ids, key=rank.__getitem__)

    def _packed_columns(self) -> list[Column]:
        """All models, or those nearest to the chosen point where there are too many."""
        if len(self.columns) <= _MOST_COLUMNS:
            return self.columns
        first = [c for c in (self.chosen, *self.beside) if c is not None]
        first += [column for column in self.columns if not column.values]
        middle = self.columns.index(self.chosen) if self.chosen else 0
        order = sorted(range(len(self.columns)), key=lambda i: abs(i - middle))
        first += [self.columns[i] for i in order if self.columns[i] not in first]
        kept = first[:_MOST_COLUMNS]
        return [column for column in self.columns if column in kept]


def _read(folder: Path, name: str) -> dict[str, str]:
    """Prompt id -> answer; files outside of the folder are not read."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"{name} is outside of the folder")
    text = (folder / relative).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    found = {str(row["id"]): str(row["response"]) for row in rows}
    if not found:
        raise ValueError(f"{name} is empty")
    return found


def _differ_in(a: Mapping[str, float], b: Mapping[str, float]) -> set[str]:
    return {axis for axis in a if a[axis] != b[axis]}


def _clip(text: str, most: int) -> tuple[str, int]:
    return text[:most], max(0, len(text) - most)


def _json(value: Any) -> str:
    """JSON that may stand inside of ``<script>``: nothing in it can end that element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
