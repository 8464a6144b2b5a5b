"""The documents tell the truth about the programs: commands, flags, links, tables, citations.

python -m pytest -n 0 -q tests/test_readme.py
"""

import argparse
import ast
import importlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from common import REPO

README = REPO / "README.md"
CONTRIBUTING = REPO / "CONTRIBUTING.md"
DOCS = sorted((REPO / "docs").glob("*.md"))
DOCUMENTS = [README, CONTRIBUTING, *DOCS]
RESULTS = sorted((REPO / "experiments/results").glob("*.md"))
METHODS = ("doco", "instance_unlearn")
PROGRAMS = [
    *METHODS,
    "eval",
    "attack",
    *(f"baselines.{file.stem}" for file in sorted((REPO / "baselines").glob("[!_]*.py"))),
    *(f"experiments.{name}" for name in ("reproduce", "bench", "theory")),
]
# The name that a new baseline has in CONTRIBUTING.md; it is a copy of the template
NEW_BASELINE = {"baselines.blank": "baselines._template"}
NOT_RERUN = ("not yet re-run", "to be run again")


def relative(file):
    """A file's path for the name of a test."""
    return str(file.relative_to(REPO))


# ---- 1. commands --------------------------------------------------------------------------------


def snippets(text):
    """What a reader may type: lines of fenced blocks other than Python, and inline code."""
    text = text.replace("\\\n", " ")
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M):
        if language != "python":
            found += block.splitlines()
    outside = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return found + re.findall(r"`([^`\n]+)`", outside)


def program_and_flags(words):
    """(program, [flags]) of the words of a command line, or None if it starts none of ours."""
    if not words or words[0] not in ("torchrun", "python"):
        return None
    for k, word in enumerate(words[1:], 1):
        if words[k - 1] == "-m":
            return word, words[k + 1 :]
        if words[k - 1] == "-c":  # python -c "import doco; doco.unlearn(...)" FLAGS
            found = re.match(r"import (\w+);", word)
            return (found[1], words[k + 1 :]) if found else None
        if word.endswith(".py"):
            return word.removesuffix(".py").replace("/", "."), words[k + 1 :]
    return None


def commands(text, prefix=r""):
    """[(program, (flags ...))] of our programs in a text."""
    found = []
    for snippet in snippets(text):
        for command in re.split(r"&&|;\s|\|", snippet) if "-c" not in snippet else [snippet]:
            try:
                words = shlex.split(command, comments=True)
            except ValueError:  # an apostrophe: prose, not a command
                continue
            parsed = program_and_flags(words)
            if parsed and parsed[0] in (*PROGRAMS, *NEW_BASELINE, "baselines._template"):
                found.append((parsed[0], tuple(parsed[1])))
    return found


def docstring_of(name):
    """The docstring of a program, without importing it: that takes seconds."""
    source = (REPO / f"{name.replace('.', '/')}.py").read_text()
    return ast.get_docstring(ast.parse(source))


def documented_commands():
    """{(program, flags): where it stands} of all documents and docstrings."""
    found = {}
    for file in DOCUMENTS:
        for command in commands(file.read_text()):
            found[command] = relative(file)
    for name in (*PROGRAMS, "baselines._template"):
        docstring = docstring_of(name)
        for line in docstring.replace("\\\n", " ").splitlines():
            for command in commands(f"```\n{line.strip()}\n```"):
                found[command] = f"{name}.__doc__"
    return found


COMMANDS = documented_commands()


@pytest.mark.parametrize(
    "command", sorted(COMMANDS), ids=[f"{COMMANDS[c]}: {c[0]}" for c in sorted(COMMANDS)]
)
def test_command_parses(command):
    """Every documented command line is valid."""
    program, flags = command
    module = importlib.import_module(NEW_BASELINE.get(program, program))
    module.parse_args(list(flags))


def test_every_program_has_a_command():
    """A program that no document mentions is not found by a reader."""
    assert {program for program, _ in COMMANDS} >= {*PROGRAMS, *NEW_BASELINE}
    assert len(COMMANDS) > 40


def test_the_two_first_commands_stand_in_the_readme():
    """The command that our user wrote, and its counterpart, as plain as they are."""
    found = commands(README.read_text())
    assert ("doco", ("--target", "Grumpy Cat", "--anchor", "Cat")) in found
    assert ("instance_unlearn", ()) in found


class ParserFound(Exception):
    """Carries the parser out of a parse_args."""


def options(program, monkeypatch):
    """All flags of a program, those of its subcommands too."""

    def give_parser(parser, argv=None, namespace=None):
        """Stands in for argparse's parse_args: leaves with the parser that called it."""
        raise ParserFound(parser)

    module = importlib.import_module(program)
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", give_parser)
        with pytest.raises(ParserFound) as found:
            module.parse_args([])
    parsers = [found.value.args[0]]
    for action in parsers[0]._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    return {flag for parser in parsers for flag in parser._option_string_actions}


# Flags of other programs that the documents name: torchrun, pip, ruff, emoji/train.py
FOREIGN = "nproc-per-node nnodes rdzv-backend rdzv-endpoint index-url check report-only".split()


def test_every_flag_named_exists(monkeypatch):
    """A flag in the documents is one of a program, in its present spelling."""
    known = {f"--{name}" for name in FOREIGN}
    for program in PROGRAMS:
        known |= options(program, monkeypatch)
    for file in DOCUMENTS:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+[a-z]", file.read_text()))
        assert named <= known, f"{relative(file)}: {named - known}"


# ---- 2. links, lengths, Python ------------------------------------------------------------------


def anchors(file):
    """The anchors of a Markdown file's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", file.read_text(), re.M)
    plain = [re.sub(r"[`*]|\[|\]\([^)]*\)", "", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("file", [*DOCUMENTS, REPO / "emoji/README.md", *RESULTS], ids=relative)
def test_links_resolve(file):
    """Files and headings that a document links to exist."""
    for path, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", file.read_text()):
        if path.startswith("http"):
            continue
        target = file.parent / path if path else file
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target), f"{path}#{anchor}"


def test_readme_is_short():
    """At most 200 lines of at most 160 characters: the rest is in docs/."""
    lines = README.read_text().splitlines()
    assert len(lines) <= 200
    long = [line for line in lines if len(line) > 160]
    assert not long, long[0]


def test_files_of_the_tree_exist():
    """The annotated tree of the README names every file and folder of the first level."""
    tree = re.search(r"## Files\n\n```\n(.*?)```", README.read_text(), re.S)[1]
    named = [word for line in tree.splitlines() for word in line.split("  ")[0].split()]
    assert all((REPO / name).exists() for name in named), named
    assert {f.name for f in REPO.glob("*.py")} <= set(named)


@pytest.mark.parametrize("file", [*DOCUMENTS, REPO / "emoji/README.md"], ids=relative)
def test_python_blocks_compile(file):
    """tests/test_main.py runs those of the README and of docs/; here: no typing error anywhere."""
    for block in re.findall(r"^```python\n(.*?)^```", file.read_text(), re.S | re.M):
        compile(block, str(file), "exec")


# ---- 3. equations and words ---------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_equations_of_the_code_are_in_the_docstring(name):
    """Every "Eq. N" in a method's file stands in its list of equations, and in docs/."""
    body = (REPO / f"{name}.py").read_text().split('"""', 2)[2]
    own = set(re.findall(r"Eq\. (\d+)\b(?! and \d+ of|of )", body))  # not "Eq. 6 and 7 of DDPM"
    docs = {"doco": "doco.md", "instance_unlearn": "instance.md"}[name]
    for text in (docstring_of(name), (REPO / "docs" / docs).read_text(), README.read_text()):
        named = set(re.findall(r"Eq\. (\d+)", text))
        assert own <= named, own - named


# Private words of earlier texts, and what the field says in their place
PRIVATE_WORDS = {
    r"rivals?": "baseline",
    r"judge[sd]?|judging": "evaluation network",
    r"sittings?": "run",
    r"eyes of": "feature extractor",
    r"toys?": "small model",
    r"pictures?": "image",
    r"per cent": "%",
    r"(its|the|of|related) neighbours?": "related concepts",
    r"bad days": "fault tolerance",
    r"cannot be had": "not available",
    r"straightforward way": "naive baseline",
    r"asked to end": "on SIGTERM",
}
# What is data, not prose: the prompt templates of doco.py, those of CLIP
TEMPLATES = r"picture of a? ?\{\}|origami, toy"


@pytest.mark.parametrize("file", [README, *DOCS, *sorted(REPO.glob("*.py"))], ids=relative)
def test_no_private_words(file):
    """A reader who knows diffusers and the papers meets no word that only we use."""
    text = re.sub(TEMPLATES, "", file.read_text())
    for word, better in PRIVATE_WORDS.items():
        found = re.search(rf"(?i)\b({word})\b.*", text)
        assert not found, f"{found[0]!r}: say {better!r}"


# ---- 4. tables of results -----------------------------------------------------------------------


def table_rows(text):
    """The cells of all rows of the Markdown tables in a text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_marked_tables_are_complete():
    """The tables that are renewed by their marks stand in docs/results.md, each once."""
    text = (REPO / "docs/results.md").read_text()
    for mark in ("concepts", "rates", "instances"):
        table = re.findall(rf"<!-- {mark} -->\n(.*?)<!-- /{mark} -->", text, re.S)
        assert len(table) == 1 and len(table_rows(table[0])) > 5


def test_rows_that_are_not_yet_rerun_hold_no_figures():
    """A figure of code that has changed since is worse than none."""
    for file in [README, REPO / "docs/results.md", *RESULTS]:
        for row in table_rows(file.read_text()):
            if len(set(row) & set(NOT_RERUN)) == 1 and len(row) > 6:
                after = row[row.index((set(row) & set(NOT_RERUN)).pop()) :]
                assert not re.search(r"\d", "".join(after)), row


def test_tables_of_the_docs_are_those_of_the_results():
    """Tables II to VI in docs/results.md hold the figures of the files that they link to."""
    text = (REPO / "docs/results.md").read_text()
    sections = re.split(r"^### ", text, flags=re.M)
    checked = 0
    for section in sections:
        if found := re.search(r"\[with its commands\]\(\.\./(\S+)\)", section):
            result = (REPO / found[1]).read_text()
            assert [row[1:] for row in table_rows(section)] == [
                row[1:] for row in table_rows(result)
            ]
            checked += 1
    assert checked == 5


# ---- 5. citation and licence --------------------------------------------------------------------


def test_citation_file_agrees_with_the_bibtex():
    """CITATION.cff is valid in its required keys, and names the README's authors in their order."""
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= citation.keys()
    bibtex = re.search(r"```bibtex\n(.*?)```", README.read_text(), re.S)[1]
    titles = re.findall(r"title\s*= \{(.*?)\}", bibtex)
    titles = [title for title in titles if not title.startswith("AAAI")]
    authors = re.findall(r"author\s*= \{(.*?)\}", bibtex)
    assert [r["title"] for r in citation["references"]] == titles
    for reference, names in zip(citation["references"], authors, strict=True):
        written = [f"{a['family-names']}, {a['given-names']}" for a in reference["authors"]]
        assert written == names.split(" and ")
        assert reference["url"] in README.read_text()


def test_licence_names_the_art():
    """MIT for the code; the emoji art keeps its own licences."""
    text = (REPO / "LICENSE").read_text()
    assert text.startswith("MIT License\n") and "Copyright (c) 2026 the contributors" in text
    assert "emoji/images/LICENSES.md" in text and (REPO / "emoji/images/LICENSES.md").exists()


# ---- 6. the guide for contributors --------------------------------------------------------------


@pytest.mark.slow
def test_a_baseline_is_added_as_contributing_tells(tiny, tmp_path):
    """In a copy of the programs: its first command, two steps of the method, its test by hand."""
    text = CONTRIBUTING.read_text()
    copy, method = re.search(r"^(cp \S+ baselines/(\w+)\.py)$", text, re.M).groups()
    for file in REPO.glob("*.py"):
        shutil.copy(file, tmp_path)
    shutil.copytree(REPO / "baselines", tmp_path / "baselines")
    (tmp_path / "emoji").symlink_to(REPO / "emoji")
    subprocess.run(shlex.split(copy), cwd=tmp_path, check=True)

    flags = ["--target", "Grumpy Cat", "--anchor", "Cat", "--model", str(tiny), "--steps", "2"]
    (tmp_path / "test_by_hand.py").write_text(
        re.search(r"^```python\n(.*?)^```", text, re.S | re.M)[1]
    )
    code = f"""
import sys
import pytest
from baselines import {method} as m

m.unlearn(m.parse_args({flags}))
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "test_by_hand.py"]))
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / f"runs/{method}-grumpy-cat/delta.safetensors").exists()


def test_the_line_to_break_exists():
    """The diff in CONTRIBUTING.md removes a line of doco.py."""
    diff = re.search(r"```diff\n(.*?)```", CONTRIBUTING.read_text(), re.S)[1]
    removed = re.findall(r"^-(.*)$", diff, re.M)
    assert len(removed) == 1 and removed[0] in (REPO / "doco.py").read_text().splitlines()


def test_the_pinned_torch_is_the_tested_one():
    """The CPU build that the README names is the version of requirements.txt."""
    pinned = set(re.findall(r"torch==[\d.]+", README.read_text()))
    assert pinned == set(re.findall(r"^torch==\S+", (REPO / "requirements.txt").read_text(), re.M))


def test_the_template_is_short():
    """Under 100 lines, blank ones not counted, as CONTRIBUTING.md promises."""
    lines = (REPO / "baselines/_template.py").read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) < 100
    assert "under 100 lines" in CONTRIBUTING.read_text()
