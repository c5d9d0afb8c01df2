"""One tokenizer for all parts: which tokens they bring, what they are called, which rows they have.

The target's vocabulary stays as it is. A part brings its placeholders, and the tokens that its chat
template and its processor write around media. A token that the target has under the same name keeps
the target's id; one that another part has brought already gets a name, and so an id, of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnimerge.compose.part_processor import PartProcessor
from omnimerge.errors import CheckpointError


@dataclass(frozen=True)
class Brought:
    """A token of a part.

    Attributes:
        part: the part's name.
        token: its name in the part's own tokenizer.
        native: its id there.
        name: its name in the composed model's tokenizer.
        id: its id there, and its row in embedding and head.
    """

    part: str
    token: str
    native: int
    name: str
    id: int


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of the target.

    Args:
        folder: its checkpoint.

    Returns:
        The tokenizer.

    Raises:
        CheckpointError: if there is none.
    """
    from transformers import AutoTokenizer

    patterns = ("tokenizer.json", "vocab.*", "*.model", "tekken.json", "*.tiktoken")
    if not any(any(folder.glob(pattern)) for pattern in patterns):
        raise CheckpointError(
            f"{folder} has no tokenizer (none of {', '.join(patterns)}); add the tokenizer files "
            "that were published with the model"
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise CheckpointError(f"cannot load the tokenizer of {folder}: {error}") from error


def bring(tokenizer: Any, parts: Mapping[str, PartProcessor]) -> list[Brought]:
    """Add the tokens of all parts to a tokenizer, which is changed, and tell the parts.

    Args:
        tokenizer: the target's.
        parts: name -> processor; their `tokens` are set.

    Returns:
        The tokens, part by part.
    """
    from tokenizers import AddedToken

    found: list[Brought] = []
    for name, part in parts.items():
        theirs = part.inner.tokenizer
        for token in part.brought():
            taken = {each.name for each in found if each.part != name}
            ours = f"<|{name}:{token.strip('<|>')}|>" if token in taken else token
            added = AddedToken(ours, special=True, normalized=False)
            tokenizer.add_tokens([added], special_tokens=True)
            number = int(tokenizer.convert_tokens_to_ids(ours))
            native = int(theirs.convert_tokens_to_ids(token))
            found.append(Brought(name, token, native, ours, number))
            part.tokens[token] = ours
    return found


_FLATTENED = """\
{{%- set media = {snippets} -%}}
{{%- set seen = namespace({counts}) -%}}
{{%- set said = namespace(turns=[], text='') -%}}
{{%- for turn in messages -%}}
{{%- if turn['content'] is string -%}}
{{%- set said.turns = said.turns + [dict(turn, content={text_only})] -%}}
{{%- else -%}}
{{%- set said.text = '' -%}}
{{%- for piece in turn['content'] -%}}
{{%- if piece['type'] == 'text' -%}}{{%- set said.text = said.text + piece['text'] -%}}
{branches}
{{%- else -%}}{{{{ raise_exception('this model takes no ' + piece['type']) }}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- set said.turns = said.turns + [dict(turn, content={text})] -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- set messages = said.turns %}}"""


def chat_template(template: str, snippets: Mapping[str, str], *, as_parts: bool) -> str:
    """Write a chat template that takes media, and hands text to another.

    Args:
        template: Jinja source of a template for text.
        snippets: modality -> what stands for one medium; ``{n}`` for its number in the chat.
        as_parts: whether `template` takes ``[{'type': 'text', ...}]`` instead of a text.

    Returns:
        Jinja source.
    """
    branches = "\n".join(
        f"{{%- elif piece['type'] == '{kind}' -%}}{{%- set seen.{kind} = seen.{kind} + 1 -%}}"
        f"{{%- set one = media['{kind}'].replace('{{n}}', seen.{kind}|string) -%}}"
        f"{{%- set said.text = said.text + one -%}}"
        for kind in snippets
    )
    wrapped = "[{{'type': 'text', 'text': {}}}]" if as_parts else "{}"
    listed = ", ".join(f"'{kind}': {_literal(text)}" for kind, text in snippets.items())
    return (
        _FLATTENED.format(
            snippets="{" + listed + "}",
            counts=", ".join(f"{kind}=0" for kind in snippets) or "none=0",
            text_only=wrapped.format("turn['content']"),
            text=wrapped.format("said.text"),
            branches=branches,
        )
        + template
    )


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
