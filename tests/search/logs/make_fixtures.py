"""Write the logs in this folder, as the harnesses write them.

python -m venv v
v/bin/pip install lmms-eval==0.7.3 pandas openpyxl xlsxwriter
HF_HUB_OFFLINE=1 v/bin/python make_fixtures.py

The logs of lmms-eval 0.7.3 are made by its own command, whose model `from_log` repeats the answers
of the logs of 0.2.3. The older ones follow the code of their versions (`save_results_samples` of
the tags v0.3.5 and v0.6.1, `cli_evaluate_single` of v0.2.3). The predictions of VLMEvalKit are
written as its `vlmeval/smp/file.py` does. Dates in names are replaced, and nothing else.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
TASK = "demo_vqa"
QUESTIONS = ["What is it?", "How many?", "고양이인가요?", "Which sign?", "What is written?"]
LABELS = ["cat", "2", "네", "None", "x"]
ANSWERS = {
    "0.0": ["cat", "2", "네", "None", ""],
    "0.1": ["Cat", "3", "네", "NA", ""],
    "0.2": ["dog", "3", "네.", "NA", "=1+1"],
    "0.3": ["dog", "3", "아니요", "NA", 'a\tb\n"c"\u2028d'],
}
NUMBERS = ["1", "02", "3.0", "1,000", "-5"]
THOUGHTS = ["<think>fur</think>cat", "2", "<think>yes</think>네", "None", ""]
FORMATS = {"2": "lmms-eval-0.3.5", "3": "lmms-eval-0.6.1", "4": "lmms-eval-0.7.3"}
NO_DOCUMENT = hashlib.sha256(b"null").hexdigest()  # requests[0].doc is never set


def sample(number: int, answer: str, filtered: str | None = None) -> dict:
    """What lmms-eval has in memory before it writes."""
    return {
        "doc_id": number,
        "doc": {"question": QUESTIONS[number], "answer": LABELS[number]},
        "target": LABELS[number],
        "arguments": [QUESTIONS[number], {"max_new_tokens": 8, "until": ["\n\n"]}],
        "resps": [[answer]],
        "filtered_resps": [answer if filtered is None else filtered],
        "doc_hash": NO_DOCUMENT,
        "exact_match": float(answer == LABELS[number]),
    }


def first_generation(folder: Path, alpha: str, answers: list[str]) -> Path:
    """v0.2.3: one JSON object."""
    run = folder / f"0713_0915_merged_{alpha}_llava_model_args_{alpha[-1] * 6}"
    run.mkdir(parents=True)
    logs = [sample(number, answer) for number, answer in enumerate(answers)]
    for log in logs:
        log["arguments"] = [log["arguments"]]
    args = {"model": f"merged-{alpha}", "model_args": f"pretrained=merged-{alpha}", "limit": None}
    data = {"args": args, "model_configs": {"task": TASK}, "logs": logs, "time": "0713_0915"}
    file = run / f"{TASK}.json"
    file.write_text(json.dumps(data, indent=4, ensure_ascii=False), encoding="utf-8")
    results = {"results": {TASK: {"exact_match,none": 0.2}}, "configs": {TASK: {"task": TASK}}}
    (run / "results.json").write_text(json.dumps(results, indent=4))
    return file


def second_generation(log: dict) -> dict:
    """v0.2.4 to v0.3.5."""
    log = {**log, "input": log["arguments"][0], "target": str(log["target"])}
    log["arguments"] = dict(enumerate(log["arguments"][1]))
    return log


def third_generation(log: dict) -> dict:
    """v0.4 to v0.6.1."""
    log = {**log, "input": log["arguments"][0], "target": str(log["target"])}
    if log["filtered_resps"] == log["resps"][0] or log["filtered_resps"] == log["resps"]:
        log.pop("resps")
    log.pop("arguments")
    log.pop("doc")
    return log


def append(file: Path, logs: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        for log in logs:
            stream.write(json.dumps(log, ensure_ascii=False) + "\n")


def lines(generation: str, alpha: str, answers: list[str]) -> None:
    """Two processes of two GPUs, gathered one after the other: ids are not in order."""
    convert = {"2": second_generation, "3": third_generation}[generation]
    logs = [sample(number, answer) for number, answer in enumerate(answers)]
    name = f"20260218_101500_samples_{TASK}.jsonl"
    file = HERE / FORMATS[generation] / f"checkpoints__merged-{alpha}" / name
    append(file, [convert(log) for log in logs[0::2] + logs[1::2]])


def repeated_filters() -> None:
    """A task with two filters logs every document twice; resps are there where they differ."""
    strict = [sample(0, "The answer is B.", "B"), sample(1, "7", "7")]
    loose = [sample(0, "The answer is B.", "the answer is b"), sample(1, "7", "7")]
    file = HERE / FORMATS["3"] / "two-filters.jsonl"
    append(file, [third_generation(log) for log in strict + loose])


def fourth_generation(first: Path, alpha: str, target: Path) -> None:
    """lmms-eval's own command, on a task of ours."""
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        (work / "tasks").mkdir()
        (work / "tasks" / "utils.py").write_text("def no_image(doc):\n    return []\n")
        (work / "tasks" / f"{TASK}.yaml").write_text(
            f"task: {TASK}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {work}/docs.jsonl}}}}\n"
            "test_split: test\noutput_type: generate_until\n"
            'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
            "doc_to_visual: !function utils.no_image\n"
            "generation_kwargs: {max_new_tokens: 8}\n"
            "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        )
        docs = [{"question": q, "answer": a} for q, a in zip(QUESTIONS, LABELS, strict=True)]
        append(work / "docs.jsonl", docs)
        (work / "logs").mkdir()
        shutil.copy(first, work / "logs")
        command = [sys.executable, "-m", "lmms_eval", "--model", "from_log", "--tasks", TASK]
        command += ["--model_args", f"logs={work}/logs,model_name=merged-{alpha}"]
        command += ["--include_path", f"{work}/tasks", "--output_path", f"{work}/out"]
        ran = subprocess.run([*command, "--log_samples"], capture_output=True, text=True)
        written = list((work / "out").rglob("*_samples_*.jsonl"))
        if len(written) != 1:  # its printed table may fail for want of a package, after the log
            raise SystemExit(ran.stdout + ran.stderr)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(written[0], target)


def frame(answers: list[str]):
    import pandas as pd

    count = len(answers)
    return pd.DataFrame(
        {
            "index": range(100, 100 + count),
            "question": QUESTIONS[:count],
            "answer": LABELS[:count],
            "category": ["demo"] * count,
            "prediction": [str(answer) for answer in answers],
        }
    )


def predictions(name: str, answers: list[str], formats: tuple[str, ...]) -> None:
    """VLMEvalKit's dump: xlsx, tsv, json."""
    import pandas as pd

    data = frame(answers)
    for suffix in formats:
        file = HERE / "vlmevalkit" / name / f"{name}_DEMO.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if suffix == "xlsx":
            kwargs = {"options": {"strings_to_formulas": False}}
            with pd.ExcelWriter(file, engine="xlsxwriter", engine_kwargs=kwargs) as writer:
                data.to_excel(writer, index=False)
        elif suffix == "tsv":
            data.to_csv(file, sep="\t", index=False, encoding="utf-8", quoting=csv.QUOTE_ALL)
        else:
            with file.open("w") as stream:
                json.dump(data.to_dict("records"), stream, indent=4, ensure_ascii=False)


def edited() -> None:
    """The workbook after someone has opened it and pandas has made numbers of its texts."""
    import pandas as pd

    data = frame(NUMBERS)
    data["prediction"] = [1.0, 2.0, 3.0, 1000.0, 0.1]
    data["index"] = [100.0, 101.0, 102.0, 103.0, 104.0]
    data.to_excel(HERE / "vlmevalkit" / "edited.xlsx", index=False, engine="openpyxl")
    assert isinstance(pd.read_excel(HERE / "vlmevalkit" / "edited.xlsx")["index"][0].item(), int)


def main() -> None:
    for folder in ("lmms-eval-0.2.3", *FORMATS.values(), "vlmevalkit"):
        shutil.rmtree(HERE / folder, ignore_errors=True)
    for alpha, answers in ANSWERS.items():
        first = first_generation(HERE / "lmms-eval-0.2.3", alpha, answers)
        lines("2", alpha, answers)
        lines("3", alpha, answers)
        name = f"20260218_101500_samples_{TASK}.jsonl"
        fourth_generation(first, alpha, HERE / FORMATS["4"] / f"merged-{alpha}" / name)
        predictions(f"merged-{alpha}", answers, ("xlsx", "tsv", "json"))
    with tempfile.TemporaryDirectory() as scratch:
        thoughts = first_generation(Path(scratch), "0.1", THOUGHTS)
        fourth_generation(thoughts, "0.1", HERE / FORMATS["4"] / "thoughts.jsonl")
    repeated_filters()
    predictions("numbers", NUMBERS, ("xlsx", "tsv"))
    edited()


if __name__ == "__main__":
    main()
