"""Renders pages, receipts and forms with small text, and questions about it.

A document has 256×256 pixels and text of 9 to 11 pixels: a company, a date, four to eight numbered
lines, and on receipts and forms prices with their total.
    "who wrote this?"             "Baker & Moss"    type `company`
    "what is the date?"           "17 Mar 2019"     type `date`
    "what is the total?"          "48.15"           type `total`, the sum of the prices; not of pages
    "what does line 3 say?"       "gray paper"      type `line`, of two lines
Words and numbers are drawn at random, so that nothing but the image tells them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from lit_mm.data.writing import DrawnSet, Pairs, font_of, in_any_order

SIDE, MARGIN = 256, 14
FONTS = {"page": "DejaVuSerif", "receipt": "DejaVuSansMono", "form": "DejaVuSans"}
NAMES = "Abbot Baker Carter Dunn Ellis Frost Grant Hale Ingram Jarvis Keller Lowe Moss North Owens Porter"
MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
QUALITIES = "black blue clean cold dry fresh gray green large new old plain red small soft white"
THINGS = "apples bread brush cable cloth coffee glue honey lamp milk paint paper rope salt soap tea"


@dataclass(frozen=True)
class Document:
    """What a document says.

    Args:
        kind: page, receipt or form.
        company: Who wrote it.
        date: Such as "17 Mar 2019".
        lines: Its numbered lines.
        prices: In cents, one for each line; none on a page.
        size: Height of the font, pixels.
        asked: Two of the lines, from 0.
    """

    kind: str
    company: str
    date: str
    lines: tuple[str, ...]
    prices: tuple[int, ...]
    size: int
    asked: tuple[int, ...]

    def questions(self) -> dict[str, Pairs]:
        """The type of the questions -> pairs of question and answer."""
        found = {"company": [("who wrote this?", self.company)], "date": [("what is the date?", self.date)]}
        if self.prices:
            found["total"] = [("what is the total?", in_units(sum(self.prices)))]
        return found | {"line": [(f"what does line {n + 1} say?", self.lines[n]) for n in self.asked]}

    def caption(self) -> tuple[str, str]:
        """The caption question, and all texts from top to bottom."""
        return "what is in the image?", " ".join(text for text, *_ in self.texts())

    def texts(self) -> list[tuple[str, int, int, str]]:
        """Every text, with the place of its anchor across and down, and the anchor as in Pillow."""
        left, right, step = MARGIN, SIDE - MARGIN, self.size + 8
        heading = {"page": self.company, "receipt": self.company, "form": f"Company: {self.company}"}[self.kind]
        dated = self.date if self.kind == "page" else f"Date: {self.date}"
        middle = self.kind == "receipt"
        place, anchor = (SIDE // 2, "mm") if middle else (left, "lm")
        found = [(heading, place, 24, anchor), (dated, place, 24 + step, anchor)]
        for number, line in enumerate(self.lines):
            down = 40 + (number + 2) * step
            found.append((f"{number + 1}. {line}", left, down, "lm"))
            found += [(in_units(self.prices[number]), right, down, "rm")] if self.prices else []
        if self.prices:
            down = 46 + (len(self.lines) + 2) * step
            found += [("Total", left, down, "lm"), (in_units(sum(self.prices)), right, down, "rm")]
        return found


def in_units(cents: int) -> str:
    """ "12.05" for 1205."""
    return f"{cents // 100}.{cents % 100:02}"


def make_document(split: str, number: int, seed: int = 0) -> Document:
    """The document with this number."""
    rng = random.Random(f"{seed} {split} {number} document")
    kind, count = rng.choice([*FONTS]), rng.randint(4, 8)
    lines = tuple(f"{rng.choice(QUALITIES.split())} {rng.choice(THINGS.split())}" for _ in range(count))
    prices = () if kind == "page" else tuple(rng.randint(50, 1999) for _ in lines)
    date = f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(2000, 2025)}"
    company, asked = " & ".join(rng.sample(NAMES.split(), 2)), tuple(rng.sample(range(count), 2))
    return Document(kind, company, date, lines, prices, rng.randint(9, 11), asked)


def render(document: Document) -> Image.Image:
    """The document, 256×256 pixels RGB, black on white."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    drawing = ImageDraw.Draw(image)
    for text, across, down, anchor in document.texts():
        drawing.text((across, down), text, "black", font_of(FONTS[document.kind], document.size), anchor=anchor)
    return image


DOCUMENTS = DrawnSet("document", make_document, render, in_any_order)
"""Documents as records; `DOCUMENTS.write` writes them."""
