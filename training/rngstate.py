"""What the states of random generators in a checkpoint must be: numpy takes any, and then reads outside its own."""

import torch

_WORDS = 624  # of a Mersenne Twister, whose position follows them


def check_rng_tensors(tensors: dict[str, torch.Tensor]) -> None:
    """Check the states of the generators of Python, numpy and torch on the CPU.

    Raises:
        ValueError: naming the generator, what was expected and what came.
        KeyError: one is missing.
    """
    for name in ("python", "numpy"):
        _check_shape(name, tensors[name], torch.int64, (_WORDS + 1,))
        *words, position = tensors[name].tolist()
        if not all(0 <= word < 2**32 for word in words) or not 0 <= position <= _WORDS:
            raise ValueError(f"{name}: expected words of 32 bits and a position up to {_WORDS}")
        gauss = tensors[f"{name}_gauss"]
        _check_shape(f"{name}_gauss", gauss, torch.float64, (min(gauss.numel(), 1),))
    _check_shape("torch", tensors["torch"], torch.uint8, tuple(torch.get_rng_state().shape))


def _check_shape(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
