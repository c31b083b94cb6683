"""docs/rivals.md says what the libraries here do."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import rivals


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_docs_page_is_generated(torchvision: ModuleType) -> None:
    page = rivals.DOCS_PAGE.read_text()
    if rivals.versions() not in page:
        pytest.skip(f"the page is of other versions than {rivals.versions()}")
    assert page == rivals.render(), "run: python tests/compat/rivals.py"
