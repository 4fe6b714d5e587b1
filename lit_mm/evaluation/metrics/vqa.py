"""VQA accuracy: an answer is right if three of the ten people who were asked gave it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lit_mm.evaluation.metrics.base import AnswerMetric

FEWEST = 4
"""With fewer people, an answer could not be right even if all of them gave it."""
PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
ARTICLES = {"a", "an", "the"}
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(WORDS)}
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've 'ow's'at
"""
CONTRACTIONS = {
    word[: place.start()] + word[place.end() :]: word for word in CONTRACTED.split() for place in re.finditer("'", word)
}
"""A contraction with one of its apostrophes missing -> the contraction."""


class VQAAccuracy(AnswerMetric):
    """Mean over the ten people of min(1, how many of the nine others gave the answer / 3) (VQAv2, TextVQA, VizWiz;
    arXiv 1505.00468).

    Answers compare after `normalize_vqa`. With fewer than ten references the mean is over those that there are, as
    lmms-eval's code has it; LLaVA's and MMF's code insists on ten. Fewer than four are refused: nothing could then
    be right.
    """

    def score(self, answer: str, references: Sequence[str]) -> float:
        """The accuracy of one answer.

        Args:
            answer: What the model wrote.
            references: The people's answers, n >= 4, usually 10.

        Raises:
            ValueError: There are fewer than four references.
        """
        if len(references) < FEWEST:
            expected = f"VQA accuracy needs the answers of at least {FEWEST} people (usually 10)"
            raise ValueError(f"{expected}, found {len(references)}: {list(references)!r}")
        same, people = list(map(normalize_vqa, references)).count(normalize_vqa(answer)), len(references)
        agreeing, others = min(1, max(0, same - 1) / 3), min(1, same / 3)
        return (same * agreeing + (people - same) * others) / people


def normalize_vqa(answer: str) -> str:
    """How VQA answers compare: EvalAI's rules, as in MMF's, LLaVA's and lmms-eval's TextVQA code.

    Lower case, no articles, digits for the numbers up to ten, apostrophes put back into contractions, no commas and
    question marks, no full stops except before a digit. Other punctuation is removed if there is white space before or
    after it anywhere in the answer, and replaced by white space otherwise.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.strip().replace("\n", " ").replace("\t", " ")
    cleaned = text
    for mark in PUNCTUATION:
        cleaned = cleaned.replace(mark, "" if f"{mark} " in text or f" {mark}" in text else " ")
    words = (NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", cleaned).split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
