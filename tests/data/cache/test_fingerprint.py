"""What a cache is known by: a change of the code that makes pairs is another cache, and words are none."""

import inspect
from pathlib import Path

import pytest

from dpo_jax.data.cache import fingerprint


@pytest.mark.parametrize("module", fingerprint._DECIDE, ids=lambda module: module.__name__.rpartition(".")[2])
def test_words_decide_nothing_and_statements_everything(module, tmp_path, monkeypatch):
    text, file = Path(module.__file__).read_text(), tmp_path / "module.py"
    where = inspect.getfile
    monkeypatch.setattr(inspect, "getfile", lambda one: str(file) if one is module else where(one))

    def code(changed):
        file.write_text(changed)
        return fingerprint._our_code()

    before = code(text)
    import_line = next(line for line in text.splitlines() if line.startswith(("from dpo_jax.", "from typing")))
    for words in (
        text.replace('"""', '"""Other words. ', 1),
        text + "\n\n# a comment\n",
        text.replace(import_line, import_line.replace("dpo_jax.data", "dpo_jax.elsewhere") + "  # moved"),
    ):
        assert code(words) == before
    changed = "return not ".join(text.rsplit("return ", 1))
    assert code(changed) not in (before, code(changed + "x = 1\n"))
    assert code(text + 'x = "# no comment"\n') != code(text + 'x = "# no comment, too"\n')
