"""Tasks whose documents lie beside their files, so that nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path

QUESTIONS = [
    ("The bird", ["sang", "ate the old stone"], 0),
    ("A day of rain", ["went", "came and"], 1),
    ("Then", ["it sang of days", "no"], 0),
    ("The cost", ["is five", "of it all is more than that"], 1),
    ("Of stones", ["none", "some", "many and many more"], 2),
]
CHOICE = """task: colours
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/questions.jsonl, train: {folder}/questions.jsonl}}
output_type: multiple_choice
test_split: test
fewshot_split: train
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2.0}}
"""
GENERATED = """task: echo
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/answers.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["e"], do_sample: false, max_gen_toks: 6}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
AWAY = """task: away
dataset_path: nobody/has-this
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{metric: acc}]
"""
WHOLE_TEXT = (
    CHOICE.replace("task: colours", "task: text")
    .replace("acc_norm", "byte_perplexity")
    .replace("{{metric: acc,", "{{metric: likelihood,")
)


def write_tasks(folder: Path, answers: list[str] | None = None) -> Path:
    """``colours`` (choices), ``echo`` (generated, right where it gives ``answers``), ``away`` (not here)."""
    folder.mkdir(exist_ok=True)
    rows = [{"question": q, "choices": choices, "gold": gold} for q, choices, gold in QUESTIONS]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = answers or ["?"] * len(QUESTIONS)
    rows = [{"question": q, "answer": answer} for (q, *_), answer in zip(QUESTIONS, given, strict=True)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("colours", CHOICE), ("echo", GENERATED), ("text", WHOLE_TEXT)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    (folder / "away.yaml").write_text(AWAY)
    return folder
