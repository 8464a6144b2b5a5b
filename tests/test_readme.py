"""Every command in the README and in the docstrings parses, and every flag that the README names exists."""

import re
import shlex

import pytest

import bench
import doco
import eval as evaluation
import instance_unlearn
import reproduce

MODULES = {"bench": bench, "eval": evaluation, "reproduce": reproduce}
MODULES |= {file.removesuffix(".py"): module for file, module in reproduce.SCRIPTS.items()}


def commands():
    texts = [(doco.REPO / "README.md").read_text()]
    texts += [module.__doc__ for module in MODULES.values()]
    for line in "\n".join(texts).replace("\\\n", " ").splitlines():
        if found := re.search(rf"(?:torchrun|python)\s[^`|&]*?({'|'.join(MODULES)})\.py(.*)", line):
            flags = re.split(r"`|\s#|&&|;", found[2])[0]
            if flags.strip() or found[1] != "doco":  # "torchrun doco.py" alone is its name, not a command
                yield found[1], flags


@pytest.mark.parametrize(("script", "flags"), sorted(set(commands())))
def test_command_parses(script, flags):
    MODULES[script].parse_args(shlex.split(flags))


def test_there_are_commands():
    assert len(set(commands())) >= 16 and {script for script, _ in commands()} == MODULES.keys()


@pytest.mark.parametrize("module", [doco, instance_unlearn])
def test_equations_named_in_the_code_are_in_the_docstring(module):
    source = (doco.REPO / f"{module.__name__}.py").read_text()
    body = source.split('"""', 2)[2]
    assert set(re.findall(r"Eq\. (\d+)", body)) <= set(re.findall(r"Eq\. (\d+)", module.__doc__))


DOCUMENTS = ["README.md", "emoji/README.md", *(f"results/{f.name}" for f in sorted((doco.REPO / "results").glob("*.md")))]


@pytest.mark.parametrize("file", DOCUMENTS)
def test_files_that_are_linked_exist(file):
    text = (doco.REPO / file).read_text()
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert link.startswith("http") or (doco.REPO / file).parent.joinpath(link).exists(), link


def test_no_row_to_be_run_again_holds_a_figure():
    for file in (doco.REPO / "results").glob("*.md"):
        for line in file.read_text().splitlines():
            if line.startswith("|") and "to be run again" in line:
                assert not re.search(r"\d", line.split("to be run again", 1)[1]), line
