"""Folders of searches, made by hand from the schema of search.json."""

import json

import pytest

from omnimerge.search.result import (
    AxisInfo,
    Bootstrap,
    Diagnostics,
    NoiseFloor,
    Point,
    PointDiagnostics,
    PromptSource,
    SearchResult,
)

SHA = "0123456789abcdef" * 4


def write_answers(file, texts):
    """A file of answers as `AnswerStore` writes it: ASCII, prompt q0, q1, ..."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": f"q{i}", "response": text, "tokens": [1]} for i, text in enumerate(texts)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def file_name(values):
    return "_".join(f"{name}_{value:.2f}" for name, value in values.items())


def build(folder, answers, scores, selected, *, axes=("alpha",), accuracies=None, **changes):
    """A search's folder.

    Args:
        folder: where.
        answers: point, a tuple of coefficients -> the answers to q0, q1, ...
        scores: one per point.
        selected: the chosen point.
        axes: names.
        accuracies: one per point; None for a search without labels.
        **changes: of the result; `diagnostics`: of its diagnostics; `parents`: answers of the
            target and the donor alone.
    """
    points = [dict(zip(axes, point, strict=True)) for point in answers]
    columns = list(answers.values())
    known = accuracies or [None] * len(points)
    rows = []
    for values, texts, score, accuracy in zip(points, columns, scores, known, strict=True):
        name = f"responses/{file_name(values)}.jsonl"
        write_answers(folder / name, texts)
        rows.append(Point(values=values, score=score, responses=name, accuracy=accuracy))
    parents = changes.pop("parents", {})
    for name, texts in parents.items():
        write_answers(folder / "checks" / f"{name}.jsonl", texts)
    count = len(columns[0])
    source = PromptSource(file="p.jsonl", sha256=SHA, count=count, sample=None, seed=0)
    low = [texts and [text.lower() for text in texts] for texts in columns]
    about = {
        "points": tuple(
            PointDiagnostics(
                values=values,
                distinct_rate=len(set(texts)) / count,
                empty_rate=texts.count("") / count,
                mean_tokens=1.5,
                like_target=0.25 if parents else None,
                like_donor=0.5 if parents else None,
            )
            for values, texts in zip(points, low, strict=True)
        ),
        "changed_prompts": sum(len(set(row)) > 1 for row in zip(*low, strict=True)),
        "warnings": (),
        **changes.pop("diagnostics", {}),
    }
    best = min(score for score in scores if score is not None)
    result = SearchResult(
        **{
            "points": tuple(rows),
            "selected": dict(zip(axes, selected, strict=True)),
            "criterion": "unanimity",
            "axes": tuple(
                AxisInfo(name=name, grid=tuple(sorted({values[name] for values in points})))
                for name in axes
            ),
            "tie_set": tuple(p for p, s in zip(points, scores, strict=True) if s == best),
            "grid": "0:0.3:0.1",
            "prompts": source,
            "heldout": source if accuracies else None,
            "max_new_tokens": 4,
            "diagnostics": Diagnostics(**about),
            "recipe": {"method": "adamms", "target": "t/target", "models": [{"model": "d/donor"}]},
            "versions": {"omnimerge": "0"},
            "elapsed_s": 1.5,
            **changes,
        }
    )
    result.write(folder)
    return folder


@pytest.fixture
def make():
    """`build`, for tests."""
    return build


@pytest.fixture
def noise():
    return NoiseFloor(values={"alpha": 0.2}, prompts=4, differing=1)


@pytest.fixture
def bootstrap():
    return Bootstrap(samples=1000, interval={"alpha": (0.1, 0.2)}, same=0.875)
