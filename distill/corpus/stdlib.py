"""The corpus that is always at hand: English prose (or the code) of the Python that runs.

Prose is docstrings, whole-line comment blocks and the texts of `pydoc_data.topics`, cut into paragraphs, filtered and
freed of repetitions. Nothing of the library is imported except the topics, and no order comes from the file system.
"""

from __future__ import annotations

import ast
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from distill.corpus.documents import Document
from growth.errors import UserError

# tests, graphical toolkits, packaging and tables: little prose, or absent from many installations
NOT_LIBRARY = "curses dbm encodings ensurepip idlelib lib2to3 sqlite3 test tkinter turtle turtledemo venv"
# modules that one of CPython 3.10 to 3.13 lacks: without them the parts are the same on all four
NOT_EVERYWHERE = """
    _android_support _bootsubprocess _colorize _ios_support _opcode_metadata _pylong _pyrepl aifc asynchat asyncore
    binhex cgi cgitb chunk crypt distutils imghdr imp mailcap nntplib pipes smtpd sndhdr sunau telnetlib tomllib uu
    xdrlib"""
EXCLUDED = frozenset(f"{NOT_LIBRARY} {NOT_EVERYWHERE}".split())

FEWEST_CHARACTERS, FEWEST_WORDS = 60, 10
LETTERS, PLAIN_WORDS = 0.85, 0.75  # shares below which a paragraph is a table, a signature or markup
NOT_PROSE = (">>>", "...", "+--", "===", "---", "$ ", "% ")
PLAIN_WORD = re.compile(r"[(\"']?[A-Za-z][a-z]*(['-][A-Za-z]?[a-z]*)*[.,;:!?)\"']*")
CODING = re.compile(r"#.*coding[:=]|#!")


def prose() -> Iterator[Document]:
    """Paragraphs in the order part, module, line; a paragraph that stands twice is kept where it comes first."""
    seen: set[str] = set()
    for document in _paragraphs():
        if is_prose(document.text) and document.text not in seen:
            seen.add(document.text)
            yield document


def code() -> Iterator[Document]:
    """One document a module, in the same order."""
    for part, path in modules():
        yield Document(read(path), part)


def modules() -> list[tuple[str, Path]]:
    """(part, file) of every module, sorted by name: the part is the top-level package or module."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [
        (_part(path.relative_to(root)), path)
        for top in sorted(sys.stdlib_module_names - EXCLUDED)
        for path in (root / f"{top}.py", *(root / top).rglob("*.py"))
        if path.is_file() and not EXCLUDED.intersection(path.relative_to(root).parts)
    ]
    if not found:
        raise UserError(f"{root}: no source files of the standard library; this Python carries compiled modules only")
    return sorted(found, key=lambda entry: (entry[0], entry[1].relative_to(root).as_posix()))


def is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    plain = sum(PLAIN_WORD.fullmatch(word) is not None for word in words)
    return (
        len(paragraph) >= FEWEST_CHARACTERS
        and len(words) >= FEWEST_WORDS
        and letters > LETTERS * len(paragraph)
        and plain > PLAIN_WORDS * len(words)
    )


def _part(relative: Path) -> str:
    """`_pydecimal.py` and `_pydatetime.py` are the Python side of a module of the library: the same part."""
    top = relative.parts[0].removesuffix(".py")
    public = top.removeprefix("_py")
    return public if public in sys.stdlib_module_names else top


def _paragraphs() -> Iterator[Document]:
    for part, path in modules():
        if part != "pydoc_data":
            for text in _prose_blocks(read(path)):
                yield from (Document(paragraph, part) for paragraph in paragraphs(text))
    for text in _topics():
        yield from (Document(paragraph, "topics") for paragraph in paragraphs(text))


def _topics() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def read(path: Path) -> str:
    with tokenize.open(path) as file:  # a few files declare another encoding
        return file.read()


def _prose_blocks(source: str) -> list[str]:
    """Docstrings and comment blocks of one module, in the order of their lines."""
    nodes = _nodes(source)
    return [text for _, text in sorted([*_docstrings(nodes), *_comments(source, nodes)])]


def docstrings(source: str) -> list[str]:
    """Those of one module, in the order of their lines."""
    return [text for _, text in sorted(_docstrings(_nodes(source)))]


def _nodes(source: str) -> list[ast.AST]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        return list(ast.walk(ast.parse(source)))


def _docstrings(nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text


def _comments(source: str, nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    """Runs of whole-line comments; a `#` at the start of a line inside a string is none."""
    inside = {
        line
        for node in nodes
        if isinstance(node, ast.Constant | ast.JoinedStr) and node.end_lineno > node.lineno
        for line in range(node.lineno + 1, node.end_lineno + 1)
    }
    block: list[str] = []
    for number, line in enumerate([*source.split("\n"), ""], start=1):
        line = line.strip()
        if line.startswith("#") and number not in inside and not (number < 3 and CODING.match(line)):
            block.append(line.lstrip("#").strip())
        elif block:
            yield number, "\n".join(block)
            block = []


def paragraphs(text: str) -> Iterator[str]:
    """Each on one line; tables, examples and headings are left out."""
    for block in re.split(r"\n\s*\n", text.expandtabs()):
        lines = [line.strip() for line in block.split("\n")]
        if not any(line.startswith(NOT_PROSE) for line in lines):
            yield " ".join(" ".join(lines).split())
