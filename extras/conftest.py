"""The tests of extras have the fixtures of tests/."""

from tests.conftest import run, seeded, trained, trained_once  # noqa: F401
