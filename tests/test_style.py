"""The code stays readable: the measures of the house style, on every file.

tokens per code line    10 on average at most, 34 on one line at most
comments, docstrings    one line per two lines of code in the two method files; elsewhere 0.3
functions               80 lines at most, each with a docstring
the two method files    60 % of their lines are method; the training loop is in the first half
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from common import REPO

METHOD_FILES = ("doco.py", "instance_unlearn.py")
FILES = sorted(
    str(f.relative_to(REPO))
    for folder in (".", "baselines", "experiments", "emoji")
    for f in (REPO / folder).glob("*.py")
)
# Few lines, most of them formulas: matrix products, layers.
MATHEMATICS = ("gradsurgery.py", "discriminator.py", "experiments/theory.py")
# What is no part of a method: command line, run folder, saving.
PLUMBING = ("parse_args", "check_flags", "fill_defaults", "unlearn", "finish", "save", "main")
PLUMBING += ("loading_lines", "preset_line", "load_init")
LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def read(file):
    """(source, syntax tree)."""
    source = (REPO / file).read_text()
    return source, ast.parse(source)


def functions(tree):
    """All functions, nested ones too."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def docstring_lines(tree):
    """Line numbers of all docstrings."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
            if ast.get_docstring(node) is not None:
                lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def measure(file):
    """([tokens of each code line], comment and docstring lines)."""
    source, tree = read(file)
    documentation = docstring_lines(tree)
    tokens, comments = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        if token.type == tokenize.COMMENT:
            comments.add(line)
        elif token.type not in LAYOUT and line not in documentation:
            tokens[line] = tokens.get(line, 0) + 1
    lines = source.splitlines()
    documentation = {n for n in documentation if lines[n - 1].strip()}
    return list(tokens.values()), len(comments | documentation)


@pytest.mark.parametrize("file", FILES)
def test_lines_are_short_and_explained(file):
    tokens, comments = measure(file)
    if not tokens:
        return
    assert max(tokens) < 35
    if file not in MATHEMATICS:
        assert sum(tokens) / len(tokens) <= 10
    assert comments / len(tokens) >= (0.5 if file in METHOD_FILES else 0.3)


@pytest.mark.parametrize("file", FILES)
def test_functions_are_short_and_documented(file):
    _, tree = read(file)
    for function in functions(tree):
        assert function.end_lineno - function.lineno + 1 <= 80, function.name
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "__init__":
            assert ast.get_docstring(node), f"{file}: {node.name} has no docstring"


@pytest.mark.parametrize("file", METHOD_FILES)
def test_method_files_are_mostly_method(file):
    source, tree = read(file)
    lines = source.splitlines()
    plumbing = set()
    for node in tree.body:
        is_import = isinstance(node, (ast.Import, ast.ImportFrom))
        if is_import or getattr(node, "name", "") in PLUMBING:
            plumbing |= set(range(node.lineno, node.end_lineno + 1))
    written = {n for n, line in enumerate(lines, 1) if line.strip()}
    assert len(written - plumbing) / len(written) >= 0.6
    loop = next(n for n, line in enumerate(lines, 1) if "for step in progress" in line)
    assert loop < len(lines) / 2
    step = next(f for f in functions(tree) if f.name in ("doco_step", "instance_step"))
    assert step.lineno < len(lines) / 4 + 20


@pytest.mark.parametrize("file", METHOD_FILES)
def test_equations_of_the_code_are_those_of_the_docstring(file):
    source, tree = read(file)
    docstring = ast.get_docstring(tree)
    body = source.replace(docstring, "")
    of_other_papers = r"(?:Ho et al\. 2020|DDPM)[^.]*?Eq\. \d+|Eq\. \d+ and \d+ of DDPM"
    body = re.sub(of_other_papers, "", body)
    assert set(re.findall(r"Eq\. \d+", body)) <= set(re.findall(r"Eq\. \d+", docstring))


@pytest.mark.parametrize("file", [*FILES, *map(str, Path("tests").glob("*.py"))])
def test_nothing_escapes_the_formatter(file):
    source = (REPO / file).read_text()
    assert "fmt:" + " skip" not in source and "fmt:" + " off" not in source
