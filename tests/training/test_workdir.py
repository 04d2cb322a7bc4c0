"""A run's directory: the day that its chat template writes stays that of its beginning."""

import datetime
import json

from dpo_jax.training import workdir


def test_the_day_is_that_of_the_run_that_is_there_else_todays(tmp_path):
    today = datetime.date.today().isoformat()
    assert workdir.first_day(tmp_path) == today
    identity = {"data": {"template_date": "2026-07-26"}}
    workdir.keep_identity(tmp_path, identity, resumed=False)
    assert workdir.first_day(tmp_path) == "2026-07-26"
    workdir.keep_identity(tmp_path, identity, resumed=True)
    (tmp_path / workdir.IDENTITY).write_text(json.dumps({"data": {"template_date": ""}}))  # a template without a date
    assert workdir.first_day(tmp_path) == today
    (tmp_path / workdir.IDENTITY).write_text("{")  # `keep_identity` refuses it
    assert workdir.first_day(tmp_path) == today
