"""Heals a plan of the embedded model by distillation from its parent, in this process, and judges it before and after.

python examples/heal.py SNLNLNLSNLNN 60000
"""

import sys

from layerboost import Plan, convert
from layerboost.checkpoint import load_model, load_tokenizer
from layerboost.evaluation.evaluate import evaluate
from layerboost.evaluation.scores import QualitySpec, retained
from layerboost.healing.spec import HealingSpec
from layerboost.healing.training import heal_locally
from layerboost.smallworld import MODEL, TRAIN_TEXT, VALIDATION_TEXT
from layerboost.text.batches import PackedText
from layerboost.text.documents import pack, read_documents


def main(letters: str, tokens: str) -> None:
    parent, tokenizer = load_model(MODEL), load_tokenizer(MODEL)
    plan = Plan.parse(letters, window=16)
    spec = HealingSpec(tokens=int(tokens), sequence_tokens=256, batch_sequences=4)
    text = PackedText(pack(read_documents(TRAIN_TEXT), tokenizer, spec.sequence_tokens))
    healed = heal_locally(parent, plan, text, spec)

    judge = QualitySpec(text=VALIDATION_TEXT, n_sequences=16, sequence_tokens=256)
    base = evaluate(parent, tokenizer, judge)
    for name, model in (("before", convert(parent, plan)), ("after", healed)):
        share, stderr = retained(base, evaluate(model, tokenizer, judge))
        print(f"{name} healing: {100 * share:.1f} ± {100 * stderr:.1f} % of the parent's likelihood")


if __name__ == "__main__":
    main(*sys.argv[1:])
