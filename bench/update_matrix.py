"""Write the matrix of schemes and formats into the README, between its two markers."""

from __future__ import annotations

from pathlib import Path

from lowbit.matrix import markdown
from lowbit.plugins import installed

readme = Path(__file__).parent.parent / "README.md"
before, _, rest = readme.read_text().partition("<!-- matrix -->")
_, _, after = rest.partition("<!-- /matrix -->")
readme.write_text(f"{before}<!-- matrix -->\n{markdown(installed())}\n<!-- /matrix -->{after}")
