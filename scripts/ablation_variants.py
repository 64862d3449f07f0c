"""Variants of an ablation: heads x width, varied keys, overlays; their size, and the steps that a budget buys."""

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from training.config import Config, Run, config_values, load_config
from training.errors import ConfigError

_LONGEST_NAME = 100  # characters; file systems take 255 bytes
_NOT_VARIED = ("seed", "training.steps", "tracking.wandb_group")  # what runs get from --seeds, a budget and their names
_SAME_TASK = ("data.document_boundaries", "data.recall_fewest_pairs", "data.num_proc")
_TOLERANCE = 0.005  # of the parameters, between variants that differ in heads alone
BUDGETS = ("tokens", "flops", "seconds")
HEAD_KEYS = ("model.num_attention_heads", "model.head_dim", "model.num_key_value_heads", "model.intermediate_size")


@dataclass(frozen=True)
class Pair:
    """Heads of a width, `HxD` or, with G key/value heads, `HxD/G`."""

    heads: int
    width: int
    kv_heads: int

    @property
    def name(self) -> str:
        return f"{self.heads}x{self.width}" + (f"/{self.kv_heads}" if self.kv_heads != self.heads else "")


@dataclass(frozen=True)
class Size:
    """What a variant costs: parameters, numbers of a sequence's recurrent state, FLOPs to train on a token."""

    parameters: int
    state_size: int
    flops_per_token: float


@dataclass(frozen=True)
class Variant:
    """One way to train the model.

    Attributes:
        pair: its heads.
        settings: keys, other than those of the heads, that this variant sets and others do not, with their values.
        name: unique among the variants: the pair, then the settings.
        config: the whole configuration, of seed 0 and without the budget.
        size: of the model.
    """

    pair: Pair
    settings: dict[str, Any]
    name: str
    config: Config
    size: Size

    @property
    def folder(self) -> str:
        """The name as that of a folder, with a part of its hash where it is too long or has other characters."""
        plain = self.name.replace("/", "kv").replace(" ", "_")
        safe = re.sub(r"[^A-Za-z0-9.=_,+-]", "_", plain)[:_LONGEST_NAME]
        return safe if safe == plain else f"{safe}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Base:
    """What all variants share: config files, and keys given on the command line."""

    files: list[str]
    arguments: list[str]

    def config(self, extra: Sequence[str] = (), overlays: Sequence[str] = ()) -> Config:
        """The configuration with the overlays' and then extra keys on top."""
        return self._run(extra, overlays).config

    def imports(self) -> list[str]:
        """Modules that `--import` names."""
        return self._run().imports

    def _run(self, extra: Sequence[str] = (), overlays: Sequence[str] = ()) -> Run:
        files = [part for file in (*self.files, *overlays) for part in ("--config", file)]
        return load_config([*files, *self.arguments, *extra], "python -m scripts.ablate_heads")


def parse_pair(text: str) -> Pair:
    """Read `12x64`, `12×64`, or `12x64/1` with the number of key/value heads.

    Raises:
        ConfigError: it is none of these.
    """
    number = r"([1-9]\d{0,5})"
    found = re.fullmatch(f"{number}[x\u00d7]{number}(?:/{number})?", text)
    if not found:
        raise ConfigError(
            f"--pairs: expected heads x width such as 12x64, or 12x64/1 with its key/value heads, got {text}"
        )
    heads, width, kv_heads = map(int, found.groups(default=found[1]))
    if heads % kv_heads:
        raise ConfigError(f"--pairs: {text}: expected a divisor of {heads} as the number of key/value heads")
    return Pair(heads, width, kv_heads)


def make_variants(
    base: Base, pairs: Sequence[str], varied: Sequence[Sequence[str]], overlays: Sequence[str]
) -> list[Variant]:
    """Combine every pair with every value of every varied key, without and with each overlay.

    Args:
        base: shared by all.
        pairs: heads x width; none for those of the base.
        varied: each a key and its values, as texts.
        overlays: config files, each a variant beside the one without.

    Raises:
        ConfigError: a pair, key, value or overlay is wrong, two variants are the same, or their sizes differ.
    """
    plain = base.config()
    chosen = list(map(parse_pair, pairs)) or [_pair_of(plain)]
    products = {pair.heads * pair.width for pair in chosen}
    if len(products) > 1:
        raise ConfigError(f"--pairs: expected one product of heads and width, got {sorted(products)}")
    for key, *values in varied:
        _check_varied(key, values, plain)
    axes = [[(key, value) for value in values] for key, *values in varied]
    variants = [
        _variant(base, pair, settings, overlay, plain)
        for overlay in (None, *overlays)
        for settings in itertools.product(*axes)
        for pair in chosen
    ]
    for first, second in itertools.combinations(variants, 2):
        if first.config == second.config:
            raise ConfigError(f"expected variants that differ, {first.name} and {second.name} are the same")
    for variant in variants:
        if other := next((key for key in variant.settings if key.startswith("data.") and key not in _SAME_TASK), None):
            raise ConfigError(
                f"{variant.name}: expected the same data for all variants, got another {other}: what is measured on"
                " other data does not compare; give it to a command of its own, with another --out"
            )
    _check_equal(variants)
    return variants


def _check_varied(key: str, values: Sequence[str], plain: Config) -> None:
    if key in HEAD_KEYS[:3]:
        raise ConfigError(f"--vary {key}: expected --pairs to name heads and widths")
    if key in _NOT_VARIED:
        raise ConfigError(f"--vary {key}: expected another key; see --seeds and --tokens")
    if key not in config_values(plain) or not values:
        raise ConfigError(f"--vary: expected a key of the configuration and its values, got {' '.join((key, *values))}")


def _pair_of(config: Config) -> Pair:
    model = config.model
    width = model.head_dim or model.hidden_size // model.num_attention_heads
    return Pair(model.num_attention_heads, width, model.num_key_value_heads or model.num_attention_heads)


def _variant(
    base: Base, pair: Pair, settings: tuple[tuple[str, str], ...], overlay: str | None, plain: Config
) -> Variant:
    overlays = [] if overlay is None else [overlay]
    keys = [f"--{key}={value}" for key, value in settings]
    before = base.config(keys, overlays)
    config = base.config([*keys, *_head_arguments(pair, before)], overlays)
    if overlay is not None and before == base.config(keys):
        raise ConfigError(f"--overlays: {overlay}: expected keys that change something, it changes nothing")
    values, others = config_values(before), config_values(plain)
    parts = [f"{key.rpartition('.')[2]}={value}" for key, value in settings]
    parts += [Path(file).stem for file in overlays]
    changed = {
        key: value
        for key, value in values.items()
        if key not in HEAD_KEYS[:3] and (value != others[key] or key in dict(settings))
    }
    return Variant(pair, changed, " ".join((pair.name, *parts)), config, measure(config))


def _head_arguments(pair: Pair, config: Config) -> list[str]:
    """The heads as keys; what fewer key/value heads save goes into a wider GLU."""
    model = config.model
    saved = 2 * (pair.heads - pair.kv_heads) * pair.width / 3  # of 3 C parameters each
    layer = 5 * model.hidden_size + 3 * model.intermediate_size  # C parameters each
    step = 8 if _TOLERANCE * layer > 3 * 4 else 1  # multiples of 8 suit tensor cores; rounding must not show
    values = (pair.heads, pair.width, pair.kv_heads, model.intermediate_size + step * round(saved / step))
    return [f"--{key}={value}" for key, value in zip(HEAD_KEYS, values, strict=True)]


def _check_equal(variants: Sequence[Variant]) -> None:
    """Refuse variants that differ in heads alone and not in them alone."""
    first: dict[str, Variant] = {}
    for variant in variants:
        other = first.setdefault(variant.name.partition(" ")[2], variant)
        sizes = variant.size.parameters, other.size.parameters
        if abs(sizes[0] - sizes[1]) > _TOLERANCE * sizes[1]:
            raise ConfigError(
                f"expected equal parameters within {_TOLERANCE:.1%}, got {sizes[0]:,} for {variant.name} and"
                f" {sizes[1]:,} for {other.name}"
            )


def measure(config: Config) -> Size:
    """Count parameters, state and FLOPs of a model without making it.

    Raises:
        ConfigError: its shape can't be.
    """
    import torch

    from model import TransnormerForCausalLM
    from training.corpus import check_options
    from training.metrics import flops_per_token, state_size
    from training.recall import check_recall
    from training.setup import model_config

    check_options(config.data)
    if config.data.corpus == "recall":
        check_recall(config.data)
    shape = model_config(config, _vocab_size(config), special_ids={})
    with torch.device("meta"):
        model = TransnormerForCausalLM(shape)
    parameters = sum(p.numel() for p in model.parameters())
    return Size(parameters, state_size(shape), flops_per_token(shape))


def _vocab_size(config: Config) -> int:
    from training.tokenizer import OTHER_PIECES, load_sentencepiece

    if config.data.corpus == "recall":
        return OTHER_PIECES + config.data.recall_symbols
    if config.tokenizer.path is not None:
        return load_sentencepiece(Path(config.tokenizer.path)).get_piece_size()
    return config.tokenizer.vocab_size


@dataclass(frozen=True)
class Budget:
    """How long a run is, by a kind among `BUDGETS`: training tokens, training FLOPs, seconds of training."""

    kind: str
    amount: float

    def steps(self, variant: Variant, tokens_per_second: float | None) -> int:
        """Steps that are nearest to the budget; the speed is for a budget of seconds.

        Raises:
            ConfigError: not even one.
        """
        config = variant.config
        tokens = self.amount
        if self.kind == "flops":
            tokens /= variant.size.flops_per_token
        elif self.kind == "seconds":
            assert tokens_per_second is not None
            tokens *= tokens_per_second
        step = config.training.batch_size * config.data.sequence_length
        steps = math.floor(tokens / step + 0.5)
        if not 0 < steps < 2**63:
            raise ConfigError(
                f"--{self.kind}: {variant.name}: expected a budget of 1 step or more, of {step:,} tokens each, got"
                f" {self.amount:g}"
            )
        return steps


def overlay_text(base: Base, config: Config) -> str:
    """The keys of `config` that the base's files do not set, as a config file."""
    before = config_values(Base(base.files, []).config())
    tree: dict[str, Any] = {}
    for key, value in config_values(config).items():
        if value != before[key]:
            section, _, name = key.rpartition(".")
            (tree.setdefault(section, {}) if section else tree)[name] = value
    return yaml.safe_dump(tree, sort_keys=False)
