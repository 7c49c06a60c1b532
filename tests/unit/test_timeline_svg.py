"""The picture of a cold start is well-formed, complete and to scale."""

import re
from xml.etree import ElementTree

from infra.bench.timeline_svg import LEFT, Start, draw

START = Start("m.gguf <1> & more", {"imports": (0.0, 0.5), "download": (0.25, 1.25)}, first_token=1.5, ideal=1.0)
SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_is_well_formed_and_complete():
    """Titles are escaped, and each phase has a bar and a label."""
    root = ElementTree.fromstring(draw([START, START], "a note"))
    texts = [text.text for text in root.iter(f"{SVG}text")]

    assert texts.count("m.gguf <1> & more") == 2
    assert texts.count("download") == 2
    assert "a note" in texts
    assert len([each for each in root.iter(f"{SVG}rect") if each.get("class") == "bar"]) == 4


def test_bars_are_to_scale():
    """The first token's line is at its time."""
    root = ElementTree.fromstring(draw([START], ""))
    bars = [each for each in root.iter(f"{SVG}rect") if each.get("class") == "bar"]
    first = next(each for each in root.iter(f"{SVG}line") if each.get("class") == "first")
    second = (float(first.get("x1")) - LEFT) / 1.5

    assert abs(float(bars[0].get("width")) - 0.5 * second) < 0.2
    assert abs(float(bars[1].get("x")) - LEFT - 0.25 * second) < 0.2


def test_the_picture_has_the_ratio():
    """The ratio is the benchmark's goal."""
    assert re.search(r"ratio 1\.50", draw([START], ""))
