"""Small task files for lm-evaluation-harness, one of each kind of request, with their items beside them."""

import json
from pathlib import Path

CHOICE = """task: own_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: items.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
  - metric: acc_norm
metadata: {version: 3}
"""
ROLLING = """task: own_rolling
dataset_path: json
dataset_kwargs:
  data_files:
    test: items.jsonl
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
metadata: {version: 1}
"""
UNTIL = """task: own_until
dataset_path: json
dataset_kwargs:
  data_files:
    test: items.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e"], do_sample: false, max_gen_toks: 12}
metric_list:
  - metric: exact_match
metadata: {version: 1}
"""
TASKS = ("own_choice", "own_rolling", "own_until")


def write_tasks(place: Path) -> Path:
    """Writes the three tasks into a folder and gives the folder back."""
    words = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "small", "model", "learns", "what", "said"]
    items = [
        {
            "prompt": " ".join(words[: 3 + index % 7]) + f" {index}",
            "choices": [words[index % 5], words[index % 5 + 3] + " tomorrow", "x"],
            "answer": index % 3,
        }
        for index in range(11)
    ]
    (place / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    for name, text in zip(TASKS, (CHOICE, ROLLING, UNTIL), strict=True):
        (place / f"{name}.yaml").write_text(text)
    return place
