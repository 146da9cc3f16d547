"""Makes the site whole: the README is its first page, the list of pages one more, and a link to a file of the
repository leads to a page that shows the file.

Pages link to source as GitHub wants it, `../kernels/...`. Here every such file becomes a page under source/,
and a folder a page that lists its files; a link to what is not there is a warning.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<=\]\()(?P<path>[^)#\s:]+)(?=[)#])")
PICTURE = re.compile(r'(?<=src=")(?P<path>[^":]+)(?=")|(?<=srcset=")(?P<set>[^":]+)(?=")')
FENCE = re.compile(r"^(`{3,}).*?^\1\s*?$", re.M | re.S)
LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml", ".md": "markdown", ".yml": "yaml", "": "text"}
HIDDEN = ("__pycache__", ".")

log = logging.getLogger("mkdocs.hooks.source_pages")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README, and a page for each file and folder that some page links to."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=as_in_docs(readme)))
    pages = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "pages.md", content=pages))
    for page in list(files.documentation_pages()):
        for path in linked(page.content_string, PurePosixPath(page.src_uri).parent):
            add(path, files, config)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to files of the repository to their pages."""
    if page.file.src_uri.startswith("source/"):
        return markdown
    folder = PurePosixPath(page.file.src_uri).parent

    def lead(match: re.Match[str]) -> str:
        path = repository_path(match["path"], folder)
        if path.startswith("docs/"):
            return "pages.md" if path == "docs/README.md" else match["path"]
        target = "index.md" if path == "README.md" else source_page(path)
        return os.path.relpath(target, folder)

    return outside_fences(markdown, lambda text: LINK.sub(lead, text))


def as_in_docs(readme: str) -> str:
    """The README's text with its links as they would be if it lay in docs/."""

    def moved(match: re.Match[str]) -> str:
        return os.path.relpath(match[0], "docs")

    return outside_fences(readme, lambda text: PICTURE.sub(moved, LINK.sub(moved, text)))


def outside_fences(markdown: str, change) -> str:  # type: ignore[no-untyped-def]
    """`change` applied to all text but blocks of code."""
    parts, at = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*parts, change(markdown[at:])])


def repository_path(link: str, folder: PurePosixPath) -> str:
    """Where a link in docs/`folder` leads, from the repository's root."""
    return os.path.normpath(PurePosixPath("docs") / folder / link)


def linked(markdown: str, folder: PurePosixPath) -> list[str]:
    """The files and folders outside docs/ that a page links to, but for the README."""
    found = {repository_path(link["path"], folder) for link in LINK.finditer(FENCE.sub("", markdown))}
    return sorted(path for path in found if not path.startswith("docs/") and path != "README.md")


def source_page(path: str) -> str:
    return f"source/{path}/index.md" if (ROOT / path).is_dir() else f"source/{path}.md"


def add(path: str, files: Files, config: MkDocsConfig) -> None:
    """The page of a file, or of a folder and everything in it."""
    target = ROOT / path
    if files.get_file_from_path(source_page(path)) is not None:
        return
    if not target.exists() or ROOT not in target.resolve().parents:
        log.warning("a page links to %s, which is not in the repository", path)
        return
    text = listing(target) if target.is_dir() else code(target)
    # Nobody who searches wants every line of source among the answers.
    head = f"---\ntitle: {target.name}\nsearch: {{exclude: true}}\n---\n\n# `{path}`\n\n"
    files.append(File.generated(config, source_page(path), content=head + text))
    for each in children(target):
        add(f"{path}/{each.name}", files, config)


def children(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    shown = [each for each in folder.iterdir() if not each.name.startswith(HIDDEN)]
    return sorted((each for each in shown if each.is_dir() or is_text(each)), key=lambda each: each.name)


def is_text(file: Path) -> bool:
    return file.suffix in LANGUAGES and file.stat().st_size < 200_000


def listing(folder: Path) -> str:
    lines = [
        f"- [{each.name}/]({each.name}/index.md)" if each.is_dir() else f"- [{each.name}]({each.name}.md)"
        for each in children(folder)
    ]
    return "\n".join(lines) + "\n"


def code(file: Path) -> str:
    text = file.read_text(encoding="utf-8").rstrip("\n")
    return f"``````{LANGUAGES.get(file.suffix, 'text')} linenums='1'\n{text}\n``````\n"
