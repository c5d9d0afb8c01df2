"""The model card of a composed model, from its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_TEMPLATE = """\
---
{front}---
# {title}

Composed with [omnimerge](https://pypi.org/project/omnimerge/) {version}: the language models are
merged by the method `{method}`, each tower and projector is the one of its model. Architecture and
vocabulary of the language model are those of `{target}`.

| part | model | takes | tensors |
|---|---|---|---|
{parts}

{merged} tensors of the language model are merged, {kept} are the target's.

```python
import omnimerge  # tells transformers of composed models
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
```

## Recipe

```yaml
{recipe}```

`merge_manifest.json` lists the inputs with sizes and header hashes, the versions, and what became
of every tensor.
"""


def card(manifest: dict[str, Any]) -> str:
    """Render the model card.

    Args:
        manifest: what ``merge_manifest.json`` holds.

    Returns:
        Markdown with a YAML front matter.
    """
    inputs = [entry["reference"] for entry in manifest["inputs"].values()]
    hub_ids = [each.partition("@")[0] for each in inputs if _is_hub_id(each)]
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "any-to-any",
        "tags": ["merge", "omnimerge"],
    }
    if hub_ids:
        front["base_model"] = list(dict.fromkeys(hub_ids))
        front["base_model_relation"] = "merge"
    parts = manifest["composed"]
    rows = [
        f"| {name} | `{part['model']}` | {', '.join(part['provides'])} | {part['tensors']} |"
        for name, part in parts.items()
    ]
    method = manifest["recipe"]["method"]
    return _TEMPLATE.format(
        front=yaml.safe_dump(front, sort_keys=False),
        title=" + ".join(dict.fromkeys(Path(part["model"]).name for part in parts.values())),
        version=manifest["versions"].get("omnimerge", ""),
        method=method,
        target=manifest["inputs"]["target"]["reference"],
        parts="\n".join(rows),
        merged=manifest["counts"][method],
        kept=manifest["counts"]["kept"],
        recipe=yaml.safe_dump(manifest["recipe"], sort_keys=False, allow_unicode=True),
    )


def _is_hub_id(reference: str) -> bool:
    local = reference.startswith((".", "/", "~")) or Path(reference).exists()
    return reference.count("/") == 1 and not local
