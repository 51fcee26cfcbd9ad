"""What the docs say of the code is what the code says of itself."""

from __future__ import annotations

import re
from pathlib import Path

import jaxcrit
from jaxcrit.commands.reference import options_page

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_of_options_is_current():
    page = (DOCS / "options.md").read_text(encoding="utf-8")
    assert page == options_page(), "python -m jaxcrit.commands.reference > docs/options.md"


def test_every_public_name_is_in_the_docs():
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    told = set(re.findall(r"\bjc\.(\w+)", text))
    assert {name for name in jaxcrit.__all__ if name[0].islower()} <= told
    assert told <= set(jaxcrit.__all__)


def test_links_between_pages_lead_somewhere():
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
