"""The model card of a merged checkpoint, from its manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

_TEMPLATE = """\
---
{front}---
# {title}

Merged with [omnimerge](https://pypi.org/project/omnimerge/) {version} by the method `{method}`.
Architecture, tokenizer, processor and every tensor that was not merged are those of
`{target}`.

| tensors | count |
|---|---|
{counts}

## Recipe

```yaml
{recipe}```

`merge_manifest.json` lists the inputs with sizes and header hashes, the versions, and what became
of every tensor.
"""


def write_card(folder: Path) -> None:
    """Write README.md into a merged checkpoint's folder.

    Args:
        folder: a folder with ``merge_manifest.json``.
    """
    manifest = json.loads((folder / "merge_manifest.json").read_text(encoding="utf-8"))
    (folder / "README.md").write_text(render_card(manifest), encoding="utf-8")


def render_card(manifest: dict[str, Any]) -> str:
    """Render the model card.

    Args:
        manifest: what ``merge_manifest.json`` holds.

    Returns:
        Markdown with a YAML front matter.
    """
    inputs = [entry["reference"] for entry in manifest["inputs"].values()]
    hub_ids = [reference for reference in inputs if _is_hub_id(reference)]
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "omnimerge"]}
    if hub_ids:
        front["base_model"] = list(dict.fromkeys(h.partition("@")[0] for h in hub_ids))
        front["base_model_relation"] = "merge"
    recipe = manifest["recipe"]
    counts = [f"| merged by `{recipe['method']}` | {manifest['counts'][recipe['method']]} |"]
    counts += [f"| kept: {_cell(why)} | {n} |" for why, n in manifest["kept_reasons"].items()]
    return _TEMPLATE.format(
        front=yaml.safe_dump(front, sort_keys=False),
        title=" + ".join(dict.fromkeys(Path(reference).name for reference in inputs)),
        version=manifest["versions"].get("omnimerge", ""),
        method=recipe["method"],
        target=manifest["inputs"]["target"]["reference"],
        counts="\n".join(counts),
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
    )


def _is_hub_id(reference: str) -> bool:
    local = reference.startswith((".", "/", "~")) or Path(reference).exists()
    return reference.count("/") == 1 and not local


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
