"""The model card of a merged checkpoint or adapter, from its manifest."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from omnimerge.errors import printable

_TEMPLATE = """\
---
{front}---
# {title}

Merged with [omnimerge](https://pypi.org/project/omnimerge/) {version} by the method `{method}`.
Architecture, tokenizer, processor and every tensor that was not merged are those of
{target}.

| input | commit | license, by its card |
|---|---|---|
{inputs}

| tensors | count |
|---|---|
{counts}

## Recipe

{fence}yaml
{recipe}{fence}

`merge_manifest.json` lists the inputs with sizes and header hashes, the versions, and what became
of every tensor.
"""
_ADAPTER = """\
---
{front}---
# {title}

A LoRA adapter for
{base}, {origin}
with [omnimerge](https://pypi.org/project/omnimerge/) {version}.

{fence}python
from peft import PeftModel

model = PeftModel.from_pretrained(model, folder)  # the base's model, and the folder of this file
{fence}

{fence}yaml
{recipe}{fence}

`merge_manifest.json` lists what it was made from, and the versions.
"""
_PINNED = re.compile(r"([\w.-]+/[\w.-]+)@[0-9a-f]{40}")


def write_card(folder: Path) -> None:
    """Write README.md into the folder of a merged checkpoint or adapter.

    Args:
        folder: a folder with ``merge_manifest.json``.
    """
    manifest = json.loads((folder / "merge_manifest.json").read_text(encoding="utf-8"))
    render = render_adapter_card if "adapter" in manifest else render_card
    (folder / "README.md").write_text(render(manifest), encoding="utf-8")


def render_card(manifest: dict[str, Any]) -> str:
    """Render the model card.

    Args:
        manifest: what ``merge_manifest.json`` holds.

    Returns:
        Markdown with a YAML front matter.
    """
    inputs = [entry["reference"] for entry in manifest["inputs"].values()]
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "omnimerge"]}
    if hub_ids := _hub_ids(manifest["recipe"]):
        front["base_model"] = hub_ids
        front["base_model_relation"] = "merge"
    front |= _common_license(list(manifest["inputs"].values()))
    recipe = manifest["recipe"]
    counts = [f"| merged by `{recipe['method']}` | {manifest['counts'][recipe['method']]} |"]
    counts += [f"| kept: {_cell(why)} | {n} |" for why, n in manifest["kept_reasons"].items()]
    written = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    return _TEMPLATE.format(
        front=yaml.safe_dump(front, sort_keys=False),
        title=_text(" + ".join(dict.fromkeys(Path(reference).name for reference in inputs))),
        version=manifest["versions"].get("omnimerge", ""),
        method=recipe["method"],
        target=_code(manifest["inputs"]["target"]["reference"]),
        inputs="\n".join(dict.fromkeys(map(_row, manifest["inputs"].values()))),
        counts="\n".join(counts),
        fence="`" * max(3, 1 + _longest_run(written)),
        recipe=written,
    )


def render_adapter_card(manifest: dict[str, Any]) -> str:
    """Render the model card of an adapter.

    Args:
        manifest: what ``merge_manifest.json`` holds.

    Returns:
        Markdown with a YAML front matter.
    """
    made, recipe = manifest["adapter"], manifest.get("recipe")
    front: dict[str, Any] = {"library_name": "peft", "tags": ["lora", "merge", "omnimerge"]}
    if recipe:
        base = manifest["inputs"]["target"]["reference"]
        origin = f"merged by the method `{recipe['method']}`"
        pinned = recipe.get("target") or recipe.get("base", "")
        names = [Path(entry["reference"]).name for entry in manifest["inputs"].values()]
        front |= _common_license(list(manifest["inputs"].values()))
    else:
        base = pinned = made["base"]
        origin = f"the difference of {_code(made['model'])} and it, written"
        names = [Path(made["base"]).name, Path(made["model"]).name]
    if match := _PINNED.fullmatch(pinned):
        front |= {"base_model": match.group(1), "base_model_relation": "adapter"}
    limits = {key: value for key, value in made.items() if value is not None}
    written = yaml.safe_dump((recipe or {}) | limits, sort_keys=False, allow_unicode=True)
    return _ADAPTER.format(
        front=yaml.safe_dump(front, sort_keys=False),
        title=_text(" + ".join(dict.fromkeys(names))),
        base=_code(base),
        origin=origin,
        version=manifest["versions"].get("omnimerge", ""),
        fence="`" * max(3, 1 + _longest_run(written)),
        recipe=written,
    )


def _hub_ids(recipe: Mapping[str, Any]) -> list[str]:
    """The repositories of a manifest's recipe, which names them with their commits."""
    references = [recipe.get("target"), recipe.get("base")]
    for entry in recipe.get("models", ()):
        references += [entry.get("model"), entry.get("adapter")]
    found = (_PINNED.fullmatch(reference or "") for reference in references)
    return list(dict.fromkeys(match.group(1) for match in found if match))


def _common_license(inputs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the cards of all inputs say; nothing where they differ, or one does not say."""
    parts = [part for entry in inputs for part in (entry, entry.get("adapter", entry))]
    first: dict[str, str] = parts[0].get("license", {})
    return first if all(part.get("license") == first for part in parts) else {}


def _row(entry: Mapping[str, Any]) -> str:
    parts = [entry, *([entry["adapter"]] if "adapter" in entry else [])]
    commits = " + ".join(part.get("revision", "-") for part in parts)
    licenses = " + ".join(part.get("license", {}).get("license", "-") for part in parts)
    return f"| {_cell(entry['reference'])} | {_cell(commits)} | {_cell(licenses)} |"


def _cell(text: str) -> str:
    return _text(text).replace("|", "\\|")


def _text(text: str) -> str:
    """A text of somebody else's, on one line and without markup of its own."""
    return re.sub(r"([\\`\[\]])", r"\\\1", printable(text)).replace("<", "&lt;")


def _code(text: str) -> str:
    """A text of somebody else's as code, in more backticks than it has."""
    ticks, text = "`" * (1 + _longest_run(text)), printable(text)
    return f"{ticks} {text} {ticks}" if len(ticks) > 1 else f"`{text}`"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
