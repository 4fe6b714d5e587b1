"""Renders sheets of random text, from which a model with a pretrained LLM learns to read before it sees documents.

A sheet is 1152 pixels high and 576 wide and has one to forty rows of made-up words, prices, dates and numbers, some
with a label before them. Fonts, sizes, gray tones and sharpness vary, and texts are wider or narrower than their fonts,
as on a scan that was resized without keeping its aspect ratio.
    "what is in the image?"        all rows, from top to bottom
    "what does line 3 say?"        "14/02/2019 KEMORA"   type `line`, about the first and the middle row
    "what is the TUKAN?"           "35.20"               type `value`, about one or two labels
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFilter

from lit_mm.data.writing import DrawnSet, Pairs, font_of, in_any_order

WIDTH, HEIGHT, MARGIN = 576, 1152, 24
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif", "STIXGeneral")
VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnprstvwyz"


@dataclass(frozen=True)
class Sheet:
    """What a sheet shows.

    Args:
        rows: A text, or a label and its value, for each row.
        font: One of FONTS.
        size: Height of the font, pixels.
        top: Place of the first row, pixels.
        step: From one row to the next, pixels.
        stretch: The largest factor by which texts may be wider than their font.
        tones: Gray of paper and ink, 0 to 255.
        blur: Radius in pixels.
        centered: Whether rows are centered; labels and values stand at the two sides then.
    """

    rows: tuple[tuple[str, ...], ...]
    font: str
    size: int
    top: int
    step: int
    stretch: float
    tones: tuple[int, int]
    blur: float
    centered: bool

    def questions(self) -> dict[str, Pairs]:
        """The type of the questions -> pairs of question and answer."""
        places = sorted({0, len(self.rows) // 2})
        found = {"line": [(f"what does line {place + 1} say?", " ".join(self.rows[place])) for place in places]}
        values = [(f"what is the {row[0]}?", row[1]) for row in self.rows if len(row) == 2]
        return found | ({"value": values[:2]} if values else {})

    def caption(self) -> tuple[str, str]:
        """The caption question, and all rows."""
        return "what is in the image?", "\n".join(" ".join(row) for row in self.rows)


def make_sheet(split: str, number: int, seed: int = 0) -> Sheet:
    """The sheet with this number. Half of all sheets have five rows or fewer."""
    rng = random.Random(f"{seed} {split} {number} sheet")
    size = rng.randint(16, 34)
    step = round(size * rng.uniform(1.2, 1.8))
    count = round(min(40, (HEIGHT - 2 * MARGIN) // step) ** rng.random())
    top = MARGIN + rng.randint(0, HEIGHT - 2 * MARGIN - count * step)
    rows: list[tuple[str, ...]] = []
    labels: set[str] = set()
    for _ in range(count):
        label = _word(rng).upper()
        if label not in labels and rng.random() < 0.3:
            labels.add(label)
            rows.append((label, _figure(rng)))
        else:
            rows.append((" ".join(_text(rng) for _ in range(rng.randint(1, 4))),))
    tones = rng.randint(190, 255), rng.randint(0, 90)
    font, stretch, blur, centered = rng.choice(FONTS), rng.uniform(0.8, 1.8), rng.uniform(0, 1), rng.random() < 0.5
    return Sheet(tuple(rows), font, size, top, step, stretch, tones, blur, centered)


def _text(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return _figure(rng)
    styled = rng.choice([str.upper, str.upper, str.title, str.lower])(_word(rng))
    return rng.choice(["{}", "{}", "{}", "{},", "{}.", "{}:", "({})", "*{}", "{}-"]).format(styled)


def _word(rng: random.Random) -> str:
    syllables = (rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 4)))
    return "".join(syllables) + rng.choice(["", rng.choice(CONSONANTS)])


def _figure(rng: random.Random) -> str:
    """A price, a date, a time or a number."""
    price = f"{rng.randint(0, 10 ** rng.randint(1, 3))}.{rng.randint(0, 99):02}"
    mark, day, month, year = rng.choice("/-."), rng.randint(1, 31), rng.randint(1, 12), rng.randint(1999, 2026)
    date = f"{day:02}{mark}{month:02}{mark}{rng.choice([str(year), f'{year % 100:02}'])}"
    time = f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    number = "".join(rng.choices("0123456789", k=rng.randint(1, 9)))
    return rng.choice([price, price, f"RM {price}", date, date, time, number, f"{number[:3]}-{number}"])


def render(sheet: Sheet) -> Image.Image:
    """The sheet, 1152×576 pixels of gray."""
    font, (paper, ink) = font_of(sheet.font, sheet.size), sheet.tones
    widest = max(font.getlength("    ".join(row)) for row in sheet.rows)
    width = round(max(widest + 2 * MARGIN, WIDTH / sheet.stretch))
    image = Image.new("L", (width, HEIGHT), paper)
    drawing = ImageDraw.Draw(image)
    for number, row in enumerate(sheet.rows):
        down = sheet.top + sheet.step * number + sheet.size
        places: list[tuple[float, str]] = [(width / 2, "ms") if sheet.centered else (MARGIN, "ls")]
        if len(row) == 2:
            value = (width - MARGIN, "rs") if sheet.centered else (MARGIN + font.getlength(f"{row[0]}    "), "ls")
            places = [(MARGIN, "ls"), value]
        for text, (across, anchor) in zip(row, places, strict=True):
            drawing.text((across, down), text, ink, font, anchor=anchor)
    image = image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    return image.filter(ImageFilter.GaussianBlur(sheet.blur))


SHEETS = DrawnSet("sheet", make_sheet, render, in_any_order)
"""Sheets as records; `SHEETS.write` writes them."""
