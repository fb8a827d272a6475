"""Measures tokens per second of healing against Hugging Face's Trainer with a second model, and against a plain loop.

    python benchmarks/healing_speed.py --model MODEL --plan NNNNLSLSLLSS --window 16
    python benchmarks/healing_speed.py --shape small-llm          # random weights, a real model's share of vocabulary
    python benchmarks/healing_speed.py --model MODEL --text TEXT --workers 2   # as a healing job runs on this machine
    python benchmarks/healing_speed.py --model MODEL --parts   # where the time of our own step goes

One other side is `transformers.Trainer` with peft's LoRA of the same rank on the same converted model, a second copy of
the parent as teacher and the plain KL of whole logits. The plain loop is the same without Trainer: its teacher has the
student's weights, and AdamW steps the adapters in their own dtype. All sides take the same steps on the same sequences,
in turn; a ratio is the median of the pairs. The losses of the first step are compared, to ensure that all compute the
same. `two_candidates` is the time that two candidates take which share the teacher's states, over the time of one.

With --workers our steps are those of a Ray Train job with DeepSpeed engines, whose workers share the threads that
Trainer and the loop have in a single process. Each pair runs two jobs on the same tokens, of which the second finds the
states that the teacher had in the first; the job without stored states is timed, too.
"""

from __future__ import annotations

import argparse
import collections
import csv
import functools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from decode import SHAPES, build
from peft.tuners.lora import LoraLayer
from transformers import Trainer, TrainerCallback, TrainingArguments

from layerboost import Plan, convert
from layerboost.checkpoint import ModelSource, load_model, load_tokenizer
from layerboost.healing.adapters import add_lora
from layerboost.healing.distillation import make_trainee
from layerboost.healing.spec import HEAL, HealingSpec, Phase
from layerboost.healing.teacher_states import TeacherStates
from layerboost.healing.training import ADAM_BETAS, TorchEngine, run_phase
from layerboost.speed.hardware import hardware_name
from layerboost.text.batches import GlobalBatches, PackedText
from layerboost.text.documents import pack, read_documents
from layerboost.text.sources import TextSource

COLUMNS = (
    *("model", "plan", "window", "batch_sequences", "sequence_tokens", "rank", "steps", "pairs"),
    *("tok_per_s", "trainer_tok_per_s", "ratio", "ratio_low", "ratio_high", "loss", "trainer_loss"),
    *("hardware", "workers", "threads", "dtype", "torch", "transformers", "python"),
    *("loop_tok_per_s", "loop_ratio", "loop_ratio_low", "loop_ratio_high"),
    *("two_candidates", "two_candidates_low", "two_candidates_high"),
)


class Ours:
    """Takes steps of `run_phase`; each call to `take` continues where the last one ended."""

    def __init__(self, model, plan: Plan, text: PackedText, spec: HealingSpec, stored: TeacherStates | None = None):
        self.spec, self.batches, self.done = spec, GlobalBatches(text, spec.batch_sequences, spec.seed), 0
        trainee = make_trainee(HEAL, model, convert(model, plan), spec, stored)
        self.engine = TorchEngine(trainee, spec, 1, spec.gradient_clip)
        self.device = next(model.parameters()).device

    def take(self, n: int) -> tuple[float, list[float]]:
        """Returns the seconds and losses of `n` steps."""
        phase, losses = Phase(HEAL, 0, self.done + n, self.spec.learning_rate or 1e-3, self.spec.gradient_clip), []
        start = time.perf_counter()
        run_phase(
            self.engine,
            phase,
            self.batches,
            self.spec,
            start=self.done,
            device=self.device,
            on_step=lambda row: losses.append(row.loss),
        )
        self.done += n
        return time.perf_counter() - start, losses


def time_parts(ours: Ours, n_steps: int) -> dict[str, float]:
    """Returns the median seconds of the parts of a step, the same calls as in `Distillation` and `TorchEngine`."""
    trainee, engine, seconds = ours.engine.module, ours.engine, collections.defaultdict(list)

    def timed(part: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        seconds[part].append(time.perf_counter() - start)
        return result

    for step in range(n_steps + 1):
        ids = ours.batches.batch(step).input_ids.long().to(ours.device)
        with torch.no_grad():
            of_teacher, _ = timed("teacher's layers", lambda ids=ids: trainee._run(trainee.teacher, ids, None, False))
        of_student, _ = timed("student's layers", lambda ids=ids: trainee._run(trainee.student, ids, None, False))
        loss = timed(
            "heads and loss, with its gradient",
            lambda ids=ids, s=of_student, t=of_teacher: trainee._divergence(s, t, ids, None),
        )
        timed("backward through the layers", lambda loss=loss: engine.backward(loss))
        timed("optimizer", engine.step)
    return {part: statistics.median(values[1:]) for part, values in seconds.items()}


class OursOnRay:
    """Takes steps of healing jobs, timed in their first worker without the start and the end of the jobs.

    All jobs heal on the same text. `after` names another side, whose last job has stored the teacher's states.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        plan: Plan,
        spec: HealingSpec,
        folder: str,
        *,
        stores: bool = False,
        after: OursOnRay | None = None,
    ):
        import ray  # only here, since a machine with a GPU may have neither Ray nor DeepSpeed

        self.args, self.plan, self.spec, self.folder, self.jobs = args, plan, spec, folder, 0
        self.stores, self.after, self.cache = stores, after, ""
        if ray.is_initialized():
            return
        # The workers import this file by its module name, so its folder must be on their path.
        os.environ["PYTHONPATH"] = str(Path(__file__).parent)
        ray.init(address="local", num_cpus=args.threads, include_dashboard=False, log_to_driver=False)

    def take(self, n: int) -> tuple[float, list[float]]:
        """Returns the seconds of `n` steps after two that warm up, and the losses of all steps."""
        from tasks.cluster.resources import WorkerResources
        from tasks.healing.job import Checkpoints, HealingJob, HealingText, TeacherCache, ZeroSettings
        from tasks.healing.run import heal

        self.jobs += 1
        if self.stores:
            self.cache = f"{self.folder}/states-{self.jobs}"
        elif self.after is not None:
            self.cache = self.after.cache
        Path(self.folder).mkdir(exist_ok=True)
        times = Path(self.folder) / f"times-{self.jobs}"
        job = HealingJob(
            parent=ModelSource(str(Path(self.args.model).resolve())),
            plan=self.plan,
            spec=replace(self.spec, tokens=(n + 2) * self.spec.tokens_per_step, transfer_fraction=0.0),
            text=HealingText((TextSource(str(self.args.text.resolve())),)),
            output=f"{self.folder}/healed",
            checkpoints=Checkpoints(f"{self.folder}/storage", f"job-{self.jobs}", every_steps=10**6),
            workers=WorkerResources(self.args.workers, self.args.threads / self.args.workers, 0.0),
            zero=ZeroSettings(stage=1),
            teacher_cache=TeacherCache(self.cache) if self.cache else None,
            on_step=functools.partial(note_time, str(times)),
        )
        losses = [row.loss for row in heal(job).curve]
        at = [float(line) for line in times.read_text().split()]
        return at[1 + n] - at[1], losses


def note_time(file: str, event) -> None:
    if event.rank == 0:
        with open(file, "a") as times:
            times.write(f"{time.perf_counter()}\n")


class Distiller(Trainer):
    """Adds to Trainer what one usually writes: the teacher's logits, the student's, and their KL."""

    def __init__(self, *args, teacher, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher, self.losses = teacher, []

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss = kl_of_whole_logits(self.teacher, model, inputs["input_ids"])
        self.losses.append(loss.detach())
        return loss


class PlainLoop:
    """Takes steps of the loop that one writes without any library but peft."""

    def __init__(self, model, plan: Plan, text: PackedText, spec: HealingSpec):
        self.spec, self.batches, self.done = spec, GlobalBatches(text, spec.batch_sequences, spec.seed), 0
        self.teacher, self.student = model.eval(), with_adapters_of_peft(convert(model, plan), spec)
        self.trained = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=spec.learning_rate or 1e-3, betas=ADAM_BETAS)

    def take(self, n: int) -> tuple[float, list[float]]:
        """Returns the seconds and losses of `n` steps."""
        losses, device, start = [], self.teacher.device, time.perf_counter()
        for step in range(self.done, self.done + n):
            input_ids = self.batches.batch(step).input_ids.long().to(device)
            loss = kl_of_whole_logits(self.teacher, self.student, input_ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, self.spec.gradient_clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(float(loss.detach()))
        self.done += n
        return time.perf_counter() - start, losses


def with_adapters_of_peft(student, spec: HealingSpec):
    """Adds adapters that start like ours, but whose forward is peft's own."""
    add_lora(student, spec.rank, spec.alpha, spec.seed)
    for module in student.modules():
        if isinstance(module, LoraLayer):
            vars(module).pop("forward", None)
    return student


def kl_of_whole_logits(teacher, student, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        of_teacher = teacher(input_ids=input_ids, use_cache=False).logits[:, :-1]
    of_student = student(input_ids=input_ids, use_cache=False).logits[:, :-1]
    logs = [F.log_softmax(logits.float(), dim=-1).flatten(0, 1) for logits in (of_student, of_teacher)]
    return F.kl_div(*logs, log_target=True, reduction="batchmean")


class Timed(TrainerCallback):
    """Measures the seconds from the beginning of the first step to the end of the last, without Trainer's own work."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = time.perf_counter() - self.start


class Theirs:
    """Takes steps of a Trainer with a separate teacher."""

    def __init__(self, model, teacher, plan: Plan, text: PackedText, spec: HealingSpec):
        self.spec, self.teacher, self.batches, self.done = spec, teacher.eval(), GlobalBatches(text, 1, spec.seed), 0
        self.student = with_adapters_of_peft(convert(model, plan), spec)
        self.on_cpu = next(model.parameters()).device.type == "cpu"

    def take(self, n: int) -> tuple[float, list[float]]:
        """Returns the seconds and losses of `n` steps."""
        each = self.spec.batch_sequences
        rows = [
            {"input_ids": self.batches.batch(step).input_ids[0].long()}
            for step in range(self.done * each, (self.done + n) * each)
        ]
        clock = Timed()
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                per_device_train_batch_size=each,
                max_steps=n,
                learning_rate=self.spec.learning_rate or 1e-3,
                adam_beta2=0.95,
                max_grad_norm=self.spec.gradient_clip,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
                train_sampling_strategy="sequential",
                use_cpu=self.on_cpu,
            )
            trainer = Distiller(self.student, arguments, train_dataset=rows, callbacks=[clock], teacher=self.teacher)
            trainer.train()
        self.done += n
        return clock.seconds, [float(loss) for loss in trainer.losses]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="folder of a model")
    what.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--plan", default="NNNNLSLSLLSS")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--batch-sequences", type=int, default=8)
    parser.add_argument("--sequence-tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6, help="steps of each side in a pair")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, help="time healing jobs with this many workers")
    parser.add_argument("--text", type=Path, help="with --workers: text that the job reads")
    parser.add_argument("--parts", action="store_true", help="time the parts of our own step, and nothing else")
    parser.add_argument("--out", type=Path, help="append the row to this CSV")
    arguments = parser.parse_args()
    if arguments.workers and not (arguments.model and arguments.text):
        parser.error("--workers needs --model and --text")
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    def load():
        if arguments.model:
            return load_model(arguments.model, device=arguments.device)
        torch.manual_seed(0)
        return build(arguments.shape, torch.float32, arguments.device, arguments.sequence_tokens)

    model, plan = load(), Plan.parse(arguments.plan, arguments.window)
    spec = HealingSpec(
        tokens=arguments.batch_sequences * arguments.sequence_tokens,
        sequence_tokens=arguments.sequence_tokens,
        batch_sequences=arguments.batch_sequences,
        learning_rate=1e-3,
        warmup_fraction=0.0,
    )
    n_rows = spec.batch_sequences * (2 + arguments.pairs * arguments.steps)  # so that no side meets a row twice
    shape = (n_rows, arguments.sequence_tokens)
    ids = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    text = PackedText(ids)
    scratch = tempfile.TemporaryDirectory()
    ours: Ours | OursOnRay = Ours(model, plan, text, spec)
    if arguments.parts:
        parts = time_parts(ours, arguments.pairs * arguments.steps)
        for part, part_s in parts.items():
            print(f"{part:34} {part_s:7.3f} s {part_s / sum(parts.values()):6.1%}")
        return
    if arguments.workers:
        ours = OursOnRay(arguments, plan, spec, f"{scratch.name}/ours")
        tokenizer, wanted = load_tokenizer(arguments.model), 4 * spec.batch_sequences  # the rows of our first steps
        text = PackedText(pack(read_documents(arguments.text), tokenizer, spec.sequence_tokens, limit_sequences=wanted))
    sides: dict[str, Any] = {
        "ours": ours,
        "trainer": Theirs(load(), load(), plan, text, spec),
        "loop": PlainLoop(model, plan, text, spec),
    }
    other = Plan.parse(str(plan)[::-1], arguments.window)
    if arguments.workers:
        first_job = OursOnRay(arguments, plan, spec, f"{scratch.name}/first", stores=True)
        sides |= {
            "first": first_job,
            "second": OursOnRay(arguments, other, spec, f"{scratch.name}/second", after=first_job),
        }
    else:
        stored = TeacherStates(scratch.name, 2**40)
        sides |= {"first": Ours(model, plan, text, spec, stored), "second": Ours(model, other, text, spec, stored)}
    first = {name: side.take(2)[1][0] for name, side in sides.items()}
    # Narrow dtypes round whole logits otherwise than logits in chunks.
    tolerance = 1e-4 if model.dtype == torch.float32 else 1e-2
    for name in ("trainer", "loop", "first"):
        if abs(first["ours"] - first[name]) > tolerance * max(1.0, abs(first["ours"])):
            sys.exit(f"the sides do not compute the same: {first['ours']} against {first[name]} of {name}")
    tokens = arguments.steps * spec.tokens_per_step
    rates: list[dict[str, float]] = []
    for pair in range(arguments.pairs):
        # The second candidate finds what the first has stored; the others change places.
        alone = ["ours", "trainer", "loop"]
        names = [*alone[pair % 3 :], *alone[: pair % 3], "first", "second"]
        rates.append({name: tokens / sides[name].take(arguments.steps)[0] for name in names})
        print(f"pair {pair + 1}: " + ", ".join(f"{name} {rates[-1][name]:.0f} tok/s" for name in sides), flush=True)
    ratios = sorted(rate["ours"] / rate["trainer"] for rate in rates)
    of_loop = sorted(rate["ours"] / rate["loop"] for rate in rates)
    two = sorted(rate["ours"] / rate["first"] + rate["ours"] / rate["second"] for rate in rates)
    row = {
        "model": (arguments.model and Path(arguments.model).name) or arguments.shape,
        "plan": str(plan),
        "window": plan.window,
        "batch_sequences": spec.batch_sequences,
        "sequence_tokens": spec.sequence_tokens,
        "rank": spec.rank,
        "steps": arguments.steps,
        "pairs": arguments.pairs,
        "tok_per_s": statistics.median(rate["ours"] for rate in rates),
        "trainer_tok_per_s": statistics.median(rate["trainer"] for rate in rates),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
        "loss": first["ours"],
        "trainer_loss": first["trainer"],
        "hardware": hardware_name(arguments.device),
        "workers": arguments.workers,
        "threads": arguments.threads,
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "loop_tok_per_s": statistics.median(rate["loop"] for rate in rates),
        "loop_ratio": statistics.median(of_loop),
        "loop_ratio_low": of_loop[0],
        "loop_ratio_high": of_loop[-1],
        "two_candidates": statistics.median(two),
        "two_candidates_low": two[0],
        "two_candidates_high": two[-1],
    }
    for name, values in (("Trainer", ratios), ("the plain loop", of_loop)):
        print(f"{statistics.median(values):.2f}x of {name} ({values[0]:.2f} to {values[-1]:.2f})")
    print(f"two candidates take {statistics.median(two):.2f}x the time of one ({two[0]:.2f} to {two[-1]:.2f})")
    if arguments.out:
        is_new = not arguments.out.exists()
        with arguments.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
