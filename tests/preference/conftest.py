"""What tests of preference models share."""

from tests.fakes.judge_server import judge_server  # noqa: F401 (a fixture)
