"""The code of README.md and docs/python.md runs as it stands."""

import pytest

import pages


@pytest.mark.parametrize("page", ["README.md", "ffi/python/README.md", "docs/python.md"])
def test_page(page, capsys):
    pages.run(page)
    assert capsys.readouterr().out
