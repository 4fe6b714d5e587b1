"""Benchmarks: questions with accepted answers, read from the files that their authors distribute.

    docvqa:PATH --split_name--> docvqa.yaml --load_benchmark--> Benchmark --source--> Questions: items by number
                                                                    |
    answers of a model ---------------------------------------- submission ------> the file that a server wants

A YAML file describes each benchmark (`definition`): where its files have the question, the image and the answers, the
prompt, and the metric. The ones in this folder come with the package; `my.yaml:PATH` reads another.
"""

from lit_mm.evaluation.benchmarks.benchmark import BENCHMARKS, Benchmark, load_benchmark, split_name

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "load_benchmark",
    "split_name",
]
