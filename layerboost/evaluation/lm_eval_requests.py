"""Turns lm-eval's tasks into requests that can be answered elsewhere, and the answers into scores.

The harness runs twice: once to record what it would ask a model, and once to score the answers. In between, requests
can be answered in any order, in parts, for many plans at once, and on other machines. Prompts, tokens, filters and
metrics are lm-eval's own.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..sweep.request_tries import Request
from .lm_eval_run import own_tokenizer, run_harness
from .scores import MetricScore, QualitySpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Item:
    """Holds one document of a task and the indices of its requests; there are none if a model is to generate."""

    task: str
    doc_id: int
    requests: tuple[int, ...]


class Benchmarks:
    """Holds what the tasks of a spec ask, collected once for all the plans of a model.

    Attributes:
        requests: The distinct requests.
        items: Every document of every task, in the tasks' order.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: QualitySpec):
        self._spec = spec

        def make_lm() -> Any:
            self._lm = _answering_lm()(model, tokenizer=own_tokenizer(tokenizer), batch_size=spec.batch_size)
            return self._lm

        run_harness(make_lm, spec)
        self.requests: list[Request] = list(self._lm.requests)
        self.items = [Item(task, doc_id, tuple(found)) for (task, doc_id), found in self._lm.found.items()]

    def scores(
        self,
        log_p: torch.Tensor,
        greedy: torch.Tensor,
        *,
        items: Iterable[Item] | None = None,
        model: PreTrainedModel | None = None,
    ) -> list[MetricScore]:
        """Scores one plan from its answers.

        Args:
            log_p, greedy: (n_requests,), the plan's row of `likelihood.Answers`.
            items: The items that were answered; all items if None. Each task needs at least one.
            model: The plan's model, needed if a task has it generate.
        """
        samples: dict[str, list[int]] | None = None
        if items is not None:
            samples = defaultdict(list)
            for item in items:
                samples[item.task].append(item.doc_id)
            samples = {task: sorted(ids) for task, ids in samples.items()}
        self._lm.answer(log_p.tolist(), greedy.tolist(), model)
        return run_harness(lambda: self._lm, self._spec, samples=samples)


@functools.cache
def _answering_lm() -> Any:
    """Returns the class, which is made when first needed because its parent takes seconds to import."""
    from lm_eval.models.huggingface import HFLM

    class AnsweringLM(HFLM):
        """Records the requests, or answers them from a list once `answer` was called with one."""

        def __init__(self, model: Any, **kwargs: Any) -> None:
            super().__init__(model, **kwargs)
            self.requests: dict[Request, int] = {}
            self.found: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
            self._by_text: dict[tuple[str, ...], list[int]] = {}
            self._asked: list[int] = []
            self._answers: list[tuple[float, bool]] | None = None
            self._parent = model

        def answer(self, log_p: list[float], greedy: list[bool], model: Any) -> None:
            self._answers = list(zip(log_p, greedy, strict=True))
            self._model = self._parent if model is None else model

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            if self._answers is None:
                self._asked = []
                super().loglikelihood(requests, disable_tqdm)
                for instance, index in zip(requests, self._asked, strict=True):
                    self._by_text[instance.args] = [index]
                    self.found[instance.task_name, instance.doc_id].append(index)
            answers = self._answers
            return [
                (0.0, False) if answers is None else answers[self._by_text[instance.args][0]] for instance in requests
            ]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            if self._answers is None:
                for instance in requests:
                    self._asked = []
                    super().loglikelihood_rolling([instance], disable_tqdm)
                    self._by_text[instance.args] = self._asked
                    self.found[instance.task_name, instance.doc_id] += self._asked
            answers = self._answers
            return [
                0.0 if answers is None else sum(answers[index][0] for index in self._by_text[instance.args])
                for instance in requests
            ]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            if self._answers is not None:
                return super().generate_until(requests, disable_tqdm)
            for instance in requests:
                self.found[instance.task_name, instance.doc_id] += []
            return [""] * len(requests)

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            for _, context, continuation in requests:
                # As in HFLM, a request that is too long loses its beginning.
                tokens = tuple(context + continuation)[-(self.max_length + 1) :]
                request = Request(tokens, len(continuation))
                self._asked.append(self.requests.setdefault(request, len(self.requests)))
            return [(0.0, False)] * len(requests)

    return AnsweringLM
