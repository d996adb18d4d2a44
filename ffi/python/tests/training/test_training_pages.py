"""The code of docs/trl.md and docs/ray.md runs as it stands."""

import pytest

import pages


@pytest.mark.parametrize("page", ["docs/trl.md", "docs/ray.md"])
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages.run(page)
