"""The steps of a run: data, model, update, evaluation, checkpoint, in the order in which `train.py` calls them."""

import contextlib
import dataclasses
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from model import TransnormerForCausalLM
from training.checkpoint import (
    clean_leftovers,
    load_optimizer_state,
    load_trainer_state,
    restore_rng,
    save_checkpoint,
)
from training.config import Config, config_dict
from training.data import BatchOrder, Prepared, batch_sha, collate, evaluation_batches, prepare
from training.errors import ConfigError, NonFiniteError, ResourceError
from training.evaluation import Score, complete, score
from training.manifest import step_folders
from training.metrics import EvaluationRecord, MetricsWriter, StepRecord, Throughput, flops_per_token, mfu, peak_flops
from training.modelcard import model_card
from training.optim import build_optimizer, learning_rate, set_learning_rate
from training.outcome import Interrupted, StopSignal
from training.progress import working
from training.setup import (
    check_out,
    checkpoint_activations,
    config_hash,
    count_micro_batches,
    find_checkpoint,
    model_config,
    open_accelerator,
    refuse_other_run,
    run_identity,
)
from training.storage import disk_errors, remove_unfinished, replace_file
from training.tokenizer import load_tokenizer, token_byte_lengths
from training.trackers import check_trackers, open_trackers

_SMALLEST_SCALE = 1.0  # a loss scale below it can't help: the gradients themselves overflow float16


class Batch(NamedTuple):
    """What a process runs in a step, and what all processes know of the global batch."""

    micro_batches: list[dict[str, Tensor]]
    labels: int  # predicted tokens of the global batch
    sha: str


class Trainer:
    """State and steps of a run. Public methods are called by `train.py`, top to bottom.

    Args:
        config: the resolved configuration.
        out: the run's folder.

    Raises:
        ConfigError: for what this machine or this number of processes can't run.
    """

    def __init__(self, config: Config, out: Path) -> None:
        self.config, self.out = config, out
        self.step = self.tokens = self.skipped = 0
        self.evaluated = self.saved = -1  # steps of the last evaluation and checkpoint
        self.stopping = False  # whether any process was asked to stop
        self.tracker_run_id: str | None = None
        self.stop = StopSignal()
        disable_progress_bar()  # the bars of loading and saving would tear ours
        check_out(out)
        check_trackers(config.tracking)
        self.accelerator = open_accelerator(config)
        self.main = self.accelerator.is_main_process
        self.micro_batches = count_micro_batches(config, self.accelerator.num_processes)
        model_config(config, vocab_size=config.tokenizer.vocab_size, special_ids={})

    def prepare_data(self) -> None:
        """Tokenizer, packed tokens and the order of rows; made once and cached."""
        self.data: Prepared = prepare(self.config)
        with self._working("opening the tokenizer"):
            self.tokenizer = load_tokenizer(self.data.tokenizer_folder)
        self.byte_lengths = token_byte_lengths(self.tokenizer)
        rows = self.data.train.num_rows(self.config.data.sequence_length)
        self.order = BatchOrder(rows, self.config.training.batch_size, self.config.seed)
        self._say(
            f"{len(self.data.train.ids):,} training tokens in {self.data.train.documents:,} documents,"
            f" {len(self.data.validation.ids):,} validation tokens in {self.data.validation.documents:,};"
            f" skipped documents: {self.data.skipped or 'none'}"
        )

    def build_model(self) -> None:
        """Model and optimizer on their devices, the same initial weights everywhere."""
        special = {name: getattr(self.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        shape = model_config(self.config, self.data.vocab_size, special)
        torch.manual_seed(self.config.seed)
        with self._working("building the model"):
            model = TransnormerForCausalLM(shape)
            model.to(self.accelerator.device)
            if self.config.training.gradient_checkpointing:
                checkpoint_activations(model)
            self.named_parameters = dict(model.named_parameters())
            optimizer = build_optimizer(model, self.config.optim, self.accelerator.device)
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
            self.module = self.accelerator.unwrap_model(self.model)  # saved, evaluated and asked for samples
            if self.config.training.compile:
                self.model = torch.compile(self.model)  # the update alone: generation would compile every length
        self.flops = flops_per_token(shape)
        self.peak = self._peak_flops()
        self._say(
            f"{sum(p.numel() for p in model.parameters()):,} parameters, {self.accelerator.num_processes} x"
            f" {self._device_name()}, {self.precision}, {self.config.training.steps:,} steps of"
            f" {self._tokens_per_step():,} tokens"
        )

    @contextmanager
    def opened(self, resume: str) -> Iterator[None]:
        """The run's folder, made or gone on with, and everything that is closed at the end."""
        before = step_folders(self.out)
        checkpoint, passed_over = find_checkpoint(self.out, resume)
        for message in passed_over:
            self._say(f"not resumed from: {message}")
        if checkpoint is not None:
            self._load(checkpoint)
        with contextlib.ExitStack() as stack:
            if self.main:
                self._open_folder(stack, before)
            bar_options: dict[str, Any] = {"mininterval": 0.5 if sys.stderr.isatty() else 5.0, "dynamic_ncols": True}
            total = self.config.training.steps
            self.bar = stack.enter_context(
                tqdm(total=total, initial=self.step, unit="step", disable=not self.main, **bar_options)
            )
            stack.enter_context(self.stop.listening())
            self.throughput = Throughput()
            self.next_batch = self._batch(self.step)
            if self.step >= total:
                self._say(f"nothing to train: {self.step:,} steps are done, training.steps asks for {total:,}")
            try:
                yield
            except torch.OutOfMemoryError as error:
                raise ResourceError(
                    f"out of memory on {self._device_name()} in step {self.step + 1}: {str(error).split('.')[0]};"
                    " a smaller training.micro_batch_size or training.gradient_checkpointing takes less"
                ) from error
            self.accelerator.end_training()  # else threads of the process group may abort the process as it exits

    def train_step(self) -> None:
        """One update by one global batch; all processes stop before it if its loss or gradient is not finite."""
        lr = learning_rate(self.step - self.skipped, self.config.optim, self.config.training.steps)
        set_learning_rate(self.optimizer, lr)
        batch = self.next_batch
        loss = self._accumulate_gradients(batch)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optim.grad_clip or math.inf)
        if self.step + 1 < self.config.training.steps:
            self.next_batch = self._batch(self.step + 1)  # on the CPU, while a GPU is still at work
        loss_value, grad_norm = self._agreed(loss, norm)
        self._refuse_non_finite(loss_value, grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.skipped += int(self.optimizer.step_was_skipped)
        self.step += 1
        self.tokens += self._tokens_per_step()
        self._record(batch, loss_value, grad_norm, lr)

    def evaluation_due(self) -> bool:
        """Whether the configuration asks for an evaluation after this step."""
        every = self.config.training.eval_every
        return every > 0 and self.step % every == 0

    def evaluate(self) -> None:
        """Validation loss, perplexity, bits per byte, and a sample of generated text."""
        options, length = self.config.training, self.config.data.sequence_length
        with self.throughput.pause():
            batches = evaluation_batches(
                self.data.validation,
                length,
                options.micro_batch_size,
                options.eval_tokens,
                self.config.data.document_boundaries,
                joined=self.config.model.attention == "lightning",
            )
            mine = (
                batch
                for i, batch in enumerate(batches)
                if i % self.accelerator.num_processes == self.accelerator.process_index
            )
            total = score(self.module, mine, self.byte_lengths, self.accelerator.autocast)
            nll, tokens, num_bytes = self.accelerator.reduce(total, "sum").tolist()
            self._report(Score(nll, int(tokens), int(num_bytes)))
        self.evaluated = self.step

    def checkpoint_due(self) -> bool:
        """Whether the configuration asks for a checkpoint after this step."""
        every = self.config.checkpoint.every
        return every > 0 and self.step % every == 0

    def save(self) -> Path:
        """Save a checkpoint of the current step, whole or not at all; returns its folder."""
        with self.throughput.pause():
            if self.main:
                self.checkpoint = save_checkpoint(
                    self.out,
                    self.step,
                    self._write_model,
                    self.optimizer.optimizer,
                    self.named_parameters,
                    self._state(),
                    config_hash(self.config),
                    self.config.checkpoint.keep,
                )
            self.accelerator.wait_for_everyone()
        self.saved = self.step
        return self.out / "checkpoints" / f"step_{self.step:08d}"

    def stop_if_asked(self) -> None:
        """After SIGTERM or SIGINT to any process: save once and leave.

        Raises:
            Interrupted: with the checkpoint's folder.
        """
        if not self.stopping:
            return
        if self.saved != self.step:
            self.save()
        self.bar.close()
        raise Interrupted(f"stopped after step {self.step} by a signal; checkpoint: {self._step_folder()}")

    def finish(self) -> None:
        """Last evaluation and checkpoint, the loss curve, and a completion by the model as anybody would open it."""
        if self.evaluated != self.step:
            self.evaluate()
        if self.saved != self.step:
            self.save()
        self.bar.close()
        if not self.main:
            return
        with working("plotting the loss"):
            from training.report import plot_runs

            plot_runs([self.out], self.out / "loss.png")
        folder = self._step_folder() / "model"
        with working("opening the checkpoint with AutoModelForCausalLM.from_pretrained"):
            from transformers import AutoModelForCausalLM, AutoTokenizer

            opened = AutoModelForCausalLM.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        prompt = self.config.training.sample_prompt
        print(f"loss curve: {self.out / 'loss.png'}")
        print(f"checkpoint: {self._step_folder()}")
        if not prompt:
            return
        print(f"completion of {prompt!r} by AutoModelForCausalLM.from_pretrained('{folder}'):")
        print(complete(opened, tokenizer, prompt, self.config.training.sample_tokens, self.config.seed))

    # What follows serves the steps above, in their order.

    @property
    def precision(self) -> str:
        """ "fp32", "bf16" or "fp16", as resolved for the device."""
        return {"no": "fp32"}.get(self.accelerator.mixed_precision, self.accelerator.mixed_precision)

    def _say(self, text: str) -> None:
        if self.main:
            tqdm.write(text, file=sys.stderr)

    def _working(self, label: str) -> contextlib.AbstractContextManager[None]:
        return working(label) if self.main else contextlib.nullcontext()

    def _device_name(self) -> str:
        device = self.accelerator.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def _peak_flops(self) -> float | None:
        given = self.config.training.peak_tflops
        if given is not None:
            return given * 1e12
        return peak_flops(self._device_name(), self.precision) if self.accelerator.device.type == "cuda" else None

    def _tokens_per_step(self) -> int:
        return self.config.training.batch_size * self.config.data.sequence_length

    def _step_folder(self) -> Path:
        return self.out / "checkpoints" / f"step_{self.step:08d}"

    def _load(self, checkpoint: Path) -> None:
        with self._working(f"resuming from {checkpoint}"):
            state = load_trainer_state(checkpoint)
            refuse_other_run(checkpoint, state["identity"], run_identity(self.config, self.data.fingerprint))
            weights = TransnormerForCausalLM.from_pretrained(checkpoint / "model", dtype=torch.float32)
            self.module.load_state_dict(weights.state_dict())
            load_optimizer_state(checkpoint, self.optimizer.optimizer, self.named_parameters)
            restore_rng(checkpoint)
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.tokens, self.skipped = (state[name] for name in ("step", "tokens", "skipped"))
        self.tracker_run_id = state["wandb_run_id"]
        self.saved = self.step

    def _open_folder(self, stack: contextlib.ExitStack, before: list[Path]) -> None:
        with disk_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.out / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise ConfigError(f"--out: {self.out} is in use by another run") from None
            stack.callback(lock.release)
            if step_folders(self.out) != before:  # by a run that has ended since this one looked for a checkpoint
                raise ConfigError(f"--out: {self.out} was changed by another run; start again to go on from there")
            clean_leftovers(self.out)
            for name in ("exit.json", "loss.png"):
                remove_unfinished(self.out / name)
            (self.out / "exit.json").unlink(missing_ok=True)  # of the run that goes on; killed, it would have none
        with disk_errors(self.out / "config.yaml"):
            replace_file(self.out / "config.yaml", yaml.safe_dump(config_dict(self.config), sort_keys=False).encode())
        self.metrics = stack.enter_context(contextlib.closing(MetricsWriter(self.out, self.step)))
        self.trackers = open_trackers(
            self.config.tracking, self.out, config_dict(self.config), self.tracker_run_id, self.step
        )
        stack.callback(self.trackers.close)

    def _batch(self, step: int) -> Batch:
        """The global batch of a step, a pure function of (seed, step); this process keeps its share of the rows."""
        options = self.config.data
        rows = self.order.rows(step)
        whole = collate(self.data.train, rows, options.sequence_length, options.document_boundaries)
        labels = int((whole["shift_labels"] >= 0).sum())
        mine = np.array_split(rows, self.accelerator.num_processes)[self.accelerator.process_index]
        micro_batches = [
            collate(
                self.data.train,
                part,
                options.sequence_length,
                options.document_boundaries,
                joined=self.config.model.attention == "lightning",
            )
            for part in np.array_split(mine, self.micro_batches)
        ]
        return Batch(micro_batches, labels, batch_sha(whole["input_ids"].numpy()))

    def _accumulate_gradients(self, batch: Batch) -> Tensor:
        """Backward passes over the micro-batches; returns this process's part of the mean loss.

        Each loss is a sum over tokens divided by the tokens of the whole global batch, so that neither the number
        of micro-batches nor that of processes changes the gradient; DDP averages, hence the factor.
        """
        self.model.train()
        processes = self.accelerator.num_processes
        loss = torch.zeros((), device=self.accelerator.device)
        for i, micro_batch in enumerate(batch.micro_batches):
            inputs = {name: value.to(self.accelerator.device, non_blocking=True) for name, value in micro_batch.items()}
            last = i == len(batch.micro_batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                part = self.model(**inputs, num_items_in_batch=max(batch.labels, 1) / processes, skip_logits=True).loss
                self.accelerator.backward(part)
            loss += part.detach() / processes
        return loss

    def _agreed(self, loss: Tensor, norm: Tensor) -> tuple[float, float]:
        """Loss and gradient norm on which all processes agree, and whether any of them was asked to stop."""
        asked = torch.full_like(loss, self.stop.asked is not None)
        summed = self.accelerator.reduce(torch.stack([loss, asked]), "sum")
        loss_value, stopping, grad_norm = torch.cat([summed, norm.detach().to(summed)[None]]).tolist()
        self.stopping = stopping > 0
        return loss_value, grad_norm

    def _refuse_non_finite(self, loss: float, grad_norm: float) -> None:
        scaler = self.accelerator.scaler
        wrong = [
            f"{name} is {value}"
            for name, value in (("loss", loss), ("gradient norm", grad_norm))
            if not math.isfinite(value)
        ]
        if not wrong or (scaler is not None and math.isfinite(loss) and scaler.get_scale() >= _SMALLEST_SCALE):
            return  # with a loss scale an overflowing gradient is expected now and then: the scaler skips the step
        raise NonFiniteError(f"step {self.step + 1}: {' and '.join(wrong)}; no update was made")

    def _record(self, batch: Batch, loss: float, grad_norm: float, lr: float) -> None:
        speed = self.throughput.update(self._tokens_per_step())
        if not self.main:
            return
        record = StepRecord(
            step=self.step,
            epoch=self.order.epoch(self.step),
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            tokens=self.tokens,
            tokens_per_second=speed,
            mfu=mfu(speed, self.flops, self.peak, self.accelerator.num_processes),
            skipped=self.skipped,
            world_size=self.accelerator.num_processes,
            batch_sha=batch.sha,
        )
        self.metrics.write(record)
        values = {k: v for k, v in dataclasses.asdict(record).items() if isinstance(v, int | float) and k != "step"}
        self.trackers.log(self.step, values)
        self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
        self.bar.update()

    def _report(self, result: Score) -> None:
        if not self.main:
            return
        options, sample = self.config.training, None
        if options.sample_prompt:
            with self.accelerator.autocast():
                sample = complete(
                    self.module, self.tokenizer, options.sample_prompt, options.sample_tokens, self.config.seed
                )
        record = EvaluationRecord(self.step, self.tokens, result.loss, result.perplexity, result.bits_per_byte, sample)
        self.metrics.write(record)
        self.trackers.log(self.step, {"validation_loss": result.loss, "bits_per_byte": result.bits_per_byte})
        self._say(
            f"step {self.step}: validation loss {result.loss:.3f}, perplexity {result.perplexity:.1f},"
            f" {result.bits_per_byte:.3f} bits per byte"
        )
        if sample is not None:
            self.trackers.log_text(self.step, "sample", sample)
            self._say("\n".join(f"  | {line}" for line in sample.splitlines()))

    def _write_model(self, folder: Path) -> None:
        """A transformers model folder: weights, code, tokenizer and card."""
        self.module.save_pretrained(folder)
        for file in self.data.tokenizer_folder.iterdir():
            shutil.copyfile(file, folder / file.name)
        card = model_card(self.config, self.module.config, self.step, self.tokens, self.out)
        (folder / "README.md").write_text(card, encoding="utf-8")

    def _state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "scaler": None if scaler is None else scaler.state_dict(),
            "wandb_run_id": self.trackers.run_id,
            "identity": run_identity(self.config, self.data.fingerprint),
        }
