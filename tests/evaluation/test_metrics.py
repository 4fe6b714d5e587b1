"""Answers judged by hand-made cases, by the arithmetic of the rule, and over two processes."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lit_mm.evaluation.metrics import METRICS, ExactMatch, MMEScore, VQAAccuracy, YesNo, majority_share, normalize
from lit_mm.evaluation.metrics.choice import chosen
from lit_mm.evaluation.metrics.vqa import normalize_vqa

COLORS = ("B", "blue", "red", "blue", "light blue", "vitamin C")
"""References of a question whose options are these four, the second of them right."""
CASES = [
    ("exact", "Yes.", ["yes"], 1),
    ("exact", "a  red\ncircle", ["circle", "a red circle"], 1),
    ("exact", "straße", ["strasse"], 0),
    ("exact", "", [""], 1),
    ("exact", "", ["no"], 0),
    ("anls", "Fonalleras", ["Fonolleras", "x"], 0.9),  # one of ten letters
    ("anls", "1995", ["1998"], 0.75),
    ("anls", "ABCD", ["abxy"], 0.5),  # exactly half: counts, as on the server
    ("anls", "abcd", ["axyz"], 0),  # a quarter
    ("anls", "the answer is 7", ["7"], 0),  # longer than the reference: 14 of 15 letters too many
    ("anls", "New  York\n", ["new york"], 1),
    ("anls", "Zürich", ["zurich"], 5 / 6),
    ("anls", "", ["a"], 0),
    ("anls", "", [""], 1),
    ("relaxed", "105", ["100"], 1),
    ("relaxed", "95", ["100"], 1),
    ("relaxed", "105.01", ["100"], 0),
    ("relaxed", "-105", ["-100"], 1),
    ("relaxed", "100", ["-100"], 0),
    ("relaxed", "12.5%", ["0.125"], 1),
    ("relaxed", "12.5%", ["12.5"], 0),
    ("relaxed", "5%", ["5.2%"], 1),
    ("relaxed", "1,000", ["1000"], 0),  # not a number to the rule
    ("relaxed", "1,000", ["1,000"], 1),
    ("relaxed", "$5", ["5"], 0),
    ("relaxed", "$5", ["$5"], 1),
    ("relaxed", "0.0", ["0"], 0),  # an expected 0 is compared as text
    ("relaxed", " 0", ["0"], 1),
    ("relaxed", "Yes", ["no", "yes"], 1),
    ("relaxed", "five", ["5"], 0),
    ("relaxed", "nan", ["5"], 0),
    ("relaxed", "", ["5"], 0),
    ("yes_no", "Yes, there is a dog.", ["yes"], 1),
    ("yes_no", "No", ["no"], 1),
    ("yes_no", "There is not a dog. Yes", ["no"], 1),  # the first sentence counts
    ("yes_no", "A dog. No cat", ["yes"], 1),
    ("yes_no", "nothing", ["yes"], 1),  # not the word no
    ("yes_no", "NO", ["no"], 0),  # as POPE's code reads it
    ("yes_no", "", ["no"], 0),
    ("mme", "YES it is", ["Yes", "OCR", "1.png"], 1),
    ("mme", "I say no", ["No", "OCR", "1.png"], 0),  # not in the first four characters
    ("mme", "None", ["No", "OCR", "1.png"], 1),
    ("mme", "maybe", ["No", "OCR", "1.png"], 0),
    ("choice", "B", COLORS, 1),
    ("choice", "(C)", COLORS, 0),
    ("circular", "B", [*COLORS, "241"], 1),
    ("circular", "vitamin C", [*COLORS, "241"], 0),
    ("box", "[0.1, 0.1, 0.5, 0.5]", ["[0.1,0.1,0.5,0.5]"], 1),
    ("box", "[0, 0, 1, 0.5]", ["[0, 0, 1, 1]"], 1),  # IoU exactly one half
    ("box", "[0, 0, 1, 0.49]", ["[0, 0, 1, 1]"], 0),
    ("box", "[0, 0, .2, .3]", ["[0.1, 0, 0.3, 0.3]"], 0),  # 0.03 of 0.09
    ("box", "The box is [0, 0, 1, 1]. [0, 0, .1, .1]", ["[0, 0, 1, 1]"], 1),  # the first one
    ("box", "[0.5, 0.5, 0.1, 0.1]", ["[0.1, 0.1, 0.5, 0.5]"], 0),  # corners the wrong way around
    ("box", "[0, 0, 1, 1]", ["[0, 0, 0.1, 0.1]", "[0, 0, 1, 0.9]"], 1),
    ("box", "[0, 0, 1]", ["[0, 0, 1, 1]"], 0),
    ("box", "[0, 0, 1, nan]", ["[0, 0, 1, 1]"], 0),
    ("box", "0, 0, 1, 1", ["[0, 0, 1, 1]"], 0),
    ("box", "", ["[0, 0, 1, 1]"], 0),
]


@pytest.mark.parametrize(("name", "answer", "references", "expected"), CASES)
def test_score_of_one_answer(name, answer, references, expected):
    assert METRICS[name]().score(answer, references) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" Yes. ", "yes"),
        ("a  red\ncircle", "a red circle"),
        ("3.5", "3.5"),
        ('"no"!', "no"),
        ("", ""),
        ("-5", "-5"),
        ("C++", "c++"),
        ("5%", "5%"),
        ("!", "!"),
    ],
)
def test_normalize(answer, expected):
    assert normalize(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A red  Bus", "red bus"),
        ("the an a", ""),
        ("", ""),
        ("Two", "2"),
        ("none of ten", "0 of 10"),
        ("twenty one", "twenty 1"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("twas", "'twas"),
        ("dog's", "dog 's"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("st. 5.", "st 5"),
        (".5", ".5"),
        ("well-known", "well known"),
        ("a well - known - one", "well known 1"),  # at a space: removed
        ("24/7", "24 7"),
        ("and/or /", "andor"),  # one of them touches a space: all are removed
        ("(left)", "left"),
        ("é\tü\n", "é ü"),
        ("50%", "50%"),
        ("$5?", "$5"),
    ],
)
def test_normalize_vqa(answer, expected):
    assert normalize_vqa(answer) == expected


@pytest.mark.parametrize("same", range(11))
def test_vqa_is_the_mean_over_those_who_leave_one_out(same):
    people = ["two"] * same + ["The dog!"] * (10 - same)
    left = [people[:one] + people[one + 1 :] for one in range(10)]
    expected = sum(min(1, others.count("two") / 3) for others in left) / 10
    assert VQAAccuracy().score("2.", people) == pytest.approx(expected)


def test_vqa_of_few_people():
    assert VQAAccuracy().score("red", ["red"] * 4) == 1  # three others agree, whoever is left out
    assert VQAAccuracy().score("red", ["red", "a", "b", "c", "d"]) == pytest.approx(4 / 15)  # 0, and 4 times 1/3
    with pytest.raises(ValueError, match=r"at least 4 people \(usually 10\), found 1: \['red'\]"):
        VQAAccuracy().score("red", ["red"])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("B) ", "B"),
        ("Answer: B", "B"),
        ("answer: b", "B"),
        ("The correct answer is (B).", "B"),
        ("The answer is B because C is wrong", "B"),
        ("Option B", "B"),
        ("B. blue", "B"),
        ("(B) blue", "B"),
        ("B. red", "B"),
        ("A. vitamin C.", "A"),
        ("Blue.", "B"),
        ("light blue", "C"),
        ("vitamin C", "D"),
        ("It is blue", "B"),
        ("I think B", "B"),
        ("答案是B", "B"),
        ("E", None),  # no such option
        ("A or B", None),
        ("A, B", None),
        ("Both A and B.", None),
        ("The answer is A or B", None),
        ("A. red\nB. blue", None),
        ("A. red or B. blue", None),
        ("It is light blue", None),  # blue and light blue
        ("red, blue", None),
        ("bluebird", None),
        ("A cat", None),
        ("none", None),
        ("", None),
    ],
)
def test_the_option_that_an_answer_means(answer, expected):
    assert chosen(answer, COLORS[2:]) == expected


def test_options_that_are_numbers_or_letters():
    assert chosen("It costs $3.5", ["5", "3.5"]) == "B"
    assert chosen("B", ["B", "A"]) == "B"  # the letter, which the prompt asks for


@pytest.mark.parametrize(
    ("name", "references", "told"),
    [
        ("exact", "yes", "must be a list of strings, not 'yes'"),
        ("exact", [], "no references for the answer 'x'"),
        ("yes_no", ["maybe"], "must be yes or no, not 'maybe'"),
        ("mme", ["yes", "smell", "1.jpg"], "one of existence, count,"),
        ("mme", ["yes"], "and the image; found"),
        ("choice", ["C", "blue", "red", "blue"], "the right letter, its text, and the texts of all options"),
        ("choice", ["B"], "the right letter, its text"),
        ("circular", ["B", "blue", "red", "241"], "the right letter, its text"),
        ("box", ["0 0 1 1"], "expected a box"),
        ("box", ["[1, 0, 0, 1]"], "x1 < x2"),
    ],
)
def test_references_that_cannot_be_read(name, references, told):
    with pytest.raises((TypeError, ValueError), match=told):
        METRICS[name]().update(["x"], [references])


def test_as_many_answers_as_questions():
    with pytest.raises(ValueError, match="longer"):
        ExactMatch().update(["x"], [["x"], ["y"]])


def test_accuracy_over_updates_even_as_bfloat16():
    metric = torch.nn.ModuleList([ExactMatch()]).to(torch.bfloat16)[0]  # as the bf16-true plugin does
    assert metric.compute().isnan()
    for _ in range(1000):
        metric.update(["Yes", "no.", "teal"], [["yes"], ["yes"], ["teal"]])
    assert metric.compute() == pytest.approx(2 / 3, abs=1e-7)
    assert metric.figures() == {}
    metric.reset()
    assert metric.compute().isnan()


def test_majority():
    assert majority_share(["yes", "Yes.", "no", "red"]) == 0.5


def test_pope_figures():
    metric = YesNo()
    answers = ["yes"] * 3 + ["yes"] + ["no"] * 2 + ["no"] * 4
    labels = ["yes"] * 3 + ["no"] + ["yes"] * 2 + ["no"] * 4
    metric.update(answers, [[label] for label in labels])
    assert metric.compute() == pytest.approx(0.7)
    assert metric.figures() == pytest.approx({"precision": 3 / 4, "recall": 3 / 5, "f1": 2 / 3, "yes_rate": 0.4})


def test_pope_without_any_yes():
    metric = YesNo()
    metric.update(["no"], [["no"]])
    assert metric.figures() == {"precision": 0, "recall": 0, "f1": 0, "yes_rate": 0}


MME = [
    ("Yes", ["Yes", "OCR", "1.png"]),
    ("No", ["No", "OCR", "1.png"]),
    ("Yes", ["Yes", "OCR", "2.png"]),
    ("Yes", ["No", "OCR", "2.png"]),
    ("Yes", ["Yes", "count", "1.png"]),  # another image than OCR's
    ("hm", ["No", "count", "1.png"]),
    ("no", ["No", "code_reasoning", "1.png"]),
    ("yes", ["Yes", "code_reasoning", "1.png"]),
    ("yes", ["Yes", "code_reasoning", "2.png"]),  # alone with its image
]
MME_FIGURES = {
    "perception": 75 + 50 + 50,
    "cognition": 200,
    "OCR": 75 + 50,
    "count": 50,
    "code_reasoning": 100 + 100,
    "accuracy": 7 / 9,
    "accuracy_plus": 2 / 4,
    "unpaired": 1,
}


def test_mme_points():
    metric = MMEScore()
    assert metric.compute() == 0
    for answer, references in MME:
        metric.update([answer], [references])
    assert metric.compute() == 175
    assert metric.figures() == pytest.approx(MME_FIGURES)
    metric.update(["no"], [MME[0][1]])
    with pytest.raises(ValueError, match="in OCR an image has 3"):
        metric.figures()


CIRCULAR = [  # two options, two rounds
    ("A", ["A", "cat", "cat", "dog", "241"]),
    ("B", ["B", "cat", "dog", "cat", "241"]),
    ("A", ["A", "cat", "cat", "dog", "242"]),
    ("A", ["B", "cat", "dog", "cat", "242"]),
    ("dog", ["B", "dog", "cat", "dog", "243"]),  # its second round was not asked
]


def test_every_round_of_a_question_must_be_right():
    metric = METRICS["circular"]()
    assert metric.compute().isnan()
    for answer, references in CIRCULAR:
        metric.update([answer], [references])
    assert metric.compute() == pytest.approx(2 / 3)
    assert metric.figures() == pytest.approx({"answer_accuracy": 4 / 5, "incomplete": 1})


@pytest.mark.slow
def test_two_processes_count_as_one(tmp_path: Path):
    """Uneven shares, MME's pairs torn apart, and a process without questions."""
    mp.start_processes(_rank, (tmp_path,), 2, start_method="forkserver")
    for name, metric in METRICS.items():
        alone = metric()
        alone.update(*zip(*_questions(name), strict=True))
        for cut in ("first", "all"):
            for rank in range(2):
                value, figures = torch.load(tmp_path / f"{name}_{cut}_{rank}.pt")
                assert value == alone.compute(), name
                assert figures == alone.figures()


def _questions(name: str) -> list[tuple[str, list[str]]]:
    if name == "vqa":
        return [("red", ["red", "a", "b", "c", "d"]), ("x", ["red"] * 10), ("1", ["one"] * 10)]
    if name in ("mme", "circular"):
        return MME if name == "mme" else CIRCULAR
    return [(answer, list(own)) for case, answer, own, _ in CASES if case == name]


def _rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, metric in METRICS.items():
        questions = _questions(name)
        for cut, bounds in (("first", (0, 1, len(questions))), ("all", (0, len(questions), len(questions)))):
            begin, end = list(pairwise(bounds))[rank]
            own = metric()
            for answer, references in questions[begin:end]:
                own.update([answer], [references])
            torch.save((own.compute(), own.figures()), folder / f"{name}_{cut}_{rank}.pt")
    dist.destroy_process_group()


def test_every_metric_has_cases():
    assert {name for name, *_ in CASES} | {"vqa"} == set(METRICS)
