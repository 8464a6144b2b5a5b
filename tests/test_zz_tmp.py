from pathlib import Path
import pytest
from test_main import *
import doco, instance_unlearn, backbones


@pytest.fixture(scope="module")
def folder():
    return Path("/tmp/fx/root")


@pytest.fixture(scope="module")
def concept(folder):
    a = doco.parse_args(
        ["--target", "Grumpy Cat", "--anchor", "Cat", "--model", str(REPO / "emoji/sd")]
    )
    return f"\nload it with:\n{doco.loading_lines(a, Path('runs/doco-grumpy-cat'))}\n\n\n", ""


@pytest.fixture(scope="module")
def instance(folder):
    a = instance_unlearn.parse_args([])
    b = backbones.load_backbone(a.model)
    return (
        f"\nload it with:\n{instance_unlearn.loading_lines(a, b, Path('runs/instance-twemoji-cowboy-hat-face'))}\n\n\n",
        "",
    )
