"""Makes tasks about the small world, as JSON lines and lm-eval task files: multiple choice, and one with generation.

In `smallworld_recall` the context also holds every wrong choice, and the right one is equally often the first, second,
third and fourth of the choices counted from the end of the context. In `smallworld_holder` it holds only the right one.
Without attention a model is left with chance: 1/4 for these two, 1/2 for `smallworld_agreement`, and about 0 for
`smallworld_naming`, where the model itself writes the owner's second name and the way to the place.
"""

from __future__ import annotations

import json
import random
from itertools import count
from typing import Any

from .world import FIRST_NAMES, LINKS, Scene, scene

N_ITEMS = 300
N_CHOICES = 4
MIN_DISTANCE_TOKENS = 16
TASKS = {
    "smallworld_holder": "whose thing it is, against people that the text does not know",
    "smallworld_recall": "a person's second name at a distance",
    "smallworld_agreement": "number of the verb across a distractor",
}
GENERATION_TASKS = {"smallworld_naming": "writing on from the first name of a thing's owner"}
_FIRST_INDEX = {name: number * 1_000_000 for number, name in enumerate({**TASKS, **GENERATION_TASKS})}

_CHOOSES = """\
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: gold
"""
_WRITES = """\
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: answer
generation_kwargs:
  until: ["."]
  max_gen_toks: 6
  do_sample: false
filter_list:
  - name: sentence
    filter:
      - function: regex
        regex_pattern: "^ *(.* in the)"
      - function: take_first
"""

Item = dict[str, Any]


def items(task: str, n_items: int = N_ITEMS) -> list[Item]:
    """Returns the items of a task, the same ones on every call.

    Each has `context`, `choices` (with their leading space), `gold` (index of the right one) and `distance_tokens`:
    words and punctuation marks between the last evidence and the answer, each of which is one token of the model's
    tokenizer. Items of generation tasks have `answer` instead of choices.
    """
    make = {
        "smallworld_holder": _holder,
        "smallworld_recall": _recall,
        "smallworld_agreement": _agreement,
        "smallworld_naming": _naming,
    }[task]
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
    """Returns the lm-eval task file; its data path is relative to the file's own folder."""
    kind, metric = (_WRITES, "exact_match") if task in GENERATION_TASKS else (_CHOOSES, "acc")
    return (
        f"# LayerBoost small world: {(TASKS | GENERATION_TASKS)[task]}.\n"
        f"task: {task}\n"
        "dataset_path: json\n"
        "dataset_kwargs:\n"
        "  data_files:\n"
        f"    test: {task}.jsonl\n"
        "test_split: test\n"
        f"{kind}"
        'target_delimiter: ""\n'
        "num_fewshot: 0\n"
        "metric_list:\n"
        f"  - metric: {metric}\n"
        "    aggregation: mean\n"
        "    higher_is_better: true\n"
        "metadata:\n"
        "  version: 1.0\n"
    )


def task_jsonl(task: str) -> str:
    """Returns the items of a task as JSON lines."""
    return "".join(json.dumps(item) + "\n" for item in items(task))


def tokens(text: str) -> list[str]:
    """Splits a text into words and punctuation marks."""
    return text.replace(".", " .").split()


def _holder(drawn: Scene, number: int) -> Item | None:
    """Asks for a thing's owner, against people that do not occur in the text."""
    name = drawn.rng.choice(sorted(drawn.owner))
    text, owner, prompt = drawn.text(), drawn.owner[name], f"The {name} of"
    evidence = f"{name} of {owner}"
    if evidence not in text:
        return None
    wrong = drawn.rng.sample([person for person in FIRST_NAMES if person not in drawn.second_name], N_CHOICES - 1)
    distance = _distance(text, evidence, prompt)
    return _item(f"{text} {prompt}", owner, wrong, number % N_CHOICES, distance, drawn.rng)


def _recall(drawn: Scene, number: int) -> Item | None:
    """Asks for a person's second name, against those of others; None if the document does not fit the item's number."""
    first = drawn.rng.choice(sorted(drawn.second_name))
    text, right, evidence = drawn.text(), drawn.second_name[first], drawn.person(first)
    mentioned = [word for word in dict.fromkeys(reversed(tokens(text))) if word in drawn.second_name.values()]
    if len(mentioned) < N_CHOICES or mentioned.index(right) != number % N_CHOICES:
        return None
    distance = _distance(text, evidence, first)
    if distance < MIN_DISTANCE_TOKENS:
        return None
    wrong = sorted(word for word in mentioned if word != right)
    return _item(f"{text} {first}", right, wrong, (number // N_CHOICES) % N_CHOICES, distance, drawn.rng)


def _naming(drawn: Scene, number: int) -> Item | None:
    """Asks for the owner's second name and the following words, after the thing and the owner's first name."""
    name = drawn.rng.choice(sorted(drawn.owner))
    text, owner, prompt = drawn.text(), drawn.owner[name], f"The {name} of {drawn.owner[name]}"
    evidence = drawn.person(owner)
    if evidence not in text or (distance := _distance(text, evidence, prompt)) < MIN_DISTANCE_TOKENS:
        return None
    answer = f"{drawn.second_name[owner]} is in the"
    return {"context": f"{text} {prompt}", "answer": answer, "distance_tokens": distance}


def _distance(text: str, evidence: str, prompt: str) -> int:
    """Returns the number of tokens from the last evidence in a text to the answer after the prompt."""
    return len(tokens(text[text.rindex(evidence) + len(evidence) :])) + len(tokens(prompt))


def _agreement(drawn: Scene, number: int) -> Item | None:
    """Asks for the verb's number; subject and distractor vary independently, so that the last noun gives no hint."""
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
