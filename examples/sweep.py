"""Measures on the embedded model how much each layer's attention matters, and makes a plan from the result.

python examples/sweep.py 32
"""

import sys

from layerboost import Plan, Treatment, plan_from_thresholds
from layerboost.checkpoint import load_model, load_tokenizer
from layerboost.evaluation.plan_evaluation import PlanEvaluation
from layerboost.evaluation.scores import QualitySpec
from layerboost.sensitivity.drops import DropRow, mean_drop, single_layer_plan
from layerboost.smallworld import MODEL, VALIDATION_TEXT


def sweep(n_sequences: int) -> list[DropRow]:
    """Returns for each layer the loss of a text's likelihood, in nats per token, if its attention is removed."""
    model, tokenizer = load_model(MODEL), load_tokenizer(MODEL)
    n_layers = model.config.num_hidden_layers
    spec = QualitySpec(text=VALIDATION_TEXT, n_sequences=n_sequences, sequence_tokens=256)
    plans = [single_layer_plan(n_layers, layer, Treatment.NONE) for layer in range(n_layers)]
    # All plans go through the layers together, so that shared computations are done once.
    base, *treated = PlanEvaluation(model, tokenizer, spec).run([Plan.uniform(Treatment.SOFTMAX, n_layers), *plans])
    return [mean_drop(base, scores, "nll") for scores in treated]


def main(n_sequences: str) -> None:
    rows = sweep(int(n_sequences))
    for layer, row in enumerate(rows):
        print(f"layer {layer:2}: {row.drop:+.4f} ({row.drop_ci_low:+.4f} to {row.drop_ci_high:+.4f})")
    drops = sorted(row.drop for row in rows)
    # The paper's rule: the least sensitive third loses attention, the most sensitive third keeps softmax.
    low, high = drops[len(drops) // 3], drops[2 * len(drops) // 3]
    print(plan_from_thresholds([row.drop for row in rows], low, high, Treatment.LINEAR_WINDOW, window=16))


if __name__ == "__main__":
    main(*sys.argv[1:])
