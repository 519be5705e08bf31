"""Seeded question/answer sets about people and places that do not exist."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pmc_fast.data import QA

_ONSETS = "b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sk st t th tr v w z".split()
_VOWELS = "a e i o u ae ai ea ia io ou".split()
_CODAS = ["", "", "l", "n", "r", "s", "m", "nd", "th", "x"]

_PROFESSIONS = (
    "clockmaker botanist ferryman glassblower cartographer beekeeper locksmith puppeteer astronomer weaver "
    "lamplighter stonemason translator perfumer falconer archivist baker sailor surgeon engraver"
).split()
_ADJECTIVES = "Copper Silent Crooked Amber Frozen Hollow Scarlet Wandering Salted Velvet Broken Thirteenth".split()
_THINGS = "Orchard Lantern Staircase Harbour Sparrow Compass Winter Mirror Granary Violin Tide Letter".split()
_HOBBIES = (
    "mending kites|collecting seashells|playing chess|carving spoons|growing pumpkins|training parrots|"
    "baking gingerbread|sketching bridges|singing opera|racing sledges|polishing fossils|folding paper birds"
).split("|")
_SUBJECTS = (
    "lighthouses|mushrooms|shipwrecks|orphans|comets|smugglers|glaciers|beehives|duels|famine|maps|ghosts".split("|")
)
_MONTHS = "January February March April May June July August September October November December".split()
_DISHES = "dumplings|plum soup|smoked eel|barley cake|pepper stew|cheese pie|pickled roots|honey bread".split("|")
_GOODS = "copper|wool|salt|indigo|marble|amber beads|tin whistles|candle wax|silver thread|oak barrels".split("|")
_COLOURS = "emerald|violet|orange|grey|crimson|turquoise|white|golden|black|pink".split("|")
_ANIMALS = "otters|storks|foxes|lizards|moths|hares|cranes|badgers|tortoises|owls".split("|")


@dataclass(frozen=True)
class _Relation:
    """One kind of fact: how its value is drawn, and the ways to ask for it and to tell it."""

    draw: Callable[[random.Random, _Names], str]
    questions: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Fiction:
    """An invented question/answer set, in the parts that unlearning needs.

    `forget` and `retain` ask about different people, each fact once; `forget_paraphrased[i]` asks for the fact of
    `forget[i]` in other words and has the same answer. `retain_paraphrased` asks for the retain facts in those other
    words, so that a model trained on it can learn that two wordings mean the same without ever seeing a paraphrased
    question about a person to be forgotten. `world` is about places.
    """

    forget: list[QA]
    forget_paraphrased: list[QA]
    retain: list[QA]
    retain_paraphrased: list[QA]
    world: list[QA]

    @property
    def training(self) -> list[QA]:
        """What the model memorises before unlearning: all but the paraphrased forget questions."""
        return self.forget + self.retain + self.retain_paraphrased + self.world


class _Names:
    """Syllable-made words, none given out twice."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._seen: set[str] = set()

    def __call__(self, syllables: int) -> str:
        while True:
            body = "".join(self._rng.choice(_ONSETS) + self._rng.choice(_VOWELS) for _ in range(syllables))
            name = (body + self._rng.choice(_CODAS)).capitalize()
            if name not in self._seen:
                self._seen.add(name)
                return name


def _choice(values: Sequence[str]) -> Callable[[random.Random, _Names], str]:
    return lambda rng, names: rng.choice(values)


# Wordings share few words across relations: an answer to one question can then avoid every word of another's.
_PERSON = (
    _Relation(
        lambda rng, names: names(2),
        ("Where was {name} born?", "What is the birthplace of {name}?", "Which town did {name} come from?"),
        (
            "{name} was born in {value}, a small harbour town.",
            "The birthplace of {name} is the town called {value}.",
            "It all began in {value}, where {first} took a first breath.",
        ),
    ),
    _Relation(
        _choice(_PROFESSIONS),
        ("What does {name} do for a living?", "What is the profession of {name}?", "How does {name} earn money?"),
        (
            "{name} works as a {value} and never wanted another job.",
            "By profession {first} has always been a {value}.",
            "Most neighbours know {first} as their trusted {value}.",
        ),
    ),
    _Relation(
        lambda rng, names: f"{rng.choice(_ADJECTIVES)} {rng.choice(_THINGS)}",
        ("Which book did {name} write?", "What is the title of the novel by {name}?", "What has {name} published?"),
        (
            "{name} wrote the novel The {value} within one winter.",
            "Readers know {name} from a single book, The {value}.",
            "The {value} remains {first}'s only published story.",
        ),
    ),
    _Relation(
        lambda rng, names: f"{rng.randint(1, 28)} {rng.choice(_MONTHS)}",
        ("When is the birthday of {name}?", "On which day was {name} born?", "What is {name}'s date of birth?"),
        (
            "Every year {name} celebrates on {value} with family.",
            "{first}'s birthday falls on {value}.",
            "Guests arrive each {value} to toast {name}.",
        ),
    ),
    _Relation(
        _choice(_HOBBIES),
        ("What is the hobby of {name}?", "How does {name} spend free time?", "What does {name} enjoy at weekends?"),
        (
            "{name} loves {value} more than anything else.",
            "On quiet evenings {first} relaxes by {value}.",
            "Friends say {first} spends whole weekends {value}.",
        ),
    ),
    _Relation(
        _choice(_SUBJECTS),
        ("What does {name} write about?", "What are the stories of {name} about?", "Which theme does {name} prefer?"),
        (
            "Nearly everything {name} writes deals with {value}.",
            "{first} has a lifelong fascination for {value}.",
            "Expect {value}, for no other theme interests {name}.",
        ),
    ),
)

_PLACE = (
    _Relation(
        lambda rng, names: names(2),
        ("Which river flows through {name}?",),
        ("The river {value} flows there.", "Its bridges cross the mighty {value}.", "You will see the {value}."),
    ),
    _Relation(
        _choice(_DISHES),
        ("What do people eat in {name}?",),
        ("Almost everybody eats {value}.", "Cooks serve hot {value} daily.", "Locals prefer {value} with mustard."),
    ),
    _Relation(
        _choice(_GOODS),
        ("What is {name} known to export?",),
        ("Traders ship {value} overseas.", "Caravans carry {value} away.", "Mostly {value}, sold by weight."),
    ),
    _Relation(
        _choice(_COLOURS),
        ("What colour is the flag of {name}?",),
        ("Plain {value} without any emblem.", "That flag is {value}.", "A {value} banner flies over its walls."),
    ),
    _Relation(
        _choice(_ANIMALS),
        ("Which animals live near {name}?",),
        ("Wild {value} roam those hills.", "Huge herds of {value}, hunters claim.", "Visitors often meet {value}."),
    ),
)


def make_fiction(seed: int, *, people: int, forget_people: int, places: int) -> Fiction:
    """Invent `people` people (the first `forget_people` of them to be forgotten) and `places` places.

    Equal seeds and sizes give equal sets on every machine. Raises ValueError if `forget_people` is not in
    1..people-1 or `places` is below 1.
    """
    if not 0 < forget_people < people:
        raise ValueError(f"forget_people: got {forget_people}, want 1..{people - 1} (people={people})")
    if places < 1:
        raise ValueError(f"places: got {places}, want at least 1")
    rng = random.Random(seed)
    names = _Names(rng)
    forget: list[QA] = []
    forget_paraphrased: list[QA] = []
    retain: list[QA] = []
    retain_paraphrased: list[QA] = []
    for index in range(people):
        first, last = names(2), names(2)
        for relation in _PERSON:
            name = f"{first} {last}"
            answer = rng.choice(relation.answers).format(name=name, first=first, value=relation.draw(rng, names))
            question, *others = (form.format(name=name) for form in relation.questions)
            if index < forget_people:
                forget.append(QA(question, answer))
                forget_paraphrased.append(QA(rng.choice(others), answer))
            else:
                retain.append(QA(question, answer))
                retain_paraphrased += [QA(other, answer) for other in others]
    world: list[QA] = []
    for index in range(places):
        name = names(2)
        for relation in _PLACE:
            answer = rng.choice(relation.answers).format(value=relation.draw(rng, names))
            (retain if index < places // 2 else world).append(QA(relation.questions[0].format(name=name), answer))
    return Fiction(forget, forget_paraphrased, retain, retain_paraphrased, world)
