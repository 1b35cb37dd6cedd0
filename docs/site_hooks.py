"""What mkdocs must be told of this repository: its documents lie beside the code, and link to code.

Documents outside docs/ become pages under their own path. A link to a document leads to its page; a link to anything
else of the repository becomes the name alone, since a site has no source tree. A link to nothing stays, and the strict
build refuses it.
"""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
BESIDE = (
    "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md",
    "benchmarks/README.md", "deploy/README.md", "distill/README.md", "kernels/README.md", "models/README.md",
    "service/README.md", "examples/emoji/README.md", "examples/emoji/ATTRIBUTION.md", "examples/emoji_motion/README.md",
)  # fmt: skip
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the documents that lie beside the code, under repository/."""
    for name in BESIDE:
        if (ROOT / name).exists():
            content = (ROOT / name).read_text(encoding="utf-8")
            files.append(File.generated(config, page_of(name), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at pages, wherever their documents lie."""
    source = source_of(page.file.src_uri)
    return LINK.sub(lambda found: rewrite(found, source, page.file.src_uri), markdown)


def page_of(name: str) -> str:
    """Return the site's source of a document of the repository."""
    return name.removeprefix("docs/") if name.startswith("docs/") else f"repository/{name}"


def source_of(uri: str) -> str:
    """Return the document of the repository that a site's source is made of."""
    return uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}"


def rewrite(found: re.Match[str], source: str, uri: str) -> str:
    """Return a link as it must stand on the page `uri`, which is made of `source`."""
    image, text, target, anchor = found[1], found[2], found[3], found[4] or ""
    if not target or "://" in target or target.startswith("mailto:"):
        return found[0]
    name = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if name == "README.md":  # the repository's front page is the site's
        name = "docs/README.md"
    if name in BESIDE or name.startswith("docs/"):
        here = posixpath.dirname(uri)
        return f"{image}[{text}]({posixpath.relpath(page_of(name), here or '.')}{anchor})"
    if not (ROOT / name).exists():
        return found[0]
    return text if text.startswith("`") else f"{text} (`{os.fspath(name)}`)"
