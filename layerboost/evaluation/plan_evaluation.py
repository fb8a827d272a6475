"""Judges many plans of one parent and computes what they share only once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..convert import convert
from ..plan import Plan, Treatment
from ..sweep.layer_sweep import DEFAULT_BUDGET_BYTES, LayerSweep
from ..sweep.request_tries import n_common
from .evaluate import batch_tokens, check_context, text_scores, text_sequences
from .likelihood import Answers, TextScores, answer_requests, score_text, text_likelihood
from .lm_eval_requests import Benchmarks, Item
from .retrieval import plans_retrieval_scores, retrieval_items
from .scores import QualitySpec, Scores


class PlanEvaluation:
    """Judges many plans of one model by one spec at once, sharing what plans have in common (`LayerSweep`).

    Scores equal those of `evaluate` on each plan's model up to rounding: lm-eval's metrics are computed from
    log-probabilities that differ only in the last bits. The tasks' requests and the text are prepared once, and parts
    of both can be judged separately.

    Args:
        model: An untouched parent of a supported family, on the device that it is to be judged on.
        tokenizer: Its tokenizer.
        spec: What to judge by.
        budget_bytes: Bound on the activations of a pass.

    Attributes:
        items: Items that can be answered by likelihood, in the order in which neighbours have most in common.
        sequences: Token ids of the text, (n, sequence_tokens); None without a text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        spec: QualitySpec,
        *,
        budget_bytes: int = DEFAULT_BUDGET_BYTES,
    ):
        self.model, self.spec, self.budget_bytes = model, spec, budget_bytes
        self.benchmarks = Benchmarks(model, tokenizer, spec) if spec.tasks else None
        self.items: list[Item] = []
        if self.benchmarks is not None:
            requests, items = self.benchmarks.requests, self.benchmarks.items
            answerable = [item for item in items if item.requests]
            self.items = sorted(answerable, key=lambda item: requests[item.requests[0]].tokens)
        self.sequences = None
        if spec.text is not None:
            check_context(model, spec)
            self.sequences = text_sequences(tokenizer, spec)
        self._retrieval = retrieval_items(tokenizer, spec)
        self._base = Plan.uniform(Treatment.SOFTMAX, model.config.num_hidden_layers)

    @property
    def generating(self) -> list[str]:
        """The tasks that have the model generate and whose items therefore cannot be answered by likelihood."""
        items = self.benchmarks.items if self.benchmarks else []
        return sorted({item.task for item in items if not item.requests})

    def costs(self) -> list[int]:
        """Returns the tokens that each item adds to the one before it; for a text, the tokens of each sequence."""
        if self.sequences is not None:
            return [self.sequences.shape[1]] * len(self.sequences)
        assert self.benchmarks is not None
        found: list[int] = []
        before: tuple[int, ...] = ()
        for item in self.items:
            cost = 0
            for index in item.requests:
                tokens = self.benchmarks.requests[index].tokens
                cost += len(tokens) - n_common(before, tokens)
                before = tokens
            found.append(cost)
        return found

    def answer(self, plans: Sequence[Plan], items: Sequence[Item] | None = None) -> Answers:
        """Answers the requests of some items (all if None); requests of other items keep 0 and True.

        Returns:
            log_p and greedy, both (P, n_requests).
        """
        assert self.benchmarks is not None
        asked = sorted({index for item in (self.items if items is None else items) for index in item.requests})
        n_requests = len(self.benchmarks.requests)
        log_p = torch.zeros(len(plans), n_requests, dtype=torch.float64)
        greedy = torch.ones(len(plans), n_requests, dtype=torch.bool)
        found = answer_requests(
            LayerSweep(self.model, plans, budget_bytes=self.budget_bytes),
            [self.benchmarks.requests[index] for index in asked],
            batch_rows=self.spec.batch_size,
        )
        log_p[:, asked], greedy[:, asked] = found.log_p, found.greedy
        return Answers(log_p, greedy)

    def read_text(self, plans: Sequence[Plan], indices: torch.Tensor | None = None) -> TextScores:
        """Scores some sequences of the text (all if None), by all that the spec asks for."""
        assert self.sequences is not None
        sequences = self.sequences if indices is None else self.sequences[indices]
        if self.spec.likelihood_only:
            sweep = LayerSweep(self.model, plans, budget_bytes=self.budget_bytes)
            return text_likelihood(sweep, sequences, batch_size=self.spec.batch_size)
        sweep = LayerSweep(self.model, [*plans, self._base], budget_bytes=self.budget_bytes)
        found = score_text(sweep, sequences, base=len(plans), batch_size=self.spec.batch_size)
        assert found.kl is not None and found.gaps is not None
        return TextScores(found.nll[: len(plans)], found.kl[: len(plans)], found.gaps[: len(plans)])

    def scores(
        self,
        plan: Plan,
        answers: tuple[torch.Tensor, torch.Tensor] | None,
        text: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None,
        items: Sequence[Item] | None = None,
    ) -> Scores:
        """Returns a plan's scores, given its answers (log_p and greedy) and the NLL, KL and gaps of each sequence.

        Args:
            plan: The plan that was answered for; it is used only if a task has the model generate.
            answers: Two (n_requests,); None if the tasks were not asked.
            text: Two (n_sequences,) and one (n_sequences, 15), the last two None if only the likelihood was measured;
                None if the text was not read.
            items: The items that were answered, all if None.
        """
        found = Scores()
        if answers is not None:
            assert self.benchmarks is not None
            model = convert(self.model, plan) if self.generating and plan != self._base else None
            found.metrics += self.benchmarks.scores(*answers, items=items, model=model)
        if text is not None:
            nll, kl, gaps = text
            of_kl = None if kl is None else kl.tolist()
            found.metrics += text_scores(nll.tolist(), of_kl, gaps, primary=not self.spec.tasks).metrics
        return found

    def run(self, plans: Sequence[Plan]) -> list[Scores]:
        """Judges plans by everything in the spec."""
        answers = self.answer(plans) if self.benchmarks else None
        text = self.read_text(plans) if self.sequences is not None else None
        judged = [
            self.scores(
                plan,
                None if answers is None else (answers.log_p[i], answers.greedy[i]),
                None if text is None else text.of_plan(i),
            )
            for i, plan in enumerate(plans)
        ]
        if self._retrieval:
            sweep = LayerSweep(self.model, plans, budget_bytes=self.budget_bytes)
            found = plans_retrieval_scores(sweep, self._retrieval, batch_tokens=batch_tokens(self.spec))
            for scores, of_plan in zip(judged, found, strict=True):
                scores.metrics += of_plan
        return judged
