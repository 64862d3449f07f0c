"""Masks of masked attention: functions registered by name, and which pairs of tokens a language model may weigh.

Dims: B batch, H query heads, Tq new tokens, Tk all tokens so far, L lengths that weights are known for.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing_transnormer import Packing

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

LAYER_MASKS = ("decay", "learned")  # each layer makes them from its own decay or weights
_FUNCTIONS: dict[str, MaskFunction] = {}


def register_mask(name: str, function: MaskFunction) -> None:
    """Let `mask: name` of a configuration mean a function's weights; a name that is registered again is replaced.

    Args:
        name: any but "decay" and "learned".
        function: called once a forward pass with integer tensors that broadcast against each other, batch (B, 1, 1, 1),
            head (1, H, 1, 1), query (B or 1, 1, Tq, 1) and key (B or 1, 1, 1, Tk), the last two positions in the
            sequence, padding not counted, or in the document. Returns weights, floats or bool, (B or 1, H or 1, Tq or
            1, Tk or 1). The future, other documents and padding get weight 0 whatever it returns.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name: expected a string of at least one letter, got {name!r}")
    if name in LAYER_MASKS:
        raise ValueError(f"name: expected none of {', '.join(LAYER_MASKS)}, which layers make, got {name!r}")
    if not callable(function):
        raise TypeError(f"function: expected a function of batch, head, query and key, got {function!r}")
    _FUNCTIONS[name] = function


def find_mask(name: str) -> MaskFunction | None:
    """The function that was registered, or None for a mask that layers make; another name is a ValueError."""
    if name not in LAYER_MASKS and name not in _FUNCTIONS:
        names = ", ".join([*LAYER_MASKS, *_FUNCTIONS])
        hint = "register_mask adds names, called by a module that --import names"
        raise ValueError(f"mask: expected one of {names}, got {name!r}; {hint}")
    return _FUNCTIONS.get(name)


register_mask("causal", lambda batch, head, query, key: torch.ones_like(query - key, dtype=torch.bool))


class Pairs(NamedTuple):
    """What is known of each query and key before the weights.

    Args:
        query: positions of the new tokens in their sequence or document, (B or 1, 1, Tq, 1).
        key: positions of all tokens, (B or 1, 1, 1, Tk).
        allowed: keys that are not later, of the same document and no padding, (B or 1, 1, Tq, Tk) bool.
        even: whether the distance of allowed positions is that of the places where they stand.
        mask: the mask of every layer, (B or 1, H or 1, Tq, Tk), or None where each layer makes its own.
    """

    query: Tensor
    key: Tensor
    allowed: Tensor
    even: bool
    mask: Tensor | None = None


def pair_tokens(
    new: int, total: int, device: torch.device, valid: Tensor | None = None, documents: Tensor | None = None
) -> Pairs:
    """Pairs of the last `new` of `total` tokens with all of them.

    Args:
        new: Tq.
        total: Tk.
        device: where the tokens are.
        valid: (B, Tk) bool, tokens that are no padding, or None when all are.
        documents: (B, Tk) index of each token's document, each in one piece, or None.
    """
    place = torch.arange(total, device=device)[None]
    position = place if valid is None else (valid.cumsum(1) - 1).clamp(min=0)  # (B or 1, Tk)
    start = total - new
    query, key = position[:, None, start:, None], position[:, None, None]
    allowed = key <= query
    if valid is not None:
        allowed = allowed & valid[:, None, None]
    if documents is not None:
        allowed = allowed & (documents[:, None, start:, None] == documents[:, None, None])
    return Pairs(query, key, allowed, even=valid is None)


def pair_documents(packing: Packing, batch: int, tokens: int) -> Pairs:
    """Pairs of packed documents that lie in order in B rows of T tokens; positions start again in each."""
    documents = packing.documents(batch * tokens).view(batch, tokens)
    position = packing.positions(batch * tokens).view(batch, tokens)
    pairs = pair_tokens(tokens, tokens, documents.device, documents=documents)
    position = position.long()  # as elsewhere: a function may multiply it
    return pairs._replace(query=position[:, None, :, None], key=position[:, None, None])


def function_mask(name: str, function: MaskFunction, pairs: Pairs, batch: int, heads: int) -> Tensor:
    """Weights of a function where pairs are allowed, else 0: (B or 1, H or 1, Tq, Tk), as `register_mask` says."""
    device = pairs.allowed.device
    row = torch.arange(batch, device=device)[:, None, None, None]
    head = torch.arange(heads, device=device)[None, :, None, None]
    try:
        weights = function(row, head, pairs.query, pairs.key)
    except Exception as error:
        shapes = (tuple(x.shape) for x in (row, head, pairs.query, pairs.key))
        error.add_note("mask {!r}: raised by its function of batch {}, head {}, query {}, key {}".format(name, *shapes))
        raise
    _check_weights(name, weights, pairs, batch, heads)
    return weights & pairs.allowed if weights.dtype == torch.bool else torch.where(pairs.allowed, weights, 0)


def _check_weights(name: str, weights: object, pairs: Pairs, batch: int, heads: int) -> None:
    if not isinstance(weights, Tensor):
        raise TypeError(f"mask {name!r}: expected a tensor from its function, got {type(weights).__name__}")
    if weights.dtype != torch.bool and not weights.dtype.is_floating_point:
        raise TypeError(f"mask {name!r}: expected floats or torch.bool from its function, got {weights.dtype}")
    if weights.layout != torch.strided:
        raise TypeError(f"mask {name!r}: expected torch.strided from its function, got {weights.layout}")
    if weights.device != pairs.allowed.device:
        raise ValueError(f"mask {name!r}: expected device {pairs.allowed.device}, got {weights.device}")
    full = (batch, heads, *pairs.allowed.shape[2:])
    if weights.dim() != 4 or any(size not in (1, most) for size, most in zip(weights.shape, full, strict=True)):
        raise ValueError(
            f"mask {name!r}: expected a shape from its function that broadcasts to {full}, got {tuple(weights.shape)}"
        )


def relative_mask(weights: Tensor, pairs: Pairs, dtype: torch.dtype) -> Tensor:
    """Weights of keys by how many tokens they are back, 0 from L on: weights (H, L), returns (B or 1, H, Tq, Tk)."""
    if pairs.even:
        mask = _along_diagonals(weights, *pairs.allowed.shape[2:])[None]
    else:
        weights = F.pad(weights, (0, 1))
        distance = (pairs.query - pairs.key)[:, 0].clamp(0, weights.shape[1] - 1)  # (B, Tq, Tk)
        mask = weights[:, distance].transpose(0, 1)
    return torch.where(pairs.allowed, mask.to(dtype), 0)


def _along_diagonals(weights: Tensor, new: int, total: int) -> Tensor:
    """weights[h, i - j] at the places i of the last `new` tokens and j of all: (H, L) to (H, new, total).

    Rows are windows of one line, so that the gradient of a weight is a sum along a diagonal: that of an index would
    sort all pairs.
    """
    line = F.pad(weights, (max(new - 1, 0), total - weights.shape[1])).flip(1)  # the keys farthest back first
    return line.unfold(1, total, 1)[:, :new].flip(1)
