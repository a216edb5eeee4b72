"""What mkdocs asks while it builds the site (mkdocs.yml): pages that docs/ does not hold, and links to them.

Links are written as GitHub reads them, relative to the file that they stand in. Here they become links
between pages of the site, and ``--strict`` refuses one that leads nowhere.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

from build_atlas import entry, families, heading

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "osp_diag/text/README.md": "built_in_text.md",
    "LICENSE": "LICENSE",
    "CITATION.cff": "CITATION.cff",
}
"""Files outside docs/, and what the site calls them."""
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def on_config(config: Any) -> Any:
    """Put the pages of the estimators into the navigation, by family."""
    chapters: list[Any] = ["estimators.md"]
    for module, classes in families().items():
        chapters.append({heading(module): [{cls.name: f"estimators/{cls.name}.md"} for cls in classes]})
    for section in config["nav"]:
        if "Statistics" in section:
            section["Statistics"] = chapters
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add what does not stand in docs/."""
    for path, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    for classes in families().values():
        for cls in classes:
            files.append(File.generated(config, f"estimators/{cls.name}.md", content=entry(cls, level=1)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead the links of a page from files of the repository to pages of the site."""
    at_site = page.file.src_uri
    outside = {name: path for path, name in OUTSIDE.items()}
    here = posixpath.dirname(outside.get(at_site, f"docs/{at_site}"))

    def lead(link: re.Match[str]) -> str:
        if "://" in link[2]:
            return link[0]
        path = posixpath.normpath(posixpath.join(here, link[2]))
        name = OUTSIDE.get(path, path.removeprefix("docs/"))
        return link[1] + posixpath.relpath(name, posixpath.dirname(at_site) or ".") + link[3]

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else _LINK.sub(lead, part) for part in parts)
