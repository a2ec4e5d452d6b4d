"""Task files for lm-eval, in one folder: reading lm-eval's index takes seconds for each folder."""

import json
from pathlib import Path

from .models import SHARED

CHOICES = """output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_target: label
doc_to_choice: choices
fewshot_split: test
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
GENERATED = """output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - name: first-word
    filter: [{function: regex, regex_pattern: "(\\\\S+)"}, {function: take_first}]
"""
GROUP = """group: ours_group
task: [ours_code, ours]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""
SEVERAL = [
    {"q": "a", "choices": ["b", "c", "d", "e"], "label": [0, 2]},
    {"q": "b", "choices": ["c", "d"], "label": [1]},
]


def write_tasks(folder: Path) -> Path:
    """Write the tasks of 20 questions ``ours``, ``ours_generated`` and ``ours_code``, a group, and further ones.

    ``several`` has questions with several right answers; ``local_arc_easy`` and ``local_piqa`` need the measuring data;
    ``absent``, ``needs_package`` and ``needs_switch`` cannot be loaded.
    """
    rows = [
        {"q": f"Is {i} more", "choices": [f"than {i - 1}", f"or {i} less", "neither"], "label": i % 3}
        for i in range(20)
    ]
    for name, content in (("data", rows), ("several", SEVERAL)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    (folder / "package.py").write_text("import no_such_package\n\n\ndef f(*args): ...\n")
    (folder / "switch.py").write_text("raise ValueError('to run code, set HF_ALLOW_CODE_EVAL')\n")
    real = CHOICES.replace("{{q}}", "Question: {{question}}\\nAnswer:")
    tasks = {
        "ours": (CHOICES, folder / "data"),
        "ours_generated": (GENERATED, folder / "data"),
        "ours_code": (f"{CHOICES}unsafe_code: true\n", folder / "data"),
        "several": (CHOICES, folder / "several"),
        "local_arc_easy": (real, SHARED / "arc_easy"),
        "local_piqa": (real, SHARED / "piqa"),
        "absent": (CHOICES, folder / "absent"),
        "needs_package": (f"{CHOICES}process_results: !function package.f\n", folder / "data"),
        "needs_switch": (f"{CHOICES}process_results: !function switch.f\n", folder / "data"),
    }
    for name, (content, data) in tasks.items():
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}.jsonl}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}{content}metadata: {{version: 1.0}}\n")
    (folder / "group.yaml").write_text(GROUP)
    return folder
