"""The tests of extras have the fixtures of tests/."""

from tests.conftest import run, seeded, snapshots, trained, trained_once  # noqa: F401
