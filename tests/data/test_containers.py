"""Every container of rows beside those of test_files.py: tables, columnar files, other encodings, wrapped JSON."""

import csv
import gzip
import io
import json
import pickle
import tracemalloc

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_jax.data import json_rows
from dpo_jax.data.containers import read_rows
from dpo_jax.data.files import find_files
from dpo_jax.data.raw import BadLine, ColumnarRow
from dpo_jax.errors import UserError

ROWS = [{"prompt": f"Frage {n}?", "chosen": 'jä 🙂, "gut"\nso', "rejected": "no\tno"} for n in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def table(delimiter=",", quoting=csv.QUOTE_MINIMAL, rows=ROWS, end="\r\n"):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def arrow(stream):
    sink, made = io.BytesIO(), pa.Table.from_pylist(ROWS)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, made.schema) as writer:
        writer.write_table(made, max_chunksize=2)
    return sink.getvalue()


def feather():
    pyarrow.feather.write_feather(pa.Table.from_pylist(ROWS), sink := io.BytesIO())
    return sink.getvalue()


COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
CONTENTS = {
    "a.csv": table(),
    "mac.csv": table(end="\r"),
    "quoted.csv": table(quoting=csv.QUOTE_ALL, end="\n"),
    "mark.csv": "\ufeff" + table(),
    "utf16.csv": table().encode("utf-16"),
    "packed.csv.gz": gzip.compress(table().encode()),
    "semicolons.csv": table(";"),
    "tabs.csv": table("\t"),
    "a.tsv": table("\t"),
    "no name": table(),
    "tabs in a.txt": table("\t"),
    "lines.csv": LINES,
    "file.arrow": arrow(stream=False),
    "stream.arrow": arrow(stream=True),
    "packed.arrow.gz": gzip.compress(arrow(stream=False)),
    "a.feather": feather(),
    "utf16.jsonl": LINES.encode("utf-16"),
    "utf16 without mark.jsonl": LINES.encode("utf-16-le"),
    "utf16 big.jsonl": LINES.encode("utf-16-be"),
    "utf32.jsonl": LINES.encode("utf-32"),
    "pretty.json": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "one key a line.json": "\n".join(json.dumps(row, indent=0).replace("{\n", "{", 1) for row in ROWS),
    "in one line.json": "".join(json.dumps(row) for row in ROWS),
    "with commas.json": ",\n".join(map(json.dumps, ROWS)),
    "wrapped.json": json.dumps({"version": "1", "data": ROWS}, indent=1),
    "wrapped in a line.json": json.dumps({"data": ROWS}),
    "any key.json": json.dumps({"my_own_rows": ROWS, "license": {"name": "MIT"}}),
    "columns.json": json.dumps(COLUMNS),
    "pandas.json": json.dumps({name: {str(n): one for n, one in enumerate(v)} for name, v in COLUMNS.items()}),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_every_container_gives_the_same_rows(tmp_path, name):
    found = list(read_rows(written(tmp_path / name, CONTENTS[name])))
    assert [row for _, row in found] == ROWS
    assert len({place for place, _ in found}) == (1 if name == "in one line.json" else len(ROWS))


@pytest.mark.parametrize("name", ["pretty.json", "one key a line.json", "wrapped.json"])
def test_windows_smaller_than_an_object_lose_nothing(tmp_path, name, monkeypatch):
    path = written(tmp_path / name, CONTENTS[name])
    expected = list(read_rows(path))
    small = json_rows.CHUNK // (1 << 14)
    assert small < len(CONTENTS[name])
    monkeypatch.setattr(json_rows, "CHUNK", small)
    assert list(read_rows(path)) == expected


def test_rows_are_at_the_line_where_they_begin(tmp_path):
    path = written(tmp_path / "a.csv", 'prompt,chosen\n"a\nb",c\n\nd,e\n')
    assert [place for place, _ in read_rows(path)] == [f"{path}:2", f"{path}:5"]
    path = written(tmp_path / "a.json", '{\n "a": 1\n}\n\n{\n "a": 2\n}\n')
    assert [place for place, _ in read_rows(path)] == [f"{path}:1", f"{path}:5"]


def test_a_row_that_holds_lists_is_a_row(tmp_path):
    turn = {"role": "user", "content": "Hi"}
    for row in (
        {"chosen": [turn, turn], "rejected": [turn, turn]},
        {"prompt": "Hi", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
        {"conversations": [turn], "chosen": turn, "rejected": turn},
        {"question": "Hi", "choices": [{"a": 1}, {"a": 2}]},  # for a function of one's own
        {"prompt": "Hi", "chosen": ["a", "b"], "rejected": ["c"]},
    ):
        for text in (json.dumps(row), json.dumps(row, indent=1)):
            assert [found for _, found in read_rows(written(tmp_path / "a.json", text))] == [row]


@pytest.mark.parametrize("column", ["role", "from"])
@pytest.mark.parametrize("key", ["data", "anything"])
def test_a_column_that_is_named_like_a_turns_makes_no_turn(tmp_path, column, key):
    rows = [{column: "x", "prompt": "a", "chosen": "b", "rejected": "c"}, {column: "y", "prompt": "d"}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({key: rows}))
    assert [row for _, row in read_rows(str(path))] == rows
    rows = rows[1:]  # resolved by nothing: prompts alone
    path.write_text(json.dumps({key: rows}))
    assert [row for _, row in read_rows(str(path))] == rows
    turns = {key: [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path.write_text(json.dumps(turns))
    assert [row for _, row in read_rows(str(path))] == [turns]


def test_columnar_rows_say_so(tmp_path):
    for name in ("file.arrow", "a.feather", "stream.arrow"):
        assert all(type(row) is ColumnarRow for _, row in read_rows(written(tmp_path / name, CONTENTS[name])))


def test_bad_rows_of_a_table_cost_these_rows_only(tmp_path):
    text = 'prompt,chosen,rejected\na,b,c\na,b\na,b,c,d\n"a"x,b,c\na,b,\xffc\nd,e,f\n'
    rows = [row for _, row in read_rows(written(tmp_path / "a.csv", text.encode("latin-1")))]
    assert [row.reason if isinstance(row, BadLine) else row["chosen"] for row in rows] == [
        "b", "invalid_csv", "invalid_csv", "invalid_csv", "b", "e",
    ]  # fmt: skip
    assert rows[4]["rejected"] == "\udcffc"  # which every parser refuses


OTHERS = {
    "a.jsonl": (table(), "values with ',' between them, not JSON; call it .csv"),
    "b.jsonl": (table("\t"), "call it .tsv"),
    "a.zip": (b"PK\x03\x04" + b"\0" * 30, "a zip archive"),
    "a.jsonl.zst": (b"\x28\xb5\x2f\xfd" + b"\0" * 30, "packed with zstandard"),
    "a.pkl": (pickle.dumps(ROWS, protocol=4), "a Python pickle"),
    "a.parquet": ("version https://git-lfs.github.com/spec/v1\noid x\n", "a pointer of Git LFS"),
    "a.json": ("<!DOCTYPE html>", "a web page"),
    "twice.csv": ("a,a\n1,2\n", "two columns are called 'a'"),
    "open.csv": ('prompt,chosen\n"a,b\nc,d\n', "a quoted value does not end"),
    "broken.arrow": (arrow(stream=False)[:-40], "damaged after 0 rows|cannot be read"),
    "cut.arrow": (arrow(stream=True)[:-300], "damaged after|cannot be read"),
    "broken.feather": (b"FEA1" + b"\0" * 40, "damaged after 0 rows|cannot be read"),
    "cut.json": (json.dumps({"data": ROWS}, indent=1)[:-9], "the object breaks off"),
    "several.json": (json.dumps({"train": ROWS, "test": ROWS}), "several lists of rows .train, test."),
    "odd.jsonl": (LINES.encode("utf-16")[:-1], "damaged after"),
    "header.csv": ("prompt,chosen,rejected\n", "the file is empty"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_named_for_what_they_are(tmp_path, name):
    content, words = OTHERS[name]
    path = written(tmp_path / name, content)
    with pytest.raises(UserError, match=words) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(path)
    assert "\n" not in str(caught.value)


def test_tables_beside_other_files_are_left_alone(tmp_path):
    for name in ("figures.csv", "rows.jsonl", "more.arrow", "b.feather", "cache-0a1b.arrow", "dataset_info.json"):
        written(tmp_path / name, "x")
    names = lambda: [path.rsplit("/", 1)[-1] for path in find_files(str(tmp_path))]
    assert names() == ["b.feather", "more.arrow", "rows.jsonl"]
    for name in names():
        (tmp_path / name).unlink()
    (tmp_path / "cache-0a1b.arrow").unlink()
    written(tmp_path / "b.tsv.gz", "x")
    assert names() == ["b.tsv.gz", "figures.csv"]


@pytest.mark.parametrize("name", ["a.csv", "a.arrow", "pretty.json"])
def test_memory_does_not_grow_with_the_rows(tmp_path, name):
    rows = [{"prompt": "x" * 2000, "chosen": str(n)} for n in range(5000)]
    path = str(tmp_path / name)
    if name == "a.arrow":
        made = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(path, made.schema) as writer:
            writer.write_table(made, max_chunksize=500)  # a batch is read as a whole
    else:
        text = table(rows=rows) if name == "a.csv" else "\n".join(json.dumps(row, indent=1) for row in rows)
        written(tmp_path / name, text)
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path)) == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20  # the file has 10 MB


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.fixed_dictionaries({"prompt": cells, "chosen": cells}), min_size=1, max_size=4), tab=st.booleans()
)
def test_any_text_comes_back_from_a_table(tmp_path, rows, tab):
    path = tmp_path / ("a.tsv" if tab else "a.csv")
    found = [row for _, row in read_rows(written(path, table("\t" if tab else ",", rows=rows)))]
    assert found == rows
