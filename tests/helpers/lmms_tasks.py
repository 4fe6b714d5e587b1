"""A folder with tasks for lmms-eval over a parquet file, as its own tasks are: YAML, and functions in utils.py."""

from pathlib import Path

import datasets

from tests.helpers.benchmark_files import write_parquet

FUNCTIONS = '''
def visual(doc):
    return [doc["image"].convert("RGB")]


def text(doc, lmms_eval_specific_kwargs=None, round_idx=None, previous_output=None, previous_round_info=None):
    """Two rounds: the question, and the question again with what was answered."""
    if round_idx is None:
        return doc["question"]
    told = f"{doc['question']} you said {previous_output[-1]}, and now?"
    return visual(doc), told, round_idx == 2, previous_output, None


def options(doc):
    return list(doc["options"])


def exact(doc, results):
    return {"right": float(results[0].strip().lower() == doc["answer"].strip().lower())}


def last(doc, results):
    """Only that there is an answer for both rounds."""
    return {"right": float(len(results[0]) == 2)}


def mean(scores):
    return sum(scores) / len(scores)
'''
TASK = """
task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {folder}/questions.parquet}}}}
test_split: test
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
"""
SCORED = """
process_results: !function utils.{score}
metric_list: [{{metric: right, aggregation: !function utils.mean, higher_is_better: true}}]
generation_kwargs: {{max_new_tokens: {length}, temperature: 0, top_p: 1.0, num_beams: 1, do_sample: false}}
"""
ANSWERS = "output_type: generate_until" + SCORED
ROUNDS = "output_type: generate_until_multi_round" + SCORED
CHOICE = """
output_type: multiple_choice
doc_to_choice: !function utils.options
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def write_tasks(folder: Path, rows: list[dict], length: int) -> Path:
    """Tasks answers, rounds and choice, whose names begin with lit_mm_.

    Args:
        folder: Where.
        rows: Of the table: image (the file's bytes), question, answer, options.
        length: The most tokens of an answer.
    """
    folder.mkdir(parents=True)
    write_parquet(folder / "plain.parquet", rows)
    table = datasets.Dataset.from_parquet(str(folder / "plain.parquet"), cache_dir=str(folder / "cache"))
    table.cast_column("image", datasets.Image()).to_parquet(folder / "questions.parquet")
    (folder / "utils.py").write_text(FUNCTIONS)
    kinds = {"answers": ANSWERS.format(score="exact", length=length), "choice": CHOICE}
    kinds["rounds"] = ROUNDS.format(score="last", length=length)
    for name, kind in kinds.items():
        head = TASK.format(name=f"lit_mm_{name}", folder=folder)
        (folder / f"{name}.yaml").write_text(head + kind)
    return folder
