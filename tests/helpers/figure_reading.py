"""What a picture shows, for tests of figures."""

from collections import Counter
from pathlib import Path

from PIL import Image


def drawn(path: str | Path) -> tuple[tuple[int, int], Counter[str]]:
    """Width and height of a picture in pixels, and how many pixels have each colour, as `#rrggbb`."""
    with Image.open(path) as image:
        found = image.convert("RGB").getcolors(image.width * image.height) or []
        return image.size, Counter({"#" + bytes(colour).hex(): number for number, colour in found})  # type: ignore[arg-type]
