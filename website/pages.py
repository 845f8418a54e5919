"""What the site does to its pages: public names lead to the API, pictures to their full size, nothing is foreign."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

DOCS = Path(__file__).resolve().parents[1] / "docs"
PLACES = {
    path.rsplit(".", 1)[1]: path
    for page in sorted(DOCS.glob("api/*.md"))
    for path in re.findall(r"^::: (egpo_kernels\.[\w.]+)$", page.read_text(), re.MULTILINE)
}
"""Where each public name is documented, by the name that a user writes."""
CODE = re.compile(
    r"<(?P<whole>h[1-6]|a|pre)\b.*?</(?P=whole)>"
    r'|<tr class="doc-section-item">\s*<td>.*?</td>'  # an argument may be called like a function
    r"|<code>(?P<name>\w+)</code>",
    re.DOTALL,
)
PICTURE = re.compile(r'<img [^>]*\bsrc="([^"]+)"[^>]*>')
FOREIGN = re.compile(
    r"<(?:script|img|source|iframe|link\b(?![^>]*\brel=.?(?:canonical|next|prev)))\b"
    r"[^>]*\b(?:src|srcset|href)=[\"']?(?:https?:)?//[^>]*>"
)


def on_page_content(html: str, **_: Any) -> str:
    """Link names and pictures; headings, links, blocks of code and names of arguments stay as they are."""

    def linked(found: re.Match[str]) -> str:
        place = PLACES.get(found["name"] or "")
        return f'<autoref identifier="{place}">{found[0]}</autoref>' if place else found[0]

    return PICTURE.sub(r'<a href="\1">\g<0></a>', CODE.sub(linked, html))


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that would load something from another site."""
    if foreign := FOREIGN.search(output):
        raise PluginError(f"{page.file.src_uri} loads {foreign[0]}; it must have a copy of its own in docs/")
    return output
