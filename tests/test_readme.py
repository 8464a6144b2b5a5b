"""Every command in the README and in the docstrings parses, and every flag that the README names exists."""

import re
import shlex

import pytest

import doco
import eval as evaluation

PARSERS = {"doco.py": doco.parse_args, "eval.py": evaluation.parse_args}


def commands():
    texts = [(doco.HERE / "README.md").read_text(), doco.__doc__, evaluation.__doc__]
    for line in "\n".join(texts).replace("\\\n", " ").splitlines():
        if found := re.search(r"(?:torchrun|python)\s[^`|&]*?(doco|eval)\.py (.*--target.*)", line):
            yield found[1] + ".py", re.split(r"`|\s#|&&|;", found[2])[0]


@pytest.mark.parametrize(("script", "flags"), sorted(set(commands())))
def test_command_parses(script, flags):
    PARSERS[script](shlex.split(flags))


def test_there_are_commands():
    assert len(set(commands())) >= 8


def test_at_most_eighteen_flags_and_four_hundred_lines():
    source = (doco.HERE / "doco.py").read_text()
    assert source.count("add_argument(") <= 18 and len(source.splitlines()) <= 400
    assert len((doco.HERE / "gradsurgery.py").read_text().splitlines()) <= 90


def test_equations_named_in_the_code_are_in_the_docstring():
    source = (doco.HERE / "doco.py").read_text()
    body = source.split('"""', 2)[2]
    assert set(re.findall(r"Eq\. (\d+)", body)) <= set(re.findall(r"Eq\. (\d+)", doco.__doc__))
