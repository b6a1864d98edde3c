"""HTML to text: the article alone (trafilatura), or everything that is visible."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urljoin

from thinkloop.tools.extract_bounds import TITLE_CHARS, Document, OutOfTime, join_notes, within
from thinkloop.tools.extract_render import ARTICLE, HTML, Rendered, is_hidden, render
from thinkloop.tools.extract_text import clean_line, decode

_ARTICLE_SHARE = 0.4  # of the time, for trafilatura; the plain reading is some 50 times faster
_ARTICLE_ELEMENTS = 60_000  # trafilatura takes 0.15 ms for each: more would only use up its share of the time
_SHORT = 250  # characters
_WORTH_SAYING = 1000  # characters of a page, from which it matters that the navigation is in it
_METADATA = frozenset({"title", "meta", "link", "base", "style", "script", "noscript", "template"})
_WHOLE = "no article found: this is the whole page"


def read_html(body: bytes, *, url: str, charset: str, form: Literal["article", "full"], seconds: float) -> Document:
    """The page's text, within about `seconds`: an article as trafilatura finds it, or the whole page where it finds none
    or next to nothing."""
    root, note = _parse(decode(body, charset))
    if root is None:
        return Document("html", "", "", [], "the page is empty")
    title, base = _title(root), _base(root, url)
    article = _article(root, base, seconds * _ARTICLE_SHARE) if form == "article" else None
    with within(seconds * (1 - _ARTICLE_SHARE)):
        found = render(root, HTML, base)
    notes = [note]
    if article and not _is_stub(article, found):
        found = article
    elif form == "article" and len(found.text) > _WORTH_SAYING:
        notes.append(_WHOLE)
    notes.append(found.note if found.text else note or _why_empty(root))
    return Document("html", title or _first_heading(found.text), found.text, found.links, join_notes(*notes))


def _parse(text: str) -> tuple[Any, str]:
    """The tree (`None` when there is nothing in it) and a note on what the parser gave up on."""
    from lxml import etree, html

    parser = html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True, huge_tree=True, no_network=True)
    try:
        root = html.document_fromstring(text.replace("\0", "").encode("utf-8", "replace"), parser=parser)
    except etree.LxmlError:
        root = None
    troubles = " ".join(f"{entry.type_name} {entry.message}" for entry in parser.error_log).lower()
    if "no_memory" in troubles:  # libxml2's own word for it; lxml raises an XMLSyntaxError
        raise MemoryError
    if root is not None:
        _begin_body(root)
    return root, "cut where the page nests more than 2,000 elements" if "depth" in troubles else ""


def _begin_body(root: Any) -> None:
    """Move what stands in the head by mistake: libxml2 knows no `main` or `article`, so a page that leaves out its `body`
    tag and begins with one of them would be all head."""
    from lxml import etree

    head = root.find("head")
    children = list(head) if head is not None else []
    start = next((at for at, node in enumerate(children) if node.tag not in _METADATA), None)
    if start is None:
        return
    body = root.find("body")
    if body is None:
        body = etree.SubElement(root, "body")
    for at, node in enumerate(children[start:]):
        body.insert(at, node)


def _article(root: Any, base: str, seconds: float) -> Rendered | None:
    from trafilatura import bare_extraction

    if sum(1 for _ in root.iter()) > _ARTICLE_ELEMENTS:
        return None
    try:
        with within(seconds):
            _prepare(root)
            found = bare_extraction(root, include_comments=False, include_links=True, include_formatting=True)
            tree = getattr(found, "body", None)
            return render(tree, ARTICLE, base) if tree is not None else None
    except (OutOfTime, Exception):  # whatever it trips over, the whole page can still be shown
        return None


def _prepare(root: Any) -> None:
    """Take out what is hidden; make every `pre` one that trafilatura knows for code, or it would be a quotation."""
    from lxml import etree

    for node in root.xpath("//*[@hidden or @style or self::dialog]"):
        if is_hidden(node) and node.getparent() is not None:
            node.drop_tree()
    for line_break in root.xpath("//pre//br"):
        line_break.tail = "\n" + (line_break.tail or "")
    for block in list(root.iter("pre")):
        text, tail = block.text_content(), block.tail
        block.clear()
        etree.SubElement(block, "span").text = text
        block.tail = tail


def _is_stub(article: Rendered, page: Rendered) -> bool:
    """Whether so little was taken for the article that the rest of the page can't all be navigation."""
    size, whole = len(article.text), len(page.text)
    return not size or size * 20 < whole or (size < _SHORT and size * 4 < whole)


def _title(root: Any) -> str:
    candidates = [node.text_content() for node in root.iter("title") if node.getparent().tag != "svg"][:1]
    candidates += root.xpath("//meta[@property='og:title' or @name='og:title']/@content")[:1]
    candidates += [node.text_content() for node in root.xpath("(//h1)[1]")]
    return next((title for text in candidates if (title := clean_line(text, TITLE_CHARS))), "")


def _first_heading(text: str) -> str:
    first = next((line for line in text[:10_000].split("\n") if line.startswith("#")), "")
    return clean_line(first.lstrip("# "), TITLE_CHARS)


def _base(root: Any, url: str) -> str:
    try:
        return urljoin(url, str(next(iter(root.xpath("//base/@href")), "")).strip())
    except ValueError:
        return url


def _why_empty(root: Any) -> str:
    if root.find(".//script") is not None:
        return "no visible text: scripts make this page, so it needs a browser"
    return "the page has no text"
