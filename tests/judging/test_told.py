"""What the command says of a judge that is a server, over loopback."""

import re

from dpo_jax import judge as door
from tests.fakes.judge_server import answering, judge_server, shorter  # noqa: F401 (a fixture)
from tests.judging.judges import line, write


def test_a_servers_answers_and_cache_are_told(judge_server, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path))
    server = judge_server(answering(shorter))
    files = [write(tmp_path / f"{x}.jsonl", [line(f"p{i}", [f"{x} {i}"]) for i in range(4)]) for x in ("a", "bb")]
    told = []
    for _ in range(2):
        assert door.main(["judge", "compare", *files, f"--judge={server.spec}"]) == 0
        told += re.findall(r"(\d+) answers, (\d+) more from the cache", capsys.readouterr().err)
    assert told == [("8", "0"), ("0", "8")]  # both orders of four comparisons
