"""The steps of a run: data, model, update, evaluation, checkpoint, in the order in which `train.py` calls them."""

import contextlib
import dataclasses
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from model import TransnormerForCausalLM
from training.batches import Batch, BatchOrder, evaluation_batches, step_batch, without_labels
from training.checkpoint import Content, restore_rng, save_checkpoint
from training.config import Run, config_dict, config_values
from training.data import Prepared, prepare
from training.errors import ConfigError, DataError, NonFiniteError, ResourceError, RunError
from training.evaluation import Score, complete, score, stop_when
from training.folder import RunFolder
from training.manifest import checkpoint_path
from training.metrics import EvaluationRecord, MetricsWriter, StepRecord, Throughput, flops_per_token, mfu, peak_flops
from training.modelcard import model_card
from training.moments import check_names
from training.nonfinite import find_non_finite
from training.optim import build_optimizer, learning_rate, set_learning_rate
from training.outcome import Ending, Interrupted, StopSignal
from training.peers import START_SECONDS, Peers
from training.progress import working
from training.setup import (
    check_out,
    checkpoint_activations,
    config_hash,
    count_micro_batches,
    model_config,
    refuse_changed,
    run_identity,
    use_cores,
)
from training.strategies import open_strategy
from training.tensorfiles import TensorReader
from training.tokenizer import load_tokenizer, token_byte_lengths, tokenizer_files
from training.trackers import check_trackers, open_trackers

_SMALLEST_SCALE = 1.0  # a loss scale below it can't help: the gradients themselves overflow float16


class Trainer:
    """State and steps of a run. Public methods are called by `train.py`, top to bottom, in every process.

    Args:
        run: what was asked for.
        stop: whether a signal has come.

    Raises:
        ConfigError: for what this machine or this number of processes can't run.
    """

    def __init__(self, run: Run, stop: StopSignal) -> None:
        config = run.config
        self.config, self.out, self.stop = config, run.out, stop
        self.step = self.tokens = 0
        self.skipped = self.dropped = 0  # steps without an update: by the loss scaler, for a batch that is not finite
        self.evaluated = self.saved = -1  # steps of the last evaluation and checkpoint
        self.stopping = False  # whether any process was asked to stop
        self.tracker_run_id: str | None = None
        disable_progress_bar()  # the bars of loading and saving would tear ours
        check_out(run.out)
        check_trackers(config.tracking)
        refuse_changed(run.changed, config)
        self.strategy = open_strategy(config)
        self.processes, self.main = self.strategy.processes, self.strategy.processes.is_main
        self._check_same(config_values(config), ConfigError)
        use_cores(self.strategy.device, config.training.cpu_threads)
        self.micro_batches = count_micro_batches(config, self.processes.count)
        model_config(config, vocab_size=config.tokenizer.vocab_size, special_ids={})
        self.folder = RunFolder(run, self.processes)
        self.folder.check()

    @contextmanager
    def watched(self, ending: Ending) -> Iterator[None]:
        """End the run if another process dies or is stuck, instead of waiting for it."""
        self.ending, timeout = ending, self.config.training.peer_timeout
        self.peers = Peers(self.processes, timeout, lambda: self.stop.asked is not None, ending.end_now)
        with self.peers.watching():
            yield
            self.strategy.close()

    def prepare_data(self) -> None:
        """Tokenizer, packed tokens and the order of rows; made once on each machine and cached."""
        self.peers.at("preparing data", limit=math.inf)
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
        self._check_same({"data.fingerprint": self.data.fingerprint}, DataError)

    def build_model(self) -> None:
        """The model with its initial weights, the same in every process, and its optimizer."""
        special = {name: getattr(self.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        shape = model_config(self.config, self.data.vocab_size, special)
        self.peers.at("building the model", limit=START_SECONDS)
        torch.manual_seed(self.config.seed)
        with self._working("building the model"), self._memory_errors():
            self.module = TransnormerForCausalLM(shape)  # saved, evaluated and asked for samples
            self.module.to(self.strategy.device)
            if self.config.training.gradient_checkpointing:
                checkpoint_activations(self.module)
            self.optimizer = build_optimizer(self.module, self.config.optim, self.strategy.device)
        self.flops = flops_per_token(shape)
        self.peak = self._peak_flops()
        self._say(
            f"{sum(p.numel() for p in self.module.parameters()):,} parameters, {self.processes.count} x"
            f" {self._device_name()}{f' by {self.strategy.name}' if self.processes.count > 1 else ''},"
            f" {self.strategy.precision}, {self.config.training.steps:,} steps of {self._tokens_per_step():,} tokens"
        )

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The run's folder, made or gone on with, and everything that is closed at the end."""
        self.peers.at("opening the run", limit=START_SECONDS)
        together, everyone = self.processes.together, self.processes.gather_objects
        with contextlib.ExitStack() as stack:
            checkpoint, state, passed_over = self.folder.find(self._identity())
            for message in passed_over:
                self._say(f"not resumed from: {message}")
            self.folder.claim(stack)
            self.ending.out = self.out
            together(lambda: self._load_weights(checkpoint))
            self.strategy.prepare(self.module, self.optimizer)
            together(lambda: self._load_state(checkpoint, state))
            self.evaluated = everyone(together(lambda: self._open_records(stack)))[0]
            bar_options: dict[str, Any] = {"mininterval": 0.5 if sys.stderr.isatty() else 5.0, "dynamic_ncols": True}
            total = self.config.training.steps
            self.bar = stack.enter_context(
                tqdm(total=total, initial=self.step, unit="step", disable=not self.main, **bar_options)
            )
            self.stop.wait_for_step = True
            self.throughput = Throughput()
            self.next_batch = self._batch(self.step)
            if self.step >= total:
                self._say(f"nothing to train: {self.step:,} steps are done, training.steps asks for {total:,}")
            with self._memory_errors():
                yield

    def train_step(self) -> None:
        """One update by one global batch; all processes stop before it if its loss or gradient is not finite."""
        lr = learning_rate(self.step - self.skipped - self.dropped, self.config.optim, self.config.training.steps)
        set_learning_rate(self.strategy.optimizer, lr)
        batch = self.next_batch
        loss = self._accumulate_gradients(batch)
        norm = self.strategy.clip()
        if self.step + 1 < self.config.training.steps:
            self.next_batch = self._batch(self.step + 1)  # on the CPU, while a GPU is still at work
        self.peers.at(f"step {self.step + 1}: exchange of losses")
        losses, grad_norm = self._agree(loss, norm)
        finite, updated = self._is_finite(losses, grad_norm), False
        if finite:
            self.peers.at(f"step {self.step + 1}: update")
            updated, norm_of_update = self.strategy.update()
            if norm_of_update is not None:
                grad_norm, finite = norm_of_update, math.isfinite(norm_of_update)
        if not finite:
            self._drop(batch, losses, grad_norm)
        elif not updated:
            self.skipped += 1
        self.step += 1
        self.tokens += self._tokens_per_step()
        self._record(batch, sum(losses), grad_norm, lr)
        self.peers.first_step_done()

    def evaluation_due(self) -> bool:
        """Whether the configuration asks for an evaluation after this step, and there is none yet."""
        every = self.config.training.eval_every
        return every > 0 and self.step > 0 and self.step % every == 0 and self.evaluated != self.step

    def evaluate(self) -> None:
        """Validation loss, perplexity, bits per byte, and a sample of generated text; a signal breaks it off."""
        with self.throughput.pause():
            total = score(self.module, self._evaluation_shares(), self.byte_lengths, self.strategy.autocast)
            nll, tokens, num_bytes, correct = self.processes.gather(total).sum(0).tolist()
            sample = None if self.stopping else self._sample()
            self._heed_signals()
            if not self.stopping:
                self._report(Score(nll, int(tokens), int(num_bytes), int(correct)), sample)
                self.evaluated = self.step

    def checkpoint_due(self) -> bool:
        """Whether the configuration asks for a checkpoint after this step."""
        every = self.config.checkpoint.every
        return every > 0 and self.step % every == 0

    def save(self, keep: int | None = None) -> Path:
        """Save a checkpoint of the current step, whole or not at all; returns its folder.

        Args:
            keep: how many checkpoints stay; None for `checkpoint.keep`.

        Raises:
            NonFiniteError: a weight is not finite; nothing is saved.
        """
        with self.throughput.pause():
            self.peers.at(f"checkpoint of step {self.step}", limit=START_SECONDS)
            finite = self.processes.gather_objects(self.strategy.holds_finite_weights())
            if not all(finite):
                rank = finite.index(False)
                raise NonFiniteError(f"step {self.step}: weights of rank {rank} are not finite; not saved")
            options = self.config.checkpoint
            content = Content(
                self.step,
                config_hash(self.config),
                self._write_model,
                self.strategy.weight_parts(),
                self.strategy.moment_parts(),
                self._state(),
            )
            keep = options.keep if keep is None else keep
            folder = save_checkpoint(self.out, content, keep, options.max_file_bytes, self.processes)
            self.saved = self.step
            self._heed_signals()
        return folder

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
        self.stop_if_asked()
        self.bar.close()
        if not self.main:
            return
        if (self.out / "metrics.jsonl").stat().st_size:
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

    def _say(self, text: str) -> None:
        if self.main:
            tqdm.write(text, file=sys.stderr)

    def _working(self, label: str) -> contextlib.AbstractContextManager[None]:
        return working(label) if self.main else contextlib.nullcontext()

    @contextmanager
    def _memory_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch has no kind of its own for the memory of a CPU
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            reason = str(error).partition("DefaultCPUAllocator: ")[2].partition(" Error code")[0] or str(error)
            raise ResourceError(
                f"out of memory on {self._device_name()}, {self.step} steps are done: {reason.split('. ')[0]}; a"
                " smaller model or training.micro_batch_size, or training.gradient_checkpointing, takes less"
            ) from error

    def _device_name(self) -> str:
        device = self.strategy.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def _peak_flops(self) -> float | None:
        given = self.config.training.peak_tflops
        if given is not None:
            return given * 1e12
        on_gpu = self.strategy.device.type == "cuda"
        return peak_flops(self._device_name(), self.strategy.precision) if on_gpu else None

    def _tokens_per_step(self) -> int:
        return self.config.training.batch_size * self.config.data.sequence_length

    def _step_folder(self) -> Path:
        return checkpoint_path(self.out, self.step)

    def _check_same(self, values: dict[str, Any], error: type[RunError]) -> None:
        """Refuse processes that would train on other data or by other settings than the main one."""
        everyone = self.processes.gather_objects(values)
        for rank, others in enumerate(everyone):
            for name, value in everyone[0].items():
                if others[name] != value:
                    raise error(
                        f"rank {rank}: {name} is {others[name]!r}, that of rank 0 is {value!r};"
                        " expected the same everywhere"
                    )

    def _identity(self) -> dict[str, Any]:
        return run_identity(self.config, self.data.fingerprint, self.data.tokenizer_sha256)

    def _load_weights(self, checkpoint: Path | None) -> None:
        if checkpoint is None:
            return
        with self._working(f"resuming from {checkpoint}"), torch.no_grad():
            parameters = dict(self.module.named_parameters())
            reader = TensorReader(checkpoint / "model", "model")
            check_names(reader, set(parameters))
            for name, parameter in parameters.items():
                parameter.copy_(reader.read(name, parameter))

    def _load_state(self, checkpoint: Path | None, state: dict[str, Any]) -> None:
        if checkpoint is None:
            return
        with self._working("resuming the optimizer"):
            self.strategy.load_moments(TensorReader(checkpoint, "optimizer"))
            restore_rng(checkpoint)
            if self.strategy.scaler is not None and state["scaler"] is not None:
                self.strategy.scaler.load_state_dict(state["scaler"])
        self.step, self.tokens, self.skipped = (state[name] for name in ("step", "tokens", "skipped"))
        self.dropped = state["dropped"]
        self.tracker_run_id = state["wandb_run_id"]
        self.saved = self.step
        before, now = state["steps"], self.config.training.steps
        if before not in (None, now):
            self._say(f"training.steps was {before:,}, is {now:,}: the learning rate follows the schedule of {now:,}")

    def _open_records(self, stack: contextlib.ExitStack) -> int:
        """Open what is written step by step; returns the step of the last evaluation there."""
        if not self.main:
            return -1
        self.metrics = stack.enter_context(contextlib.closing(MetricsWriter(self.out, self.step)))
        if self.metrics.missing_steps and self._step_folder().exists():  # not that of another run, by --resume PATH
            self._say(
                f"{self.out / 'metrics.jsonl'}: {self.metrics.missing_steps:,} of {self.step:,} steps are missing"
            )
        self.trackers = open_trackers(
            self.config.tracking, self.out, config_dict(self.config), self.tracker_run_id, self.step
        )
        stack.callback(self.trackers.close)
        return self.metrics.last_evaluated

    def _batch(self, step: int) -> Batch:
        self.peers.at(f"step {step + 1}: batch")
        return step_batch(self.config, self.data.train, self.order, step, self.processes, self.micro_batches)

    def _accumulate_gradients(self, batch: Batch) -> Tensor:
        """Backward passes over the micro-batches; returns this process's part of the mean loss.

        Each loss is a sum over tokens divided by the tokens of the whole global batch, so that neither the number
        of micro-batches nor that of processes changes the gradient; gradients are averaged, hence the factor.
        """
        self.module.train()
        loss = torch.zeros((), device=self.strategy.device)
        for i, micro_batch in enumerate(batch.micro_batches):
            inputs = {name: value.to(self.strategy.device, non_blocking=True) for name, value in micro_batch.items()}
            items = max(batch.labels, 1) / self.processes.count
            with self.strategy.accumulating(last=i == len(batch.micro_batches) - 1):
                self.peers.at(f"step {self.step + 1}: forward pass")
                part = self.strategy.loss(**inputs, num_items_in_batch=items, skip_logits=True)
                self.peers.at(f"step {self.step + 1}: backward pass")
                self.strategy.backward(part)
            loss += part.detach() / self.processes.count
        return loss

    def _agree(self, loss: Tensor, norm: Tensor | None) -> tuple[list[float], float]:
        """Every process's part of the loss and the gradient norm; whether any of them was asked to stop is noted."""
        asked = torch.full_like(loss, self.stop.asked is not None)
        values = torch.stack([loss, asked, torch.zeros_like(loss) if norm is None else norm.detach().to(loss)])
        losses, stopping, norms = self.processes.gather(values).T.tolist()
        self.stopping |= any(stopping)
        return losses, norms[0]

    def _is_finite(self, losses: list[float], grad_norm: float) -> bool:
        """Whether loss and gradient are; with a loss scale a gradient that is not leads to a smaller scale first."""
        scaler = self.strategy.scaler
        scaled = scaler is not None and scaler.get_scale() >= _SMALLEST_SCALE
        return all(map(math.isfinite, losses)) and (scaled or math.isfinite(grad_norm))

    def _drop(self, batch: Batch, losses: list[float], grad_norm: float) -> None:
        """Leave out a batch that is not finite, if the configuration allows it, or end the run before the update."""
        wrong = [f"loss of rank {rank} is {loss}" for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        wrong += [] if math.isfinite(grad_norm) else [f"the gradient norm is {grad_norm}"]
        self.peers.at(f"step {self.step + 1}: search for what is not finite", limit=START_SECONDS)
        found = find_non_finite(self.module, lambda: self._accumulate_gradients(batch), self.processes)
        text = f"step {self.step + 1}: {' and '.join(wrong)}; no update was made; {found}"
        if self.dropped < self.config.training.skip_nonfinite:
            self.strategy.discard()
            self.dropped += 1
            self._say(f"{text}; batch left out, the {self.dropped}. of at most {self.config.training.skip_nonfinite}")
            return
        if self.saved != self.step > 0 and all(self.processes.gather_objects(self.strategy.holds_finite_weights())):
            text += f"; checkpoint of the step before: {self.save(keep=0)}"
        raise NonFiniteError(text)

    def _evaluation_shares(self) -> Iterator[dict[str, Tensor]]:
        """This process's validation batches; all have as many, and end early if any was asked to stop."""
        options, data = self.config.training, self.config.data
        joined = self.config.model.attention == "lightning"
        batches = evaluation_batches(
            self.data.validation,
            data.sequence_length,
            options.micro_batch_size,
            options.eval_tokens,
            data.document_boundaries,
            joined,
        )
        while shares := list(islice(batches, self.processes.count)):
            self.peers.at(f"evaluation after step {self.step}")
            self._heed_signals()
            if self.stopping:
                return
            rank = self.processes.rank
            yield shares[rank] if rank < len(shares) else without_labels(shares[0])

    def _heed_signals(self) -> None:
        """Learn whether any process was asked to stop."""
        self.stopping |= any(self.processes.gather_objects(self.stop.asked is not None))

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
            mfu=mfu(speed, self.flops, self.peak, self.processes.count),
            skipped=self.skipped + self.dropped,
            world_size=self.processes.count,
            batch_sha=batch.sha,
        )
        self.metrics.write(record)
        values = {k: v for k, v in dataclasses.asdict(record).items() if isinstance(v, int | float) and k != "step"}
        self.trackers.log(self.step, values)
        self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
        self.bar.update()

    def _sample(self) -> str | None:
        """Text by the model, from the main process, or from all where each holds a share of the weights."""
        options, together = self.config.training, self.strategy.generates_together
        self.peers.at(f"sample after step {self.step}", limit=START_SECONDS)
        if not options.sample_prompt or not (self.main or together):
            return None
        with self.strategy.autocast():
            return complete(
                self.module,
                self.tokenizer,
                options.sample_prompt,
                options.sample_tokens,
                self.config.seed,
                synced_gpus=together,
                stopping_criteria=stop_when(lambda: self.stop.asked is not None),
            )

    def _report(self, result: Score, sample: str | None) -> None:
        if not self.main:
            return
        record = EvaluationRecord(
            self.step,
            self.tokens,
            result.loss,
            result.perplexity,
            result.bits_per_byte,
            result.accuracy,
            sample,
        )
        self.metrics.write(record)
        values = {name: getattr(record, name) for name in ("validation_loss", "bits_per_byte", "accuracy")}
        self.trackers.log(self.step, values)
        self._say(
            f"step {self.step}: validation loss {result.loss:.3f}, perplexity {result.perplexity:.1f},"
            f" {result.bits_per_byte:.3f} bits per byte, accuracy {result.accuracy:.1%}"
        )
        if sample is not None:
            self.trackers.log_text(self.step, "sample", sample)
            self._say("\n".join(f"  | {line}" for line in sample.splitlines()))

    def _write_model(self, folder: Path) -> None:
        """What a transformers model folder holds beside the weights: configuration, code, tokenizer and card."""
        self.module.save_without_weights(folder)
        for file in tokenizer_files(self.data.tokenizer_folder):
            shutil.copyfile(file, folder / file.name)
        card = model_card(self.config, self.module.config, self.step, self.tokens, self.out)
        (folder / "README.md").write_text(card, encoding="utf-8")

    def _state(self) -> dict[str, Any]:
        scaler = self.strategy.scaler
        return {
            "step": self.step,
            "steps": self.config.training.steps,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "dropped": self.dropped,
            "scaler": None if scaler is None else scaler.state_dict(),
            "wandb_run_id": self.trackers.run_id if self.main else None,
            "identity": self._identity(),
        }
