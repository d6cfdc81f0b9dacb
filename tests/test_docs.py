"""The documentation is current: matrix, hooks, commands and options are those of the code."""

import re
import sys
from pathlib import Path

import pytest

import lowbit
from lowbit import hookspecs
from lowbit.cli import cli
from lowbit.matrix import markdown
from lowbit.options import describe_options

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
HOOKS = [name for name in vars(hookspecs) if name.startswith("lowbit_register_")]


def test_the_matrix_is_current():
    shown = README.split("<!-- matrix -->")[1].split("<!-- /matrix -->")[0].strip()
    assert shown == markdown(lowbit.installed()), "run: make matrix"


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_are_documented(hook):
    assert f"`{hook}`" in README
    assert getattr(hookspecs, hook).__doc__


@pytest.mark.parametrize("command", list(cli.commands))
def test_commands_are_shown(command):
    assert f"lowbit {command}" in README


@pytest.mark.parametrize("name", list(lowbit.installed().quantizers))
def test_quantizer_options_are_documented(name):
    quantizer = lowbit.installed().quantizers[name]
    module = Path(sys.modules[type(quantizer).__module__].__file__)
    page = next(path for path in (folder / "README.md" for folder in module.parents) if path.exists())
    assert page != ROOT / "README.md", f"{module.parent} needs a README.md"
    for option in describe_options(quantizer.Options):
        assert f"`{option['name']}`" in page.read_text(), f"{page} does not mention {option['name']}"
        assert option["help"], f"{name} option {option['name']} has no help"


def test_the_readme_opens_with_the_two_commands():
    block = re.search(r"```bash\n(.*?)```", README, re.DOTALL)
    commands = [line.split("#")[0].strip() for line in block.group(1).splitlines()]
    assert commands == ["make demo", "make test"]


def test_links_lead_somewhere():
    for page in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        for target in re.findall(r"\]\(([^)#:]+)\)", page):
            assert (ROOT / target).exists(), target
