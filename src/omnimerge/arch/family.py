"""One layout: how a family of checkpoints names, fuses and duplicates the tensors of its LLM."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from omnimerge.checkpoint.yaml_file import read_mapping

COMPONENTS = ("llm", "vision", "audio", "projector", "other")
BRANCHES = ("text", "vision")
EMBED, HEAD = VOCABULARY_SLOTS = ("llm.embed.weight", "llm.head.weight")

Op = Literal["rename", "concat", "grouped"]


@dataclass(frozen=True, slots=True)
class Entry:
    """What one name inside a layer stands for.

    Attributes:
        slots: the slots that the tensor holds, stacked along its rows.
        op: `rename` (one slot), `concat` (one after the other), or `grouped` (queries, keys and
            values interleaved by key/value head).
        branch: `text` or `vision` where the checkpoint holds the slot twice, else empty.
    """

    slots: tuple[str, ...]
    op: Op = "rename"
    branch: str = ""

    @property
    def label(self) -> str:
        """The slots in one word, without the branch."""
        return "+".join(self.slots)


@dataclass(frozen=True)
class Layout:
    """How one family of checkpoints names its language model.

    Attributes:
        name: key, for people and for JSON.
        about: which checkpoints use it.
        marker: a prefix that some tensor must have, or an empty string.
        layers: prefix of a layer's tensors, with ``{i}`` for its number.
        embed: name of the token embedding, without its leaf.
        norm: name of the final norm, without its leaf.
        head: name of the output head, without its leaf.
        block: name inside a layer, without its leaf -> what it stands for.
        inserted: a layer in which a name starts with this is none of the language model's own.
        own: a name inside a layer that holds one of these is the checkpoint's own addition.
        components: prefix on disk -> prefix of the slot, before the general table.
    """

    name: str
    about: str
    layers: str
    embed: str
    norm: str
    head: str
    block: Mapping[str, Entry]
    marker: str = ""
    inserted: str = ""
    own: tuple[str, ...] = ()
    components: Mapping[str, str] = field(default_factory=dict)

    def slots(
        self, names: Iterable[str], numbers: Mapping[int, int] | None = None
    ) -> dict[str, str]:
        """Give every tensor its slot.

        Args:
            names: all tensor names of a checkpoint, or some of them with `numbers`.
            numbers: layer on disk -> layer in the slot; default: what `names` tell.

        Returns:
            Name -> slot, in order. A fused tensor's slot joins those that it holds with ``+``. A
            name inside a layer that the layout does not know keeps its own words.
        """
        names = list(names)
        whole = {self.embed: "embed", self.norm: "norm", self.head: "head"}
        numbers = self.layer_numbers(names) if numbers is None else numbers
        pattern = layer_pattern(self.layers)
        found = {}
        for name in names:
            stem, _, leaf = name.rpartition(".")
            match = pattern.match(name)
            if stem in whole:
                found[name] = f"llm.{whole[stem]}.{leaf}"
            elif not match or any(word in name[match.end() :] for word in self.own):
                found[name] = self.component_slot(name)
            elif (number := numbers.get(int(match.group(1)))) is None:
                found[name] = f"projector.inserted.{match.group(1)}.{name[match.end() :]}"
            else:
                found[name] = self._layer_slot(number, name[match.end() :])
        return found

    def layer_numbers(self, names: Iterable[str]) -> dict[int, int]:
        """Number the language model's own layers, from 0, inserted ones left out.

        Args:
            names: all tensor names of a checkpoint.

        Returns:
            Number on disk -> number in the slot.
        """
        pattern = layer_pattern(self.layers)
        seen, inserted = set(), set()
        for name in names:
            if match := pattern.match(name):
                seen.add(int(match.group(1)))
                if self.inserted and name.startswith(self.inserted, match.end()):
                    inserted.add(int(match.group(1)))
        return {index: number for number, index in enumerate(sorted(seen - inserted))}

    def entry(self, name: str) -> Entry | None:
        """Return what a tensor name inside a layer stands for.

        Args:
            name: a tensor name on disk.

        Returns:
            The entry; None outside of the layers, or where the layout does not know the name.
        """
        match = layer_pattern(self.layers).match(name)
        return self.block.get(name[match.end() :].rpartition(".")[0]) if match else None

    def component_slot(self, name: str) -> str:
        """Return the slot of a tensor outside of the language model.

        Args:
            name: a tensor name on disk.

        Returns:
            For example ``vision.encoder.layers.0.mlp.fc1.bias``.
        """
        for table in (self.components, general_tables()["components"]):
            fitting = [prefix for prefix in table if name.startswith(prefix)]
            if fitting:
                prefix = max(fitting, key=len)
                return f"{table[prefix]}{name[len(prefix) :]}"
        for word, words in general_tables()["words"].items():
            if any(each in name.lower() for each in words):
                return f"{word}.{name}"
        stem = self.layers.partition("layers.{i}")[0]
        if stem not in ("", "model.") and name.startswith(stem):  # such as learned positions
            return f"llm.{name[len(stem) :]}"
        return f"other.{name}"

    def fit(self, names: Sequence[str]) -> int:
        """Return how well the layout fits: 0 for not at all, else 1 + the names that it knows.

        Args:
            names: all tensor names of a checkpoint.

        Returns:
            The number of different names inside layers that the layout knows, plus one. It does
            not fit unless embedding, final norm and a gap-free run of layers from 0 are there.
        """
        if self.marker and not any(name.startswith(self.marker) for name in names):
            return 0
        if not _has_stem(names, self.embed) or not _has_stem(names, self.norm):
            return 0
        indices, inner = set(), set()
        for name in names:
            if match := layer_pattern(self.layers).match(name):
                indices.add(int(match.group(1)))
                inner.add(name[match.end() :].rpartition(".")[0])
        if not indices or indices != set(range(len(indices))):
            return 0
        return 1 + len(inner & set(self.block))

    def misfit(self, names: Sequence[str]) -> str:
        """Return why the layout does not fit.

        Args:
            names: all tensor names of a checkpoint.

        Returns:
            What is missing, in words.
        """
        for stem in (self.embed, self.norm):
            if not _has_stem(names, stem):
                return f"there is no tensor {stem}.*"
        if self.marker and not any(name.startswith(self.marker) for name in names):
            return f"no tensor begins with its marker {self.marker}"
        return f"there is no gap-free run of layers {self.layers}*"

    def _layer_slot(self, number: int, rest: str) -> str:
        inner, _, leaf = rest.rpartition(".")
        entry = self.block.get(inner, Entry((inner,)))
        branch = f"@{entry.branch}" if entry.branch else ""
        return f"llm.layers.{number}.{entry.label}.{leaf}{branch}"


def _has_stem(names: Iterable[str], stem: str) -> bool:
    """Whether a tensor is called so, but for its leaf."""
    dot = len(stem)
    return any(name.startswith(stem) and name.rfind(".") == dot for name in names)


def split_branch(slot: str) -> tuple[str, str]:
    """Split a slot into the slot itself and its branch.

    Args:
        slot: for example ``llm.layers.3.attn.q.weight@vision``.

    Returns:
        For example ``("llm.layers.3.attn.q.weight", "vision")``; the branch may be empty.
    """
    base, _, branch = slot.partition("@")
    return base, branch


@lru_cache(maxsize=1)
def general_tables() -> dict[str, Any]:
    """Return ``components.yaml``: prefixes and words of components, and suffixes of buffers."""
    return read_mapping(Path(__file__).parent / "components.yaml")


@lru_cache(maxsize=64)
def layer_pattern(prefix: str) -> re.Pattern[str]:
    """Return the pattern of names inside a layer.

    Args:
        prefix: a layer's prefix, with ``{i}`` for its number.

    Returns:
        A pattern with one group, the number.
    """
    before, _, after = prefix.partition("{i}")
    return re.compile(re.escape(before) + r"([0-9]{1,9})" + re.escape(after))
