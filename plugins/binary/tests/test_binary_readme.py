"""The README's table of options is that of the code."""

from pathlib import Path

from lowbit.options import describe_options
from lowbit_binary.options import BinaryOptions

README = Path(__file__).parents[1] / "README.md"


def test_the_options_table_is_current():
    rows = [
        "| `{name}` | {type} | {default} | {help} |".format(
            **{key: text.replace("|", "\\|") for key, text in option.items()}
        )
        for option in describe_options(BinaryOptions)
    ]
    table = "\n".join(["| option | type | default | what |", "|---|---|---|---|", *rows])
    assert table in README.read_text(), f"the table should be:\n{table}"
