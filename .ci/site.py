"""What the site of the documentation takes from outside docs/; a hook of mkdocs.yml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# Names on the site, and where they lie here: README is the first page.
TAKEN = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "model_card.md": "jaxcrit/assets/demo_model/MODEL_CARD.md",
    "CITATION.cff": "CITATION.cff",
}
# Results that pages link to.
for page in (ROOT / "docs").glob("*.md"):
    for source in re.findall(r"\]\(\.\./([^)#:]+)\)", page.read_text(encoding="utf-8")):
        TAKEN.setdefault(Path(source).name, source)


def on_files(files: Any, config: Any) -> Any:
    """Adds them."""
    for name, source in TAKEN.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Has links lead to where the site has what they name."""
    for name, source in TAKEN.items():
        markdown = markdown.replace(f"]({source})", f"]({name})").replace(f"](../{source})", f"]({name})")
    return markdown.replace("](docs/", "](")
