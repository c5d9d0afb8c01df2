"""Headless Chromium for tests that look at pages; they are skipped, and say so, without it."""

import os
import shutil

import pytest

CHROMIUM = shutil.which("chromium")


def need_chromium():
    """Skip the module, unless it was asked for and there is a Chromium."""
    if os.environ.get("OMNIMERGE_BROWSER") != "1":
        pytest.skip("opens a browser: set OMNIMERGE_BROWSER=1", allow_module_level=True)
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium", allow_module_level=True)
