"""Every key of the config with values that it should not have, on the command line and from Python."""

import math
import os
from collections.abc import Iterator

from dpo_jax.config.keys import KEYS
from tests import places
from tests.fuzz.cases import Case, Command, Place, train

# On the command line everything is a text. Bytes that are no UTF-8 arrive as Python's surrogates.
TEXTS: dict[str, str | bytes] = {
    "empty": "",
    "space": " ",
    "nan": "nan",
    "infinite": "inf",
    "minus-infinite": "-inf",
    "beyond-float": "1e999",
    "beyond-float32": "1e39",
    "below-float32": "1e-46",
    "zero": "0",
    "negative-zero": "-0.0",
    "negative": "-1",
    "very-negative": "-4294967297",
    "two-to-32": "4294967296",
    "two-to-63": "9223372036854775808",
    "many-digits": "9" * 5000,
    "full-width-digits": "\uff11\uff12",
    "arabic-digits": "\u0661\u0662",
    "underscores": "1_000",
    "hexadecimal": "0x10",
    "fraction": "2.5",
    "true": "True",
    "none": "None",
    "list": "[1, 2]",
    "object": "{'a': 1}",
    "quote": "'",
    "line-end": "a\nerror: forged",
    "escape": "\x1b[31mred\x1b[2J",
    "not-utf8": b"\xff\xfe",
    "surrogate-pair": "\U0001f600",
    "right-to-left": "\u202egpj.exe",
    "long-name": "x" * 300,
    "long-path": "/".join(["x" * 200] * 30),
    "long-text": "x" * 100_000,
    "root": "/",
    "parent": "../../..",
    "home": "~nobody-of-that-name",
    "device": "/dev/zero",
    "null-device": "/dev/null",
    "process": "/proc/self/environ",
    "shell": "$(touch canary)",
    "back-ticks": "`touch canary`",
    "percent": "%s%n%(x)s",
    "braces": "{0.__class__}{x!r}",
    "colon": ":",
    "comma": ",",
    "two-colons": "a:b:c",
    "weights": "a:nan,b:-1",
    "closed-port": "http://127.0.0.1:9/v1|m",
    "unknown-scheme": "nowhere://x/y",
    "zip": "zip://x::/dev/null",
    "file-scheme": "file:///etc/hostname",
    "module": "no_such_module_of_anybody:function",
}
# What a caller of `dpo_jax.run` can give besides texts.
VALUES = {
    "None": None,
    "list": [1],
    "dict": {"a": 1},
    "bytes": b"x",
    "nan": math.nan,
    "infinite": math.inf,
    "bool": True,
    "negative": -1,
    "huge": 10**400,
    "fraction": 0.5,
    "lone-surrogate": "\ud800",
    "null-byte": "a\0b",
    "text": "x",
    "object": object(),
}
PLACES = ("cache_dir", "compilation_cache")  # where the user wants something written
# A value that may be right is trained with: two updates, and an export of what they made.
BRIEF = {"num_steps": 2, "sft_steps": 0, "eval_pairs": 4, "eval_every": 0, "sample_prompts": 0, "kl_prompts": 0}


def cases() -> Iterator[Case]:
    for key in KEYS:
        for how, text in TEXTS.items():
            if key not in PLACES or how not in ("root", "parent"):  # which would be right, and written to
                yield Case(f"config/{key}/{how}", _on_the_command_line(key, text), writes=key in PLACES)
        for how in VALUES:
            yield Case(f"config/{key}/python-{how}", _from_python(key, how), writes=key in PLACES)
    for how, words in FLAGS.items():
        yield Case(f"config/flags/{how}", _flags(words), writes=how.startswith("workdir"))


def _on_the_command_line(key: str, text: str | bytes):
    def prepare(place: Place) -> Command:
        command = train(place, **BRIEF)
        kept = [word for word in command.arguments if not str(word).startswith(f"--config.{key}=")]
        value = text if isinstance(text, str) else os.fsdecode(text)
        return Command(command.module, [*kept, f"--config.{key}={value}"])

    return prepare


def _from_python(key: str, how: str):
    def prepare(place: Place) -> Command:
        return Command("tests.fuzz.called", [key, how, str(place.work / "run")])

    return prepare


# Other words of the command line; {work} and {given} are the case's directories.
PRESET = str(places.ROOT / "configs/hhh.py")
FLAGS: dict[str, list[str]] = {
    "nothing": [],
    "no-config": ["--workdir={work}/run"],
    "no-workdir": [f"--config={PRESET}:tiny"],
    "unknown-preset": [f"--config={PRESET}:nope", "--workdir={work}/run"],
    "preset-with-escape": [f"--config={PRESET}:\x1b[31m", "--workdir={work}/run"],
    "two-colons": [f"--config={PRESET}:tiny:tiny", "--workdir={work}/run"],
    "config-is-a-directory": ["--config=/", "--workdir={work}/run"],
    "config-is-a-device": ["--config=/dev/null", "--workdir={work}/run"],
    "config-is-not-there": ["--config=nowhere.py", "--workdir={work}/run"],
    "config-is-no-python": ["--config={given}/binary.py", "--workdir={work}/run"],
    "config-without-function": ["--config={given}/empty.py", "--workdir={work}/run"],
    "config-of-another-kind": ["--config={given}/list.py", "--workdir={work}/run"],
    "config-name-too-long": [f"--config={'x' * 300}.py", "--workdir={work}/run"],
    "unknown-key": [f"--config={PRESET}:tiny", "--workdir={work}/run", "--config.nope=1"],
    "unknown-key-with-escape": [f"--config={PRESET}:tiny", "--workdir={work}/run", "--config.\x1b[31m=1"],
    "key-without-value": [f"--config={PRESET}:tiny", "--workdir={work}/run", "--config.seed"],
    "key-below-a-key": [f"--config={PRESET}:tiny", "--workdir={work}/run", "--config.seed.x=1"],
    "unknown-flag": [f"--config={PRESET}:tiny", "--workdir={work}/run", "--nope"],
    "a-word": [f"--config={PRESET}:tiny", "--workdir={work}/run", "word"],
    "distributed-maybe": [f"--config={PRESET}:tiny", "--workdir={work}/run", "--distributed=maybe"],
    "workdir-is-a-file": [f"--config={PRESET}:tiny", "--workdir={given}/empty.py"],
    "workdir-below-a-file": [f"--config={PRESET}:tiny", "--workdir={given}/empty.py/run"],
    "workdir-is-a-device": [f"--config={PRESET}:tiny", "--workdir=/dev/null"],
    "workdir-of-the-system": [f"--config={PRESET}:tiny", "--workdir=/proc/run"],
    "workdir-name-too-long": [f"--config={PRESET}:tiny", "--workdir={work}/" + "x" * 300],
    "workdir-not-utf8": [f"--config={PRESET}:tiny", "--workdir={work}/" + os.fsdecode(b"\xff")],
    "workdir-with-line-end": [f"--config={PRESET}:tiny", "--workdir={given}/empty.py/a\nerror: forged"],
    "workdir-of-a-stranger": [f"--config={PRESET}:tiny", "--workdir=~nobody-of-that-name/run"],
    "workdir-of-unknown-scheme": [f"--config={PRESET}:tiny", "--workdir=nowhere://bucket/run"],
    "workdir-empty": [f"--config={PRESET}:tiny", "--workdir="],
    "flag-file": [f"--config={PRESET}:tiny", "--workdir={work}/run", "--flagfile=/dev/null"],
}


def _flags(words: list[str]):
    def prepare(place: Place) -> Command:
        (place.given / "binary.py").write_bytes(bytes(range(256)))
        (place.given / "empty.py").write_text("")
        (place.given / "list.py").write_text("def get_config(preset=''):\n  return [1]\n")
        fill = lambda word: word.replace("{work}", str(place.work)).replace("{given}", str(place.given))
        return Command("dpo_jax.train", [fill(word) for word in words])

    return prepare
