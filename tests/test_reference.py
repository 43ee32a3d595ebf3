"""docs/reference.md says what the docstrings say."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_is_that_of_the_docstrings():
    found = runpy.run_path(str(DOCS / "reference.py"))
    assert (DOCS / "reference.md").read_text() == found["page"](), "python docs/reference.py makes it anew"
