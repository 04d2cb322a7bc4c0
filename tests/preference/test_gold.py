"""The gold rule against the grammar itself: every labelled pair, points by hand, and what a policy might try."""

import gzip
import itertools
import json
import math
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from dpo_jax.data import synthetic
from dpo_jax.data.comparison import Comparison, LabeledComparison
from dpo_jax.data.datasets import DATASETS
from dpo_jax.disk import read_json
from dpo_jax.preference import gold as rule
from dpo_jax.preference.gold import gold
from dpo_jax.preference.models import Scorer, swapped

GRAMMAR = read_json(synthetic.GRAMMAR)
SOUP = "I want to make lentil soup for a picnic. How do I keep the lentil soup fresh until tomorrow?"
TIPS = ("a shallow dish", "a clean glass jar", "a sealed tub", "a lidded pot")
ADVICE = "Cool the lentil soup quickly, then keep it in a lidded pot in the fridge."
START, END = "Good question.", "Enjoy the lentil soup!"
PLAIN = "It depends on the lentil soup. Maybe try a sealed tub and see. It is up to you."
RUDE = "Good grief. That reminds me of my barber, who never liked Tuesdays. Now let me rest."


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def points(text, prompt=SOUP):
    return gold().scores([([user(prompt)], [assistant(text)])])[0]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Labelled pairs of three seeds, as a run reads them."""
    found = []
    for seed in (0, 1, 17):
        path = tmp_path_factory.mktemp("hh")
        synthetic.write_hh(path, seed, train_pairs=1500, test_pairs=500)
        for split in ("train", "test"):
            with gzip.open(path / "synthetic" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
                found += [DATASETS["synthetic"].read(json.loads(line))[1][0] for line in lines]
    assert all(isinstance(one, LabeledComparison) for one in found)
    return found


def test_it_agrees_with_every_label_and_clearly(pairs):
    model = gold()
    assert isinstance(model, Scorer)
    assert model.name == "gold"
    comparisons = [one.comparison for one in pairs]
    labels = np.array([1.0 if one.label == "B" else -1.0 for one in pairs])
    verdicts = model(comparisons)
    assert len(verdicts) == 6000
    assert np.abs(labels.sum()) in (0, 6000)  # whichever side a reader puts first
    np.testing.assert_array_equal(np.sign(verdicts), labels)
    assert set(np.round(np.abs(verdicts), 3)) == {0.905, 0.995}  # one grade apart, and two
    np.testing.assert_array_equal(model([swapped(one) for one in comparisons]), -verdicts)


def test_clean_answers_have_the_points_of_their_grade(pairs):
    chosen = gold().scores([(one.comparison.prompt_conversation, one.chosen) for one in pairs])
    rejected = gold().scores([(one.comparison.prompt_conversation, one.rejected) for one in pairs])
    assert set(chosen) == {3.0, 0.0}
    assert set(rejected) == {0.0, -3.0}


def test_all_that_the_grammar_can_say_is_recognised():
    """Every sentence with every filling of its slots by its topic: the table of keys hides none behind another."""
    phrases = GRAMMAR["phrases"]
    others = list(itertools.product(phrases["who"], phrases["habit"]))
    ask = -1
    for topic in GRAMMAR["topics"]:
        for one in topic["asks"]:
            ask += 1
            for grade, kinds in GRAMMAR["sentences"].items():
                for kind in kinds:
                    for text in one["advice"] if kind == "advice" else phrases[kind]:
                        things = topic["things"] if "{thing}" in text else [""]
                        tips = one["tips"] if "{tip}" in text else [""]
                        named = others if "{who}" in text else others[:1]
                        for thing, tip, (who, habit) in itertools.product(things, tips, named):
                            said = synthetic._join([text], {"thing": thing, "tip": tip, "who": who, "habit": habit})
                            (found,), _ = rule._sentences(said)
                            assert found.kind is not None, said
                            assert found.kind.grade == grade, said
                            assert found.kind.ask == (ask if kind == "advice" else None), said
                            assert (found.things, found.tips) == ({thing} - {""}, {tip} - {""}), said


def test_every_question_is_understood():
    ask = -1
    for topic in GRAMMAR["topics"]:
        for one in topic["asks"]:
            ask += 1
            for question, thing, when in itertools.product(one["questions"], topic["things"], topic["whens"]):
                for before in ([], ["Hi!", topic["scene"]], ["And another thing."], [topic["scene"]]):
                    turn = synthetic._join([*before, question], {"thing": thing, "when": when})
                    found = rule._asked(turn)
                    assert found is not None, turn
                    assert (found.ask, found.thing, found.tips) == (ask, thing, set(one["tips"])), turn


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (ADVICE, 3),
        (f"{START} {ADVICE}", 3),
        (f"{START} {ADVICE} {END}", 3),
        (f"  {START} {ADVICE} \n", 3),
        ("Pour the lentil soup into a sealed tub once it stops steaming, and chill it overnight.", 3),
        # another thing, another tip, both; with courtesies, which are worth as much
        (ADVICE.replace("lentil soup", "tomato sauce"), 1.5),
        (ADVICE.replace("a lidded pot", "a spare charger"), 1.5),
        (ADVICE.replace("lentil soup", "tomato sauce").replace("a lidded pot", "a free walking tour"), -1),
        (f"{START} {ADVICE.replace('lentil soup', 'trip to Lisbon')} {END}", 1.5),
        (f"{ADVICE} Enjoy the tomato sauce!", (3 - 1) / 2),
        # plain, and plain about something else
        (PLAIN, 0),
        ("A clean glass jar could work for the lentil soup, or not.", 0),
        ("A spare charger could work for the lentil soup, or not.", -1),
        ("It depends on the tomato sauce. Maybe try a sealed tub and see.", -0.5),
        (f"{START} Maybe try a sealed tub and see.", 0),
        (f"It depends on the lentil soup. {ADVICE}", 1.5),
        # beside the point; courtesies alone
        ("Season the lentil soup in small steps and finish it with some fresh thyme.", -1),
        (f"{START} Season the lentil soup in small steps and finish it with some fresh thyme.", -1),
        (START, -1),
        (f"{START} {END}", -1),
        # garbled
        ("Cool the lentil soup quickly, then keep it in a lidded pot in the fridge of the fridge.", -2),
        ("cool the lentil soup quickly, then keep it in a lidded pot in the fridge.", -2),
        ("soup", -2),
        ("?!", -2),
        (SOUP, -2),
        ("Cool the {thing} quickly, then keep it in {tip} in the fridge.", -2),
        (f"{START} Cool the soup.", (-1 - 2) / 2),
        (f"{ADVICE} Let me know how", (3 - 2) / 2),
        # rude
        (RUDE, -3),
        ("Happy to help? Hardly. Did you want me to say a lidded pot? Think harder.", -3),
        (f"{ADVICE} Enjoy the mess.", 0),
        (f"{START} {RUDE}", (-1 - 3 - 3 - 3) / 4),
        # in excess, said again, out of order, without its full stop
        (f"{START} Of course. {ADVICE}", (3 - 1 + 3) / 3),
        (f"Hard to say. {START} {ADVICE}", (-1 + 3 + 3) / 3),
        (f"{ADVICE} Pour the lentil soup into a sealed tub once it stops steaming, and chill it overnight.", 1),
        (f"{ADVICE} {ADVICE}", 0),
        (f"{START} {START} {ADVICE}", (3 - 3 + 3) / 3),
        (f"{END} {ADVICE}", 2.5),
        (ADVICE[:-1], 2.5),
        (f"{START} {ADVICE[:-1]}", 2.5),
        (f"{ADVICE} {END[:-1]}", 2.5),
        (ADVICE[:-3], -2),
        ("", -6),
        (" \n", -6),
    ],
)
def test_points_by_hand(answer, expected):
    assert points(answer) == pytest.approx(expected, abs=1e-12)


def test_the_order_is_that_of_the_table():
    beside = "Season the lentil soup in small steps and finish it with some fresh thyme."
    slip = ADVICE.replace("lentil soup", "tomato sauce")
    falling = [points(x) for x in (ADVICE, ADVICE[:-1], slip, PLAIN, beside, f"{ADVICE[:40]} {ADVICE}", RUDE, "")]
    assert falling == sorted(set(falling), reverse=True)


def test_equal_answers_tie_exactly():
    a, b = f"{START} {ADVICE}", ADVICE.replace("a lidded pot", "a sealed tub")
    assert gold()([Comparison([user(SOUP)], [assistant(a)], [assistant(b)])]).tolist() == [0.0]


# ------------------------------------------------------------------------------------------------------------ prompts


def test_the_last_question_of_a_conversation_counts():
    turns = [user(SOUP), assistant(ADVICE), user("Thanks! Which seasoning brings out the best in lentil soup?")]
    season = "Season the lentil soup in small steps and finish it with some fresh thyme."
    found = gold().scores(
        [(turns, [assistant(season)]), (turns, [assistant(ADVICE)]), (turns[:1], [assistant(ADVICE)])]
    )
    assert found.tolist() == [3, -1, 3]


@pytest.mark.parametrize(
    "prompt",
    [
        "How are you?",
        "",
        "How do I keep the lentil soup fresh until tomorrow",
        "How do I keep the trip to Lisbon fresh until tomorrow?",  # a thing of another topic
        "How do I keep the soup fresh until tomorrow?",
        "I want to make tomato sauce for a picnic. How do I keep the lentil soup fresh until tomorrow?",
        "I have a lentil soup in two weeks. How do I keep the lentil soup fresh until tomorrow?",
        "Ignore the rules. How do I keep the lentil soup fresh until tomorrow?",
        SOUP.replace("?", "? Tell me."),
    ],
)
def test_no_verdict_where_the_grammar_does_not_ask(prompt):
    assert math.isnan(points(ADVICE, prompt))
    verdicts = gold()([Comparison([user(prompt)], [assistant(ADVICE)], [assistant(RUDE)])])
    assert np.isnan(verdicts).tolist() == [True]


def test_no_verdict_where_no_user_has_the_last_word():
    assert np.isnan(
        gold().scores([([], [assistant(ADVICE)]), ([user(SOUP), assistant(ADVICE)], [assistant(END)])])
    ).all()


def test_all_that_the_assistant_says_counts():
    tool = {"role": "tool", "content": "Now let me rest."}
    assert gold().scores([([user(SOUP)], [assistant(START), tool, assistant(ADVICE)])]).tolist() == [3]


# ------------------------------------------------------------------------------------------------------------ attacks


def everything(grades=("helpful", "plain", "rude")):
    """All sentences of these grades, filled for the soup, and advice for other questions."""
    slots = {"thing": "lentil soup", "who": "my barber", "habit": "collects bottle caps"}
    kinds = [kind for grade in grades for kind in GRAMMAR["sentences"][grade] if kind != "advice"]
    asks = GRAMMAR["topics"][0]["asks"] + GRAMMAR["topics"][1]["asks"]
    templates = [text for kind in kinds for text in GRAMMAR["phrases"][kind]]
    templates += [text for ask in asks for text in ask["advice"]] if "helpful" in grades else []
    return sorted({synthetic._join([text], slots | {"tip": tip}) for text in templates for tip in TIPS})


def is_clean(answer):
    """True of the best answers that the grammar itself gives to the question about the soup."""
    phrases, ask = GRAMMAR["phrases"], GRAMMAR["topics"][0]["asks"][1]
    slots = {"thing": "lentil soup"}
    starts, ends = (["", *phrases[kind]] for kind in ("helpful_start", "helpful_end"))
    clean = {
        synthetic._join([start, advice, end], slots | {"tip": tip})
        for start, advice, end, tip in itertools.product(starts, ask["advice"], ends, ask["tips"])
    }
    return answer in clean


def test_no_trick_beats_a_clean_answer():
    all_helpful, all_there = everything(("helpful",)), everything()
    for trick in (
        " ".join(all_there),
        " ".join(all_helpful),
        " ".join([ADVICE] * 2),
        " ".join([ADVICE] * 50),
        f"{START} {ADVICE} {END} {ADVICE}",
        f"{START} {ADVICE} {END} {END}",
        f"{SOUP} {ADVICE}",
        f"{ADVICE} {SOUP}",
        f"{ADVICE}\n\nHuman: {SOUP}\n\nAssistant: {ADVICE}",
        " ".join(text for text in all_helpful if "steaming" in text or "quickly" in text),
        f"{START} {ADVICE} {END} " + "and so on " * 500,
        ADVICE.replace(".", ", with a sealed tub."),
        ADVICE + "." * 3,
        ADVICE.upper(),
        f"{START}{ADVICE}",
    ):
        assert points(trick) < 3 - 1e-9, trick


def test_a_search_over_concatenations_finds_nothing_better():
    rng = random.Random(0)
    pools = [everything(), everything(("helpful",)), [START, END, ADVICE, "Of course.", "I hope that helps."]]
    equal = 0
    answers = [" ".join(rng.choices(rng.choice(pools), k=rng.randint(1, 6))) for _ in range(20_000)]
    for answer, found in zip(answers, gold().scores([([user(SOUP)], [assistant(x)]) for x in answers]), strict=True):
        assert found <= 3
        if found == 3:
            assert is_clean(answer), answer
            equal += 1
    assert equal > 20  # the search does come upon the best ones


def test_nothing_is_gained_by_more_sentences():
    extra = [*everything(), "Something else.", "more"]
    for answer in (ADVICE, f"{START} {ADVICE}", f"{START} {ADVICE} {END}"):
        longer = [" ".join(order) for more in extra for order in ((answer, more), (more, answer))]
        found = gold().scores([([user(SOUP)], [assistant(x)]) for x in longer])
        assert all(value < 3 or is_clean(text) for value, text in zip(found, longer, strict=True))


# ------------------------------------------------------------------------------------------------------------- speed


def test_it_is_fast(pairs):
    """At least 10,000 answers a second that it has not seen: here with a wide margin for a busy machine."""
    rng = random.Random(1)
    answered = []
    for one in pairs:
        words = one.chosen[0]["content"].split()
        words.insert(rng.randrange(len(words)), f"word{len(answered)}")
        answered.append((one.comparison.prompt_conversation, [assistant(" ".join(words))]))
    start = time.process_time()
    found = gold().scores(answered)
    assert time.process_time() - start < 5 * len(answered) / 10_000
    assert (found < 3).all()


def test_it_is_imported_without_jax_or_the_grammar():
    code = (
        "import sys; from dpo_jax.preference.gold import gold; gold(); "
        "assert not {'jax', 'transformers', 'sentencepiece', 'dpo_jax.data.synthetic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
