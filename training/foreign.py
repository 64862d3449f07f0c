"""What libraries raise over a file that somebody else wrote, as one error of ours."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from training.errors import RunError

_FOREIGN_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    ImportError,
    RuntimeError,
    StrictDataclassError,
    SafetensorError,
)


@contextmanager
def foreign_errors(kind: type[RunError], message: str) -> Iterator[None]:
    """Turn what transformers and what it is made of raise over the content of files into `kind`: message, reason.

    Tokenizers raise a plain Exception over a file they can't read, or a panic of theirs, which is no Exception.
    """
    try:
        yield
    except RunError:
        raise
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        if not (panic or type(error) is Exception or isinstance(error, _FOREIGN_ERRORS)):
            raise
        reason = error.__cause__ if isinstance(error, StrictDataclassError) else error
        raise kind(f"{message}: {reason}") from error
