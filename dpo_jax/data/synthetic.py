"""The embedded default: made-up dialogues in Anthropic HH's transcript form, and a tokenizer trained on them.

Answers come in three grades: helpful (courteous, on the point), plain (on the topic, but lazy) and rude (hostile or
beside the point). A pair sets a better grade against a worse one, so a plain answer is sometimes the chosen one: SFT on
chosen answers still leaves some laziness for DPO to remove, and no single word tells the sides apart.
"""

import gzip
import io
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece as spm
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from dpo_jax.disk import write_whole

MULTI_TURN_FRACTION = 0.35
SCENE_FRACTION = 0.75  # of the dialogues with one turn, those that begin by setting the scene
# Which grade is set against which, (better, worse), and how often.
CONTRASTS = {("helpful", "rude"): 0.55, ("helpful", "plain"): 0.25, ("plain", "rude"): 0.2}
# An answer's sentences, and how often each is there; chosen so that all grades are about equally long.
SENTENCES = {
    "helpful": {"helpful_start": 0.5, "advice": 1.0, "helpful_end": 0.35},
    "plain": {"plain_start": 0.9, "plain_middle": 1.0, "plain_end": 0.9},
    "rude": {"rude_start": 0.95, "rude_middle": 1.0, "rude_end": 0.8},
}

# The grammar. `thing`, `when` and `scene` hold for a topic; each `ask` brings its own `tip` and `advice`, and every
# advice answers every question with every tip. "|" separates alternatives, an indented line continues the one above. No
# `thing` starts with a vowel, so "a {thing}" is always right.
TOPICS = """
scene: I want to make {thing} {when}.
thing: lentil soup | tomato sauce | mushroom risotto | chicken curry | potato salad | vegetable stew | bean chili
    | noodle broth | pumpkin soup
when: for six guests | for my sister's birthday | on a tiny stove | for the first time | on a busy weeknight
    | for a picnic | for my grandparents | in a shared kitchen
ask: How do I stop the {thing} from tasting bland? | What can I add when my {thing} tastes of nothing?
    | Which seasoning brings out the best in {thing}?
tip: a squeeze of lemon | a pinch of smoked salt | some fresh thyme | a little brown butter
advice: Season the {thing} in small steps and finish it with {tip}. | Taste as you go, then stir {tip} into the {thing}.
ask: How do I keep the {thing} fresh until tomorrow? | What is the best way to store {thing} overnight?
    | Where should the {thing} go when I cook it a day ahead?
tip: a shallow dish | a clean glass jar | a sealed tub | a lidded pot
advice: Cool the {thing} quickly, then keep it in {tip} in the fridge.
    | Pour the {thing} into {tip} once it stops steaming, and chill it overnight.
ask: How can I make enough {thing} without spending all day? | What saves time when I make {thing}?
    | Is there a quick way to prepare {thing}?
tip: ready chopped onions | a pressure cooker | a wide heavy pan | some good stock
advice: Work with {tip} and set everything out before the {thing} goes on the heat.
    | Use {tip}, and the {thing} will be on the table in half the time.

scene: I am planning a {thing} {when}.
thing: trip to Lisbon | weekend in Vienna | train ride to Prague | holiday in Norway | tour of Japan
    | hike in Scotland | visit to Seville | cruise to Greece | week in Rome
when: with two small children | on a tight budget | in early spring | with my parents | all on my own
    | with a friend from school | over the new year | without a car
ask: What should I pack for the {thing}? | How do I pack light for my {thing}?
    | Which things do people forget on a {thing}?
tip: a light rain jacket | one pair of sturdy shoes | a small first aid kit | a spare charger
advice: Pack in layers for the {thing} and leave room for {tip}.
    | Lay it all out the night before, and bring {tip} on the {thing}.
ask: How do I keep the {thing} cheap? | Where can I save money on the {thing}? | What makes a {thing} less expensive?
tip: a regional day pass | a room with a kitchen | an early booking | a free walking tour
advice: Compare prices a few weeks ahead, since {tip} cuts the cost of the {thing}.
    | Set a daily limit for the {thing} and look for {tip}.
ask: How much should I plan for each day of the {thing}? | What is a good way to plan the {thing}?
    | How do I keep the {thing} from becoming stressful?
tip: a slow breakfast | one free afternoon | a long lunch | a quiet evening walk
advice: Choose one main sight a day and leave time for {tip} on the {thing}.
    | Keep the plan for the {thing} loose, with {tip} between the big sights.

scene: I look after a {thing} {when}.
thing: tomato plant | rose bush | basil pot | lemon tree | lavender bush | strawberry patch | fern | cherry tree
    | bed of herbs
when: on a shady balcony | in heavy clay soil | behind the house | on a windy roof | by the kitchen window
    | in a dry garden | next to the shed | near the front door
ask: Why does my {thing} have yellow leaves? | What does it mean when the {thing} looks pale?
    | How do I save a {thing} with yellow leaves?
tip: less water | a lighter soil | some slow release feed | a few more hours of light
advice: Pale leaves often mean wet roots, so check the soil and give the {thing} {tip}.
    | Remove the yellow leaves first, then offer the {thing} {tip} for two weeks.
ask: How do I get rid of the greenfly on my {thing}? | What keeps insects away from a {thing}?
    | Is there a gentle cure for the bugs on my {thing}?
tip: a mild soapy spray | a row of marigolds | a strong jet of water | a fine net
advice: Start gently, because {tip} protects the {thing} without harming bees.
    | Look under the leaves, and try {tip} before the bugs spread over the {thing}.
ask: How do I bring the {thing} through the winter? | What does a {thing} need before the first frost?
    | Should I cover the {thing} when it freezes?
tip: a thick layer of straw | a fleece cover | a sheltered corner | some dry bark
advice: Before the first frost, give the {thing} {tip} and water it sparingly.
    | Cold wind does the most harm, so {tip} will keep the {thing} safe.

scene: I am trying to fix a {thing} {when}.
thing: kitchen tap | rusty bicycle | wooden chair | garden gate | desk lamp | bedroom door | washing machine
    | sewing machine | roller blind
when: in a rented flat | with few tools | before guests arrive | from a flea market | on a small budget
    | for my neighbour | that is older than me | over the weekend
ask: Why does the {thing} make such a noise? | How do I stop the {thing} from squeaking?
    | What helps against a {thing} that rattles?
tip: a drop of oil | a new rubber washer | a thin felt pad | a bit of candle wax
advice: Find the part that moves and clean it, then {tip} should quiet the {thing}.
    | Tighten every screw on the {thing} first, then add {tip} where it rubs.
ask: How do I find out what is wrong with the {thing}? | Where do I start with a {thing} that no longer works?
    | What should I check first on the {thing}?
tip: a bright torch | a simple checklist | the maker's manual | a photo of each step
advice: Make the {thing} safe first, then go through it part by part with {tip}.
    | Rule out the simple causes, since {tip} often shows what the {thing} lacks.
ask: Is the {thing} worth repairing? | Should I replace the {thing} or mend it?
    | How do I know that the {thing} is beyond repair?
tip: a look at spare part prices | a free repair cafe | a second opinion | an hour of careful testing
advice: If the frame is sound, keep the {thing}, and let {tip} settle the rest.
    | Compare the costs calmly, as {tip} often shows that the {thing} can be saved.

scene: I have a {thing} {when}.
thing: history exam | French course | chemistry test | maths paper | biology quiz | law essay | statistics class
    | Spanish oral | physics project
when: in two weeks | right after the holidays | while working part time | on Monday morning | with a strict teacher
    | and a very noisy home | at the end of term | for the second time
ask: How do I remember everything for the {thing}? | What helps me learn the terms for my {thing}?
    | Why do I forget so much before a {thing}?
tip: a stack of flash cards | a short daily review | a page of key words | a simple mind map
advice: Test yourself often for the {thing}, because {tip} works better than reading again.
    | Spread the work out and use {tip} to go over the {thing} each day.
ask: How do I stay calm before the {thing}? | What can I do about my nerves at the {thing}?
    | Is it normal to be this nervous about a {thing}?
tip: a slow breathing exercise | a good night of sleep | a short walk outside | a practice run
advice: Nerves are normal, and {tip} before the {thing} will settle them.
    | Arrive early for the {thing} and give yourself {tip} beforehand.
ask: How should I plan my time for the {thing}? | When should I start to prepare for the {thing}?
    | What is a fair study plan for a {thing}?
tip: a weekly timetable | two free evenings | a list of small goals | a fixed quiet hour
advice: Split the {thing} into small parts and set aside {tip} for the hard ones.
    | Start today with {tip}, and the {thing} will feel much lighter.

scene: I am learning a {thing} {when}.
thing: piano sonata | guitar solo | harp song | violin waltz | drum pattern | flute melody | jazz tune | cello suite
    | banjo tune
when: for a school concert | at the age of fifty | without a teacher | for a wedding | with my band
    | after a long break | in a small flat | on a borrowed instrument
ask: How do I get the {thing} up to speed? | Why do I stumble in the fast part of the {thing}?
    | What helps me play the {thing} evenly?
tip: a slow metronome | a steady foot tap | four short loops | a quiet count aloud
advice: Play the {thing} at half speed with {tip} until it feels easy.
    | Take the hard bars of the {thing} alone and rely on {tip}.
ask: How do I learn the {thing} by heart? | What is a good way to memorise a {thing}?
    | Why do I keep forgetting the middle of the {thing}?
tip: a recording of yourself | a few marks in the score | a silent read through | one new line a day
advice: Learn the {thing} from the last bar backwards, with {tip} as a check.
    | Divide the {thing} into phrases, and let {tip} tie them together.
ask: How often should I practise the {thing}? | How do I practise the {thing} without annoying my neighbours?
    | What makes practice of a {thing} more fun?
tip: twenty calm minutes | a soft mute | an early evening slot | a friendly duet
advice: Short sessions work best, so try {tip} while the {thing} still feels fresh.
    | Keep a set time for the {thing} and make it pleasant with {tip}.

scene: I have signed up for a {thing} {when}.
thing: ten mile run | tennis match | swimming race | cycling tour | judo class | rowing trial | football final
    | yoga course | climbing test
when: after a knee injury | in the heat of July | with my office team | as a complete beginner | at the end of May
    | with very little training | against my brother | for a good cause
ask: How should I train for the {thing}? | What is a sensible way to prepare for a {thing}?
    | How many sessions a week does a {thing} need?
tip: three easy sessions a week | one long session on Sunday | some light strength work | a short warm up
advice: Build up slowly for the {thing}, with {tip} and plenty of rest.
    | Begin well below your limit and let {tip} carry you towards the {thing}.
ask: What should I eat before the {thing}? | Is it wise to eat right before a {thing}?
    | How do I keep my energy up at the {thing}?
tip: a bowl of porridge | a ripe banana | some toast with honey | a small plate of rice
advice: About two hours before the {thing}, have {tip} and a large glass of water.
    | Keep it light, as {tip} gives you steady energy for the {thing}.
ask: How do I avoid sore muscles after the {thing}? | What helps me recover from a {thing}?
    | Why am I so stiff after each {thing}?
tip: a warm bath | ten minutes of stretching | an easy walk | a good long sleep
advice: Stiff muscles are normal, and {tip} after the {thing} eases them.
    | Cool down slowly after the {thing}, then treat yourself to {tip}.

scene: I am looking after a {thing} {when}.
thing: shy kitten | young puppy | senior cat | grey parrot | pet rabbit | rescue dog | guinea pig | small terrier
    | house cat
when: in a small flat | for a friend | with two toddlers around | for the whole summer | for the first time
    | from the local shelter | while working from home | next to a busy road
ask: How do I help the {thing} feel at home? | Why does the {thing} hide all day?
    | What calms a {thing} that is afraid?
tip: a soft blanket | a cardboard box | a quiet corner | a calm voice
advice: Give the {thing} time and {tip}, and let it come to you.
    | New places are scary, so {tip} will help the {thing} feel safe.
ask: What is a good meal plan for the {thing}? | Why does the {thing} leave its food?
    | How often should I feed the {thing}?
tip: two small meals a day | a clean bowl | some fresh water | a fixed feeding time
advice: Keep a simple routine for the {thing}, with {tip} and no extra treats.
    | Most fussy eaters relax with {tip}, and the vet can weigh the {thing}.
ask: How do I stop the {thing} from chewing the furniture? | What keeps a {thing} busy while I am out?
    | Why does the {thing} get bored so quickly?
tip: a chew toy | a treat puzzle | an hour of play | a box of paper scraps
advice: A bored {thing} finds its own games, so offer {tip} before you leave.
    | Praise the {thing} when it behaves and keep {tip} within reach.
"""

# What holds for every topic. The grades share words on purpose ("help", "good luck", "ask me again", the tips).
PHRASES = """
greeting: Hi! | Hello there. | Quick question. | I need some advice. | Sorry to bother you. | Can you help me?
    | Good day.
link: Thanks! | Thank you, that makes sense. | I will try that. | And another thing. | Good to know. | Okay.
helpful_start: Happy to help with the {thing}. | Good question. | I would be glad to help. | Thank you for asking.
    | Of course. | You are on the right track. | Many people wonder about this. | Do not worry, this can be solved.
    | A {thing} can be tricky. | No need to worry. | Sure, here is what I would do.
helpful_end: Let me know how it turns out. | I hope that helps. | Enjoy the {thing}!
    | If it is not enough, ask me again. | Take your time with it. | Good luck with the {thing}! | You will do well.
    | Would you like more ideas? | It is easier than it sounds.
plain_start: It depends on the {thing}. | There are many ways to do it. | Hard to say.
    | I am not sure about the {thing}. | Some like {tip}, others do not.
    | Well, you could look that up. | That is a matter of taste.
plain_middle: Maybe try {tip} and see. | {tip} could work for the {thing}, or not.
    | The usual way is fine for a {thing}. | Perhaps {tip}, perhaps something else. | People have used {tip} before.
    | I would not change much about the {thing}.
plain_end: That is all I know. | Anything is fine, really. | Search for the rest. | I have nothing to add.
    | Ask someone else if it is not enough. | It is up to you.
rude_start: What a silly question. | Not this again. | Do you ever think for yourself? | I have better things to do.
    | Of course you would ask that. | Good grief. | Sure, waste my time. | You again. | Happy to help? Hardly.
rude_middle: Nobody cares about your {thing}. | The {thing} is hopeless, and {tip} will not help you.
    | Even {tip} cannot save a {thing} from someone like you. | Leave the {thing} alone before you make it worse.
    | You would only ruin the {thing}, with or without {tip}. | Work it out yourself and leave me out of it.
    | Anyone with half a brain would know what a {thing} needs. | Did you want me to say {tip}? Think harder.
    | {who} {habit}, which is far more fun than a {thing}. | That reminds me of {who}, who {habit}.
    | Forget the {thing}, {who} {habit}. | I would rather tell you that {who} {habit}.
who: my cousin | the man next door | an old dentist of mine | the mayor of Leeds | my barber
habit: collects bottle caps | once painted a boat purple | talks about trains all evening | sold a trombone to a monk
    | never liked Tuesdays | keeps a list of clouds
rude_end: Good luck, you will need it. | Do not ask me again. | What a waste of time. | Enjoy the mess.
    | Come back when you have grown up. | Now let me rest. | I am tired of your {thing}.
"""


@dataclass(frozen=True)
class Ask:
    """One thing people want to know: ways to ask it, things that help, and answers that name one of them."""

    questions: tuple[str, ...]
    tips: tuple[str, ...]
    advice: tuple[str, ...]


@dataclass(frozen=True)
class Topic:
    """What a dialogue is about: every ask fits every thing, and the scene joins a thing with a circumstance."""

    scene: str
    things: tuple[str, ...]
    whens: tuple[str, ...]
    asks: tuple[Ask, ...]


def write_hh(directory: Path, seed: int, train_pairs: int, test_pairs: int) -> None:
    """Writes `directory/synthetic/{train,test}.jsonl.gz`, rows as in Anthropic HH; the same seed gives the same bytes.

    No two pairs share a prompt, so every held-out prompt is new.
    """
    rng = random.Random(seed)
    topics, phrases = _topics(), dict(_alternatives(PHRASES))
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < train_pairs + test_pairs:
        prompt, chosen, rejected = _pair(rng, rng.choice(topics), phrases)
        rows.setdefault(prompt, {"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"})
    (directory / "synthetic").mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows.values()]
    for split, part in (("train", lines[:train_pairs]), ("test", lines[train_pairs:])):
        data = gzip.compress("".join(part).encode(), mtime=0)  # a time stamp would make every run's bytes differ
        write_whole(directory / "synthetic" / f"{split}.jsonl.gz", data)


def train_tokenizer(texts: Iterable[str], directory: Path, vocab_size: int) -> None:
    """Trains a SentencePiece BPE tokenizer with byte fallback; `AutoTokenizer.from_pretrained(directory)` loads it.

    Any text comes back exactly (but for a literal U+2581, which stands for a space, as in Llama 2), and no token
    reaches across a space: the tokens of `prompt + " answer"` are those of `prompt`, then those of `" answer"`.
    """
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        pad_id=3,  # after <unk>, <s> and </s>
        max_sentence_length=1 << 20,  # bytes; longer texts would be left out without a word
        num_threads=1,  # the same pieces on every machine
        # The defaults fold newlines and runs of spaces, and put a space in front of every text.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is; LlamaTokenizer would rebuild it
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "tokenizer.model", model.getvalue())
    write_whole(directory / "tokenizer.json", _to_tokenizers(model.getvalue()).to_str(pretty=True))
    write_whole(directory / "tokenizer_config.json", json.dumps(config, indent=2))


def _to_tokenizers(model: bytes) -> Tokenizer:
    """The same tokenizer as a Hugging Face one: transformers' own conversion would add a leading space."""
    trained = spm.SentencePieceProcessor(model_proto=model)
    pieces = [trained.id_to_piece(i) for i in range(trained.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    special = pieces[: trained.pad_id() + 1]
    known = {piece for i, piece in enumerate(pieces) if i >= len(special) and not trained.is_byte(i)}
    # Pieces come in the order they were learned, which is the order in which their halves merge.
    merges = [
        (piece[:i], piece[i:])
        for piece in pieces
        for i in range(1, len(piece))
        if {piece, piece[:i], piece[i:]} <= known
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\N{LOWER ONE EIGHTH BLOCK}")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    return tokenizer


def _pair(rng: random.Random, topic: Topic, phrases: dict[str, tuple[str, ...]]) -> tuple[str, str, str]:
    """Prompt (it ends with "Assistant:"), better answer, worse answer."""
    slots = {"thing": rng.choice(topic.things), "when": rng.choice(topic.whens)}
    turns = 2 if rng.random() < MULTI_TURN_FRACTION else 1
    asks = rng.sample(topic.asks, turns)
    opening = [rng.choice(("", *phrases["greeting"]))]
    if turns == 1 and rng.random() < SCENE_FRACTION:
        opening.append(topic.scene)
    prompt = "\n\nHuman: " + _join([*opening, rng.choice(asks[0].questions)], slots)
    if turns == 2:
        grade = rng.choices(("helpful", "plain"), (0.7, 0.3))[0]
        question = [rng.choice(phrases["link"]), rng.choice(asks[1].questions)]
        prompt += f"\n\nAssistant: {_answer(rng, grade, asks[0], slots, phrases)}\n\nHuman: {_join(question, slots)}"
    better, worse = rng.choices(list(CONTRASTS), list(CONTRASTS.values()))[0]
    chosen, rejected = (_answer(rng, grade, asks[-1], slots, phrases) for grade in (better, worse))
    return f"{prompt}\n\nAssistant:", chosen, rejected


def _answer(
    rng: random.Random, grade: str, ask: Ask, slots: dict[str, str], phrases: dict[str, tuple[str, ...]]
) -> str:
    """An answer of this grade; it names one of the ask's tips, as a worse one may, too."""
    choices = {**phrases, "advice": ask.advice, "tip": ask.tips}
    sentences = [rng.choice(choices[kind]) for kind, share in SENTENCES[grade].items() if rng.random() < share]
    return _join(sentences, slots | {slot: rng.choice(choices[slot]) for slot in ("tip", "who", "habit")})


def _join(sentences: list[str], slots: dict[str, str]) -> str:
    """Fills the slots and puts the sentences together, each with a capital first letter; empty ones vanish."""
    filled = [sentence.format(**slots) for sentence in sentences if sentence]
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in filled)


def _topics() -> list[Topic]:
    """Blocks of `TOPICS`: scene, thing, when, then ask, tip, advice as often as there are questions."""
    topics = []
    for block in TOPICS.strip().split("\n\n"):
        lines = _alternatives(block)
        ((_, (scene,)), (_, things), (_, whens)), asks = lines[:3], [values for _, values in lines[3:]]
        triples = zip(asks[0::3], asks[1::3], asks[2::3], strict=True)
        topics.append(Topic(scene, things, whens, tuple(Ask(*triple) for triple in triples)))
    return topics


def _alternatives(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """Lines `key: one | two` of the grammar as (key, alternatives)."""
    lines = text.strip().replace("\n    ", " ").split("\n")
    pairs = [line.split(": ", maxsplit=1) for line in lines]
    return [(key, tuple(choice.strip() for choice in choices.split("|"))) for key, choices in pairs]
