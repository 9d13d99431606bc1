"""Pictures made of smaller ones, pasted side by side or one below the other, and of text."""

import unicodedata
from functools import cache

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


Color = tuple[int, int, int]

PAPER, INK, FAINT = (255, 255, 255), (28, 28, 32), (110, 110, 118)

# Lengths in pixels
GAP = 12
LINE_GAP = 5
TITLE_SIZE = 18
TEXT_SIZE = 15
SWATCH_SIZE = 14
PANEL_WIDTH = 300


def panel_size(size: tuple[int, int], width: int = PANEL_WIDTH) -> tuple[int, int]:
    """(height, width) of the largest panel of this aspect ratio, at most `width` wide and 4/3 as high."""
    scale = min(width / size[1], width * 4 / 3 / size[0])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


@cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, which every machine has. It covers ASCII; see [`to_ascii`]."""
    return ImageFont.load_default(size)  # type: ignore[return-value]  # of this type, because a size is given


def to_ascii(text: str) -> str:
    """The text without accents, or nothing if other scripts are in it."""
    letters = unicodedata.normalize("NFKD", text)
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return plain if plain.isascii() else ""


def text_line(text: str, size: int = TEXT_SIZE, color: Color = INK) -> Image.Image:
    """One line. Its height does not depend on the letters."""
    font = load_font(size)
    canvas = Image.new("RGB", (max(1, round(font.getlength(text))), sum(font.getmetrics())), PAPER)
    ImageDraw.Draw(canvas).text((0, 0), text, color, font)
    return canvas


def heading(text: str, note: str = "") -> Image.Image:
    parts = [text_line(text, TITLE_SIZE)] + ([text_line(note, TITLE_SIZE, FAINT)] if note else [])
    return side_by_side(parts, LINE_GAP)


def paragraph(text: str, width: int) -> Image.Image:
    """Lines of at most `width`, broken at spaces."""
    font = load_font(TEXT_SIZE)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return stack([text_line(line, color=FAINT) for line in lines], 2)


def shorten(text: str, width: int) -> str:
    """The text, or as much of its beginning as fits, and an ellipsis."""
    font = load_font(TEXT_SIZE)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def swatch(color: Color) -> Image.Image:
    return Image.new("RGB", (SWATCH_SIZE, SWATCH_SIZE), color)


def entry(picture: Image.Image, text: str) -> Image.Image:
    return side_by_side([picture, text_line(text)], LINE_GAP)


def side_by_side(images: list[Image.Image], gap: int = GAP) -> Image.Image:
    """Side by side, centred vertically."""
    height = max(image.height for image in images)
    canvas = Image.new("RGB", (sum(image.width + gap for image in images) - gap, height), PAPER)
    left = 0
    for image in images:
        canvas.paste(image, (left, (height - image.height) // 2))
        left += image.width + gap
    return canvas


def stack(images: list[Image.Image], gap: int = GAP, centred: bool = False) -> Image.Image:
    """One below the other, aligned at the left or centred."""
    width = max(image.width for image in images)
    canvas = Image.new("RGB", (width, sum(image.height + gap for image in images) - gap), PAPER)
    top = 0
    for image in images:
        canvas.paste(image, ((width - image.width) // 2 if centred else 0, top))
        top += image.height + gap
    return canvas


def grid(rows: list[list[Image.Image | None]], width: int) -> Image.Image:
    """Cells in columns of one width, aligned at the top left; `None` stays empty."""
    heights = [max(cell.height for cell in row if cell) for row in rows]
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (columns * (width + GAP) - GAP, sum(heights) + GAP * (len(rows) - 1)), PAPER)
    top = 0
    for row, height in zip(rows, heights):
        for column, cell in enumerate(row):
            if cell:
                canvas.paste(cell, (column * (width + GAP), top))
        top += height + GAP
    return canvas


def to_image(colors: Tensor) -> Image.Image:
    """uint8 `(3, height, width)` -> image."""
    return Image.fromarray(colors.permute(1, 2, 0).contiguous().numpy())
