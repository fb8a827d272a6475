"""Generates a small world of people, things and places, and any amount of text about it.

In every document four people get newly drawn second names and own three things. Each mention of a person is the full
name and each mention of a thing names its owner, so that many words of a text can only be known by looking back:

    Tom Hill went to the barn. The lamp of Mia Reed is in the garden. Mia Reed saw Tom Hill. The lamp of Mia Reed is ...

Words with the same role are drawn uniformly, so that no answer is more likely than another before the document is read.
A document depends only on the split and its number.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

SEPARATOR = "<|endoftext|>"
SPLITS = ("pretrain", "train", "validation", "tasks")

FIRST_NAMES = (
    *("Tom", "Mia", "Ben", "Anna", "Leo", "Ruth", "Max", "Ivy", "Sam", "Nora", "Jack", "Lily", "Hugo", "Emma", "Carl"),
    *("Rose", "Finn", "Clara", "Otto", "June", "Paul", "Vera", "Luke", "Alice"),
)
SECOND_NAMES = (
    *("Hill", "Reed", "Stone", "Wood", "Lake", "Field", "Moss", "Frost", "Brook", "Marsh", "Vale", "Glen", "Ford"),
    *("Shore", "Cliff", "Dale", "Grove", "Heath", "Holt", "Lane", "Mill", "North", "Park", "Pool"),
)
THINGS = ("lamp", "ball", "kite", "basket", "mirror", "spoon", "letter", "pot", "candle", "clock", "apple", "book")
PLACES = ("garden", "library", "hall", "school", "barn", "market", "attic", "cellar", "stable", "kitchen")
QUALITIES = ("new", "old", "clean", "small", "heavy", "broken")
LINKS = {False: "is", True: "are"}

N_PEOPLE, N_THINGS = 4, 3


@dataclass
class Scene:
    """Holds the people and things of one document, and its sentences so far.

    Attributes:
        rng: Random generator of the document.
        second_name: Second name of each person, by first name.
        owner: First name of each thing's owner.
        place: Place of each thing.
        sentences: The sentences so far.
    """

    rng: random.Random
    second_name: dict[str, str]
    owner: dict[str, str]
    place: dict[str, str]
    sentences: list[str] = field(default_factory=list)

    @classmethod
    def draw(cls, rng: random.Random) -> Scene:
        people, things = rng.sample(FIRST_NAMES, N_PEOPLE), rng.sample(THINGS, N_THINGS)
        return cls(
            rng,
            dict(zip(people, rng.sample(SECOND_NAMES, N_PEOPLE), strict=True)),
            dict(zip(things, rng.sample(people, N_THINGS), strict=True)),
            dict(zip(things, rng.sample(PLACES, N_THINGS), strict=True)),
        )

    def write(self, n_sentences: int) -> Scene:
        """Adds sentences of all kinds."""
        kinds = (self._went, self._saw, self._lies, self._lies, self._took, self._agrees)
        for _ in range(n_sentences):
            self.sentences.append(self.rng.choice(kinds)())
        return self

    def text(self) -> str:
        return " ".join(self.sentences)

    def person(self, first_name: str) -> str:
        return f"{first_name} {self.second_name[first_name]}"

    def thing(self, name: str) -> str:
        return f"the {name} of {self.person(self.owner[name])}"

    def agreement(self) -> tuple[str, bool]:
        """Returns a sentence up to its verb, and whether its subject is plural; the other noun may be either."""
        subject, other = self.rng.sample(THINGS, 2)
        plural, other_plural = self.rng.random() < 0.5, self.rng.random() < 0.5
        return f"The {subject}{'s' * plural} near the {other}{'s' * other_plural}", plural

    def _went(self) -> str:
        return f"{self.person(self._someone())} went to the {self.rng.choice(PLACES)}."

    def _saw(self) -> str:
        one, other = self.rng.sample(sorted(self.second_name), 2)
        return f"{self.person(one)} saw {self.person(other)}."

    def _lies(self) -> str:
        name = self._something()
        return f"T{self.thing(name)[1:]} is in the {self.place[name]}."

    def _took(self) -> str:
        name = self._something()
        self.place[name] = self.rng.choice(PLACES)
        return f"{self.person(self._someone())} took {self.thing(name)} to the {self.place[name]}."

    def _agrees(self) -> str:
        start, plural = self.agreement()
        return f"{start} {LINKS[plural]} {self.rng.choice(QUALITIES)}."

    def _someone(self) -> str:
        return self.rng.choice(sorted(self.second_name))

    def _something(self) -> str:
        return self.rng.choice(sorted(self.owner))


def scene(split: str, index: int) -> Scene:
    """Returns the people and things of a document, before its first sentence.

    Raises:
        ValueError: The split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"split: unknown value '{split}'; use one of {', '.join(SPLITS)}")
    return Scene.draw(random.Random(f"{split}/{index}"))


def document(split: str, index: int) -> str:
    """Returns one document of 8 to 14 sentences."""
    drawn = scene(split, index)
    return drawn.write(drawn.rng.randint(8, 14)).text()


def documents(split: str, start: int = 0) -> Iterator[str]:
    """Returns the documents of a split from number `start` on, without end."""
    return (document(split, index) for index in count(start))


def corpus(split: str, n_bytes: int) -> str:
    """Returns whole documents, separated by lines `<|endoftext|>`, until there are at least `n_bytes`."""
    texts: list[str] = []
    size = 0
    for text in documents(split):
        texts.append(text)
        size += len(text.encode()) + len(SEPARATOR) + 2
        if size >= n_bytes + len(SEPARATOR):
            return f"\n{SEPARATOR}\n".join(texts) + "\n"
    raise AssertionError("unreachable")
