"""Judges of the tests, by the name `tests.judging.judges:NAME`, and files of answers for them."""

import json
import os

SEEN = "TEST_JUDGE_SEEN"  # the environment's name of a file that a line is added to for every order that is asked
ENDS = "TEST_JUDGE_ENDS"  # and of how many may be asked before the process ends at once


def texts(comparison):
    return tuple(side[-1]["content"] for side in (comparison.completion_a, comparison.completion_b))


def shorter(comparison):
    a, b = map(len, texts(comparison))
    return (a > b) - (a < b)


def counted(comparison):
    """`shorter`, and what it was asked is written down."""
    path = os.environ[SEEN]
    with open(path, "a") as file:
        file.write(json.dumps([comparison.prompt_conversation[-1]["content"], *texts(comparison)]) + "\n")
    with open(path) as file:
        if len(file.readlines()) == int(os.environ.get(ENDS, -1)):
            os._exit(9)
    return shorter(comparison)


def second(comparison):
    return 1


def some(comparison):
    """No verdict on what begins with x."""
    return None if any(text.startswith("x") for text in texts(comparison)) else shorter(comparison)


def none_of_it(comparison):
    return None


def broken(comparison):
    raise KeyError("no such thing")


def loud(comparison):
    return 2


def stopped(comparison):
    raise KeyboardInterrupt


def answer(text, tokens=None):
    return {"text": text, "finish_reason": "stop"} | ({} if tokens is None else {"token_ids": list(range(tokens))})


def line(name, texts, prompt=None, **more):
    given = prompt if prompt is not None else f"question {name}"
    return {"id": name, "prompt": given, "answers": [answer(text, len(text)) for text in texts], "model": "m", **more}


def write(path, lines):
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return str(path)
