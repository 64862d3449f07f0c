"""DeepSpeed's ZeRO as a strategy: stage 2 spreads gradients and moments, stage 3 the weights as well."""

import contextlib
import functools
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from training.config import Config
from training.errors import ConfigError
from training.moments import check_names, fresh_state
from training.strategies import LONGEST_WAIT, Strategy
from training.tensorfiles import Part, TensorReader


class Zero(Strategy):
    """ZeRO of stage 2 or 3; `deepspeed` has to be installed."""

    def __init__(self, config: Config, precision: str, stage: int) -> None:
        self.stage, self.name = stage, f"zero{stage}"
        if importlib.util.find_spec("deepspeed") is None:
            raise ConfigError(f"{self.name}: deepspeed is not installed: pip install -e '.[deepspeed]'")
        # DeepSpeed 0.19 calls what torch 2.13 has renamed, several times a step.
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
        super().__init__(config, precision)

    def _open_accelerator(self, **plugins: Any) -> Accelerator:
        if not torch.cuda.is_available():  # accelerate starts DeepSpeed's processes on GPUs alone
            # Its operator for inference on a CPU would be compiled at the first start, for most of a minute.
            from deepspeed import ops

            ops.__compatible_ops__["deepspeed_shm_comm"] = False
            dist.init_process_group("gloo", timeout=LONGEST_WAIT)
        plugin = DeepSpeedPlugin(hf_ds_config=self._options())
        handlers = [InitProcessGroupKwargs(timeout=LONGEST_WAIT)]
        return Accelerator(mixed_precision="no", deepspeed_plugin=plugin, kwargs_handlers=handlers)

    def _options(self) -> dict[str, Any]:
        options = {
            "train_micro_batch_size_per_gpu": 1,  # our loss is divided by the tokens of the global batch already
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.config.optim.grad_clip,
            "steps_per_print": 2**62,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": self.stage},
        }
        if self.precision == "bf16":  # weights stay float32 and gradients are averaged in it, as with DDP
            options["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        return options

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        super().prepare(model, optimizer)
        self._zero = self.model.optimizer
        unset_hf_deepspeed_config()  # or transformers would spread every model that is opened later, as the last one is

    def loss(self, **batch: Any) -> Tensor:
        return self._called(**batch).loss  # DeepSpeed sets autocast, and warns of another one around it

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self.model.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    def clip(self) -> Tensor | None:
        return None

    def update(self) -> tuple[bool, float | None]:
        """DeepSpeed clips here, and makes no update where the norm of the gradients is not finite."""
        self.model.step()
        applied = self.model.was_step_applied()
        return applied, float(self.model.get_global_grad_norm()) if applied else math.nan

    def discard(self) -> None:
        raise AssertionError("training.skip_nonfinite is refused with ZeRO, which can't drop gradients")

    @property
    def scaler(self) -> None:
        return None

    @property
    def generates_together(self) -> bool:
        return self.stage == 3

    def weight_parts(self) -> dict[str, Part]:
        from deepspeed.utils import safe_get_full_fp32_param as whole

        return {name: self._part(name, functools.partial(whole, p)) for name, p in self.named_parameters.items()}

    def moment_parts(self) -> dict[str, Part]:
        from deepspeed.utils import safe_get_full_optimizer_state as whole

        step = self._states()[0]["step"]
        parts = {}
        for name in self._order:
            parameter = self.named_parameters[name]
            parts[f"step.{name}"] = Part(step.shape, step.dtype, step.clone)
            for kind in ("exp_avg", "exp_avg_sq"):
                parts[f"{kind}.{name}"] = self._part(name, functools.partial(whole, parameter, kind))
        return parts

    def _part(self, name: str, whole: Callable[[], Tensor]) -> Part:
        return Part(self._shapes[name], torch.float32, whole)

    def load_moments(self, reader: TensorReader) -> None:
        parts = self.moment_parts()
        check_names(reader, set(parts))
        step = reader.read(f"step.{self._order[0]}", torch.zeros(()))
        for state in self._states():
            state["step"].copy_(step)
        for name in self._order:
            for kind in ("exp_avg", "exp_avg_sq"):
                self._set_moment(name, kind, reader.read(f"{kind}.{name}", parts[f"{kind}.{name}"]))

    def _set_moment(self, name: str, kind: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        parameter, value = self.named_parameters[name], value.to(self.device)
        if self.stage == 2:
            safe_set_full_optimizer_state(parameter, value, kind)
            return
        share = parameter.ds_tensor.numel()  # type: ignore[attr-defined] # padded, which its function for whole ones forgets
        padded = nn.functional.pad(value.flatten(), (0, share * self.processes.count - value.numel()))
        first = share * self.processes.rank
        safe_set_local_optimizer_state(parameter, padded[first : first + share], kind)

    def _states(self) -> list[dict[str, Tensor]]:
        """AdamW's states of the flat tensors that this process updates, made if there was no update yet."""
        zero, adam = self._zero, self._zero.optimizer
        for flat in self._flats():
            if not adam.state.get(flat):
                adam.state[flat] = fresh_state(flat) | {"step": torch.zeros((), device=flat.device)}
        if self.stage == 2:
            zero._hp_optimizer_states_linked = False  # else a first step links those of the first group alone
            zero._lazy_init_hp_params_optimizer_state()
        return [adam.state[flat] for flat in self._flats()]

    def _flats(self) -> list[Tensor]:
        """The weights that this process updates, in float32, joined and padded."""
        zero = self._zero
        return zero.single_partition_of_fp32_groups if self.stage == 2 else zero.fp32_partitioned_groups_flat

    def holds_finite_weights(self) -> bool:
        return all(bool(flat.isfinite().all()) for flat in self._flats())
