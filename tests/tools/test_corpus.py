"""Search over a folder: stable ids, numbered lines, pages, and errors that say what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

import pytest
from thinkloop.tools.corpus import Corpus, CorpusError
from thinkloop.tools.extract import BlockingExtractor, ExtraMissing
from thinkloop.tools.search import Search, format_hits, format_page
from thinkloop.tools.tool import ToolError

LONG = "\n".join(f"row {number} {'needle' if number in (150, 390) else 'hay'}" for number in range(1, 401))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "guide").mkdir()
    (tmp_path / "guide" / "install.md").write_text("# Installing\n\nRun the installer.\nThen restart the harbour.\n")
    (tmp_path / "harbour.md").write_text("# Harbour\n\nShips land here.\n")
    (tmp_path / "long.txt").write_text(LONG)
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    return tmp_path


def test_ids_are_paths_and_titles_win(folder: Path) -> None:
    hits = Corpus(folder).search("harbour")
    assert [(hit.id, hit.line) for hit in hits] == [("harbour.md", 1), ("guide/install.md", 4)]
    assert format_hits("harbour", hits) == (
        "1. harbour.md:1: # Harbour\n2. guide/install.md:4: Then restart the harbour."
    )


def test_all_words_first_then_any(folder: Path) -> None:
    corpus = Corpus(folder)
    assert [hit.id for hit in corpus.search("restart harbour")] == ["guide/install.md"]
    assert {hit.id for hit in corpus.search("installer ships")} == {"guide/install.md", "harbour.md"}
    assert format_hits("zebra", corpus.search("zebra")) == 'No results for "zebra".'


@pytest.mark.parametrize(
    "query", ["", "   ", '"', "a AND", "NEAR(", "x*", "title:", "'; DROP TABLE documents; --", "\x00", "🚢"]
)
def test_no_query_is_an_error(folder: Path, query: str) -> None:
    corpus = Corpus(folder)
    corpus.search(query)
    assert len(corpus) == 3


def test_a_document_is_found_by_id_or_title(folder: Path) -> None:
    corpus = Corpus(folder)
    by_id, by_title = corpus.document("guide/install.md"), corpus.document("Installing")
    assert by_id is not None
    assert by_id == by_title
    assert corpus.document("../../etc/passwd") is None


def test_lines_are_numbered_and_long_documents_come_in_pages(folder: Path) -> None:
    document = Corpus(folder).document("long.txt")
    assert document is not None
    first = format_page(document, max_chars=300).split("\n")
    more = int(first[0].split("line ")[1].split(" ")[0])
    assert first[0].startswith("long.txt (400 lines; more from line")
    assert first[1] == "1: row 1 hay"
    assert first[-1] == f"{more - 1}: row {more - 1} hay"
    second = format_page(document, line=more, max_chars=300).split("\n")
    assert second[1].startswith(f"{more}: ")


def test_find_shows_only_lines_with_the_text(folder: Path) -> None:
    document = Corpus(folder).document("long.txt")
    assert document is not None
    assert format_page(document, find="NEEDLE").split("\n")[1:] == ["150: row 150 needle", "390: row 390 needle"]
    assert format_page(document, line=200, find="needle").split("\n")[1:] == ["390: row 390 needle"]
    with pytest.raises(ToolError, match='has "zebra"'):
        format_page(document, find="zebra")
    with pytest.raises(ToolError, match="lines 1 to 400"):
        format_page(document, line=401)


def test_a_folder_without_text_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="holds no readable text"):
        Corpus(tmp_path)
    with pytest.raises(CorpusError, match="does not exist"):
        Corpus(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match="needs a folder"):
        Corpus()


def test_bytes_that_are_not_text_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 \xff\xfe latin")
    (tmp_path / "good.md").write_text("# Good")
    assert [hit.id for hit in Corpus(tmp_path).search("latin")] == ["bad.txt"]


def test_a_link_out_of_the_folder_is_not_followed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.md"
    secret.write_text("# Secret\npassword")
    (folder / "link.md").symlink_to(secret)
    assert Corpus(folder).search("password") == []
    assert Corpus(folder).document("link.md") is None


def test_several_sources_have_their_names_before_the_ids(tmp_path: Path) -> None:
    for name in ("one/docs", "two/docs"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.md").write_text(f"# Notes\nfrom {name[:3]}")
    (tmp_path / "file.md").write_text("from nowhere else")
    corpus = Corpus(tmp_path / "one/docs", tmp_path / "two/docs", tmp_path / "file.md")
    assert {hit.id for hit in corpus.search("from")} == {"docs/a.md", "docs-2/a.md", "file.md"}
    assert corpus.document("Notes") is None  # two have this title
    assert [hit.id for hit in Corpus(tmp_path / "file.md").search("from")] == ["file.md"]


def test_each_line_of_json_lines_is_a_document(tmp_path: Path) -> None:
    rows = [
        {"title": "Ports", "url": "http://x.test/p", "text": "Ships land.\nThey leave."},
        {"name": "Cargo", "weight": 3},
        "plain \ud800 string",
        {"id": 7, "contents": "a 7\x00\x1b[31m"},
    ]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines[:2], "", *lines[2:], "not { json", "[" * 100_000]))
    corpus = Corpus(tmp_path)
    ports = corpus.document("rows.jsonl#1")
    assert ports is not None
    assert (ports.title, ports.lines) == ("Ports", ("Ports", "http://x.test/p", "", "Ships land.", "They leave."))
    cargo = corpus.document("Cargo")
    assert cargo is not None
    assert cargo.id == "rows.jsonl#2"
    assert ' "weight": 3' in cargo.lines
    assert [(hit.id, hit.line) for hit in corpus.search("leave")] == [("rows.jsonl#1", 5)]
    assert [hit.id for hit in corpus.search("plain string")] == ["rows.jsonl#4"]
    assert [hit.text for hit in corpus.search("31m")] == ["a 7[31m"]
    assert [hit.id for hit in corpus.search("not json")] == ["rows.jsonl#6"]
    assert len(corpus) == 6


def test_titles_follow_the_format(tmp_path: Path) -> None:
    texts = {
        "a.rst": "=====\nTides\n=====\n\ntext",
        "b.org": "#+TITLE: Winds\n* First",
        "c.py": "# a comment\nx = 1",
        "d.md": "intro\n## Second ##\n",
        "Makefile": "all: build",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    corpus = Corpus(tmp_path)
    titles = {name: document.title for name in texts if (document := corpus.document(name))}
    assert titles == {"a.rst": "Tides", "b.org": "Winds", "c.py": "c", "d.md": "Second ##", "Makefile": "Makefile"}


def test_web_pages_and_pdfs_are_read_as_text(tmp_path: Path) -> None:
    pytest.importorskip("trafilatura")
    pytest.importorskip("pypdf")
    body = "".join(
        f"<p>The quay of <a href='http://x.test/{number}'>number {number}</a> is long and made of granite.</p>"
        for number in range(9)
    )
    (tmp_path / "page.html").write_text(
        f"<html><head><title>Quays</title></head><body><main>{body}</main></body></html>"
    )
    (tmp_path / "book.pdf").write_bytes(_pdf("Tide tables of the harbour"))
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4 and then nothing of the kind")
    corpus = Corpus(tmp_path)
    assert [hit.id for hit in corpus.search("granite")] == ["page.html"]
    assert [hit.id for hit in corpus.search("tide tables")] == ["book.pdf"]
    page = corpus.document("page.html")
    assert page is not None
    assert page.title == "Quays"
    assert page.lines[3] == "The quay of number 3 is long and made of granite."
    assert list(corpus.skipped) == ["broken.pdf"]


def _pdf(text: str) -> bytes:
    """One page with one line of text."""
    stream = f"BT /F1 18 Tf 20 100 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 200] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    body, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size, start = len(objects) + 1, len(body)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % size
    return body + head + table + b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (size, start)


def test_a_missing_extra_is_a_reason_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: object, body: bytes, media_type: str, **options: object) -> None:
        raise ExtraMissing("reading web pages needs trafilatura; run `pip install 'thinkloop[browser]'`")

    (tmp_path / "page.html").write_text("<p>The quay is long and made of granite.</p>")
    (tmp_path / "a.md").write_text("# Quay")
    with monkeypatch.context() as patch:  # an installed library can't be taken away for one test
        patch.setattr(BlockingExtractor, "extract", missing)
        corpus = Corpus(tmp_path)
        assert "thinkloop[browser]" in corpus.skipped["page.html"]
    pytest.importorskip("trafilatura")
    assert corpus.update().added == 1
    assert corpus.skipped == {}


def test_what_cannot_be_indexed_is_skipped_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "good.md").write_text("# Good")
    (tmp_path / "binary.txt").write_bytes(b"abc\0\1\2")
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(9 << 20)
    (tmp_path / "odd\nname.md").write_text("odd")
    os.mkfifo(tmp_path / "pipe.md")
    (tmp_path / "loop.md").symlink_to("loop.md")
    for hidden in (".git", "node_modules", "__pycache__", ".venv"):
        (tmp_path / hidden).mkdir()
        (tmp_path / hidden / "x.md").write_text("hidden")
    corpus = Corpus(tmp_path)
    assert len(corpus) == 1
    reasons = {"binary.txt": "is binary, not text", "huge.txt": "is larger than 8 MiB"}
    assert corpus.skipped == reasons | {"odd\ufffdname.md": "has a name that isn't plain text; rename it"}
    assert sum(corpus.changes.skipped.values()) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_skipped_until_it_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "good.md").write_text("# Good")
    secret = tmp_path / "secret.md"
    secret.write_text("# Secret")
    secret.chmod(0)
    corpus = Corpus(tmp_path)
    assert corpus.skipped == {"secret.md": "can't be read (Permission denied)"}
    secret.chmod(0o600)
    assert corpus.update().added == 1


def test_no_line_is_too_long_to_be_shown(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 300 + "needle\n" + "x" * 1200)
    corpus = Corpus(tmp_path)
    document = corpus.document("long.txt")
    assert document is not None
    assert max(map(len, document.lines)) <= 500
    assert "".join(document.lines).replace(" ", "") == "word" * 300 + "needle" + "x" * 1200
    assert [(hit.line, hit.text[-6:]) for hit in corpus.search("needle")] == [(4, "needle")]


def test_other_encodings_are_read(tmp_path: Path) -> None:
    (tmp_path / "wide.txt").write_bytes("# Übersee\r\nzweite".encode("utf-16"))
    (tmp_path / "mark.md").write_bytes("\ufeff# Marked".encode())
    (tmp_path / "split.md").write_text("cafe\u0301 noir", encoding="utf-8")
    corpus = Corpus(tmp_path)
    assert {name: len(d.lines) for name in ("wide.txt", "mark.md") if (d := corpus.document(name))} == {
        "wide.txt": 2,
        "mark.md": 1,
    }
    assert corpus.document("Übersee") is not None
    assert corpus.document("Marked") is not None
    assert [hit.text for hit in corpus.search("caf\u00e9")] == ["café noir"]
    assert [hit.id for hit in corpus.search("cafe")] == ["split.md"]


@pytest.mark.parametrize("query", ["東京の天気", "東京", "天", "京の天", "서울에서", "Tower東京"])
def test_scripts_without_spaces_are_found_by_their_parts(tmp_path: Path, query: str) -> None:
    (tmp_path / "ja.md").write_text("# 旅行\n昨日の東京の天気は晴れ。\nTower東京", encoding="utf-8")
    (tmp_path / "ko.md").write_text("# 여행\n서울에서 만나요", encoding="utf-8")
    (tmp_path / "other.md").write_text("# 京都\nKyoto", encoding="utf-8")
    found = Corpus(tmp_path).search(query)
    assert found[0].id == ("ko.md" if query.startswith("서") else "ja.md")
    assert found[0].line == (3 if query.startswith("Tower") else 2)


def test_words_with_vowel_signs_stay_whole(tmp_path: Path) -> None:
    (tmp_path / "hi.md").write_text("# भाषा\nयह हिन्दी में है", encoding="utf-8")
    (tmp_path / "no.md").write_text("# दूसरा\nन द ह", encoding="utf-8")
    assert [(hit.id, hit.line) for hit in Corpus(tmp_path).search("हिन्दी")] == [("hi.md", 2)]


def test_the_best_line_of_a_long_document_is_found(tmp_path: Path) -> None:
    lines = [f"row {number} of many words" for number in range(50_000)]
    lines[40_000] = "the blue Harbour of many"
    (tmp_path / "long.txt").write_text("\n".join(lines))
    hit = Corpus(tmp_path).search("harbour blue the")[0]
    assert (hit.line, hit.text) == (40_001, "the blue Harbour of many")


def test_a_word_in_another_form_has_its_line(folder: Path) -> None:
    assert [(hit.id, hit.line) for hit in Corpus(folder).search("landing")] == [("harbour.md", 3)]


@pytest.mark.parametrize("engine", ["sqlite", "tantivy"])
def test_hostile_queries_are_only_words(folder: Path, engine: Literal["sqlite", "tantivy"]) -> None:
    if engine == "tantivy":
        pytest.importorskip("tantivy")
    corpus = Corpus(folder, engine=engine)
    queries = [
        "word " * 10_000, "x" * 1_000_000, "\ud800 harbour", "\x00harbour\x00", "harbour*", "NEAR(harbour, zebra)",
        "title : harbour", "-harbour", "^harbour", '"harbour', "{title text}: harbour", "_ harbour", "🚢" * 500, "東" * 5000,
        "harbour OR", "(((((" * 1000, "%s %d", "İstanbul", "a\u0301" * 3000,
    ]  # fmt: skip
    for query in queries:
        assert all("arbour" in hit.text for hit in corpus.search(query)), query[:40]
    assert [hit.id for hit in corpus.search("harbour*", 1)] == ["harbour.md"]
    assert corpus.document("\ud800") is None
    assert len(corpus.search("harbour", -3)) == 1
    corpus.close()
    with pytest.raises(CorpusError, match="closed"):
        corpus.search("harbour")


@pytest.mark.anyio
async def test_the_tools_record_what_was_opened(folder: Path) -> None:
    async with Search(folder) as search:
        find, read = search.tools()
        found = await find.call({"query": "harbour", "limit": 1})
        assert found.content == "1. harbour.md:1: # Harbour"
        page = await read.call({"id": "harbour.md"})
        assert page.record["document"] == "harbour.md"
        assert page.content == "harbour.md (3 lines)\n1: # Harbour\n2:\n3: Ships land here."
        with pytest.raises(ToolError, match='there is no document "Port"; search for it'):
            await read.call({"id": "Port"})
