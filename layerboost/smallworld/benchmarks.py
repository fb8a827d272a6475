"""Multiple-choice tasks about the small world, as JSON lines and lm-eval task files.

In the two memory tasks every wrong choice is a word of the same role that the context holds too, and the right one is
equally often the first, second, third and fourth of the choices to be mentioned last. Without attention nothing but
chance is left: 1/4 for `smallworld_holder` and `smallworld_recall`, 1/2 for `smallworld_agreement`.
"""

from __future__ import annotations

import json
import random
from itertools import count
from typing import Any

from layerboost.smallworld.world import LINKS, Scene, scene

N_ITEMS = 300
N_CHOICES = 4
MIN_DISTANCE_TOKENS = 16
TASKS = {
    "smallworld_holder": "whose thing it is, told earlier",
    "smallworld_recall": "a person's second name at a distance",
    "smallworld_agreement": "number of the verb across a distractor",
}
_FIRST_INDEX = {name: number * 1_000_000 for number, name in enumerate(TASKS)}

Item = dict[str, Any]


def items(task: str, n_items: int = N_ITEMS) -> list[Item]:
    """The items of a task, the same ones on every call.

    Each has `context`, `choices` (with their leading space), `gold` (index of the right one) and `distance_tokens`:
    words and punctuation marks between the last evidence and the answer, each one token of the model's tokenizer.
    """
    make = {"smallworld_holder": _holder, "smallworld_recall": _recall, "smallworld_agreement": _agreement}[task]
    made: list[Item] = []
    for index in count(_FIRST_INDEX[task]):
        drawn = scene("tasks", index)
        drawn.write(drawn.rng.randint(8, 14))
        item = make(drawn, len(made))
        if item is not None:
            made.append(item)
        if len(made) == n_items:
            return made
    raise AssertionError("unreachable")


def task_yaml(task: str) -> str:
    """The lm-eval task file; its data path is relative to the file's own folder."""
    return (
        f"# LayerBoost small world: {TASKS[task]}.\n"
        f"task: {task}\n"
        "dataset_path: json\n"
        "dataset_kwargs:\n"
        "  data_files:\n"
        f"    test: {task}.jsonl\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{context}}"\n'
        "doc_to_choice: choices\n"
        "doc_to_target: gold\n"
        'target_delimiter: ""\n'
        "num_fewshot: 0\n"
        "metric_list:\n"
        "  - metric: acc\n"
        "    aggregation: mean\n"
        "    higher_is_better: true\n"
        "metadata:\n"
        "  version: 1.0\n"
    )


def task_jsonl(task: str) -> str:
    """The items of a task as JSON lines."""
    return "".join(json.dumps(item) + "\n" for item in items(task))


def tokens(text: str) -> list[str]:
    """Words and punctuation marks of a text."""
    return text.replace(".", " .").split()


def _holder(drawn: Scene, number: int) -> Item | None:
    name = drawn.rng.choice(sorted(drawn.owner))
    return _memory_item(drawn, f"The {name}", f"{name} {drawn.owner[name]}", drawn.owner[name], number)


def _recall(drawn: Scene, number: int) -> Item | None:
    first = drawn.rng.choice(sorted(drawn.second_name))
    return _memory_item(drawn, first, drawn.person(first), drawn.second_name[first], number)


def _memory_item(drawn: Scene, prompt: str, evidence: str, right: str, number: int) -> Item | None:
    """A question behind a document; None if the document does not fit the item's number."""
    text = drawn.text()
    candidates = sorted(drawn.second_name) if right in drawn.second_name else sorted(drawn.second_name.values())
    found = tokens(text)
    mentioned = [word for word in dict.fromkeys(reversed(found)) if word in candidates]
    if len(mentioned) < N_CHOICES or evidence not in text or mentioned.index(right) != number % N_CHOICES:
        return None
    distance = len(tokens(text[text.rindex(evidence) + len(evidence) :])) + len(tokens(prompt))
    if distance < MIN_DISTANCE_TOKENS:
        return None
    wrong = [word for word in candidates if word != right]
    return _item(f"{text} {prompt}", right, wrong, (number // N_CHOICES) % N_CHOICES, distance, drawn.rng)


def _agreement(drawn: Scene, number: int) -> Item | None:
    """Subject and distractor vary independently, so the last noun says nothing."""
    start, plural = drawn.agreement()
    if (plural, start.endswith("s")) != (bool(number & 1), bool(number & 2)):
        return None
    right, wrong = LINKS[plural], LINKS[not plural]
    return _item(f"{drawn.text()} {start}", right, [wrong], number >> 2 & 1, len(tokens(start)) - 2, drawn.rng)


def _item(context: str, right: str, wrong: list[str], gold: int, distance_tokens: int, rng: random.Random) -> Item:
    choices = list(wrong)
    rng.shuffle(choices)
    choices.insert(gold, right)
    return {
        "context": context,
        "choices": [f" {choice}" for choice in choices],
        "gold": gold,
        "distance_tokens": distance_tokens,
    }
