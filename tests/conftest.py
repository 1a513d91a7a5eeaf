"""Loads the fixtures, but not where they are not needed: the process that starts xdist's workers would import torch first."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")
