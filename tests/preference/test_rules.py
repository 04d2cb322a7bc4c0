"""Judges that are functions: the rule `shorter` by hand, and what a name can be wrong in."""

import subprocess
import sys

import numpy as np
import pytest

from dpo_jax.data.comparison import Comparison
from dpo_jax.errors import UserError
from dpo_jax.preference.models import PreferenceModel, swapped
from dpo_jax.preference.rules import load_function, shorter

USER = {"role": "user", "content": "Name a colour."}


def said(*texts, role="assistant"):
    return [{"role": role, "content": text} for text in texts]


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        (said("Red, I would say."), said("Red."), 1.0),
        (said("Red."), said("Red, I would say."), -1.0),
        (said("Red."), said("Blu."), 0.0),
        (said(""), said("Red."), -1.0),
        (said("Naïve"), said("Naive!"), -1.0),  # characters, not bytes
        (said("Red.", "Blue."), said("Green."), 1.0),  # nine characters against six
        ([*said("R."), *said("a long answer of a tool", role="tool"), *said("B.")], said("Green."), -1.0),
    ],
)
def test_fewer_characters_win(a, b, verdict):
    comparison = Comparison([USER], a, b)
    assert shorter(comparison) == verdict
    assert shorter(swapped(comparison)) == -verdict


def test_texts_that_only_a_tokenizer_can_divide_count_too():
    assert shorter(Comparison([], [], [], texts=("", "Q: why? A: long", "Q: why? A: s"))) == 1.0


def test_it_is_a_judge_by_its_name():
    judge = load_function("dpo_jax.preference.rules:shorter")
    assert isinstance(judge, PreferenceModel)
    assert judge.name == "dpo_jax.preference.rules:shorter"
    verdicts = judge([Comparison([USER], said("Red, it is."), said("Red.")), Comparison([USER], said("a"), said("b"))])
    np.testing.assert_array_equal(verdicts, [1.0, 0.0])


MODULE = """
import {imports}

answer = "b"

class Judge:
    pass

def first(comparison):
    return 0.5 if comparison.completion_b[0]["content"] < comparison.completion_a[0]["content"] else -0.5

def unsure(comparison):
    return None

def failing(comparison):
    raise KeyError("no\\nsuch key")

{last}
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of a user's own into the current directory; returns its name, new for every test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != ""])
    name = f"own_{tmp_path.name}"

    def write(imports="math", last=""):
        (tmp_path / f"{name}.py").write_text(MODULE.format(imports=imports, last=last))
        return name

    yield write
    sys.modules.pop(name, None)


def test_a_function_of_the_current_directory_judges(module):
    judge = load_function(f"{module()}:first")
    pairs = [Comparison([USER], said("b"), said("a")), Comparison([USER], said("a"), said("b"))]
    np.testing.assert_array_equal(judge(pairs), [0.5, -0.5])
    assert np.isnan(load_function(f"{module()}:unsure")(pairs)).all()


def refusal(name):
    with pytest.raises(UserError) as refused:
        load_function(name)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{}", "judge {}: needed is module:function, such as dpo_jax.preference.rules:shorter"),
        (":first", "judge :first: needed is module:function"),
        ("{}:", "judge {}:: needed is module:function"),
        ("absent_module:f", "judge absent_module:f: module absent_module cannot be imported (No module named"),
        ("{}:none", "judge {}:none: module {} has no none; check the name"),
        ("{}:answer", "judge {}:answer: answer is a str; needed is a function of one comparison"),
        ("{}:Judge", "judge {}:Judge: Judge is a class; needed is a function of one comparison"),
    ],
)
def test_a_name_that_is_no_function_is_refused_in_one_line(module, name, words):
    own = module()
    assert refusal(name.replace("{}", own)).startswith(words.replace("{}", own))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"imports": "absent_module"}, "cannot be imported (No module named 'absent_module'); run from its directory"),
        ({"last": "raise ValueError('two\\nlines')"}, "failed (ValueError: two lines); mend it"),
        ({"last": "raise SystemExit(3)"}, "failed (SystemExit: 3); mend it"),
        ({"last": "def"}, "failed (SyntaxError: "),
    ],
)
def test_a_module_that_fails_is_refused_in_one_line(module, wrong, words):
    assert words in refusal(f"{module(**wrong)}:first")


def test_a_function_that_fails_says_which_one(module):
    name = f"{module()}:failing"
    with pytest.raises(UserError, match=rf"^judge {name}: it ended in KeyError: .*mend it$"):
        load_function(name)([Comparison([USER], said("a"), said("b"))])


def test_a_rule_is_loaded_without_jax():
    code = (
        "import sys; from dpo_jax.preference.rules import load_function; "
        "load_function('dpo_jax.preference.rules:shorter'); assert not {'jax', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
