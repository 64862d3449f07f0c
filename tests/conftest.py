"""Fixtures that all tests share: devices, the skip of GPU tests, and memory that shows what was never written."""

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fault_runs import Template

pytest.register_assert_rewrite("fault_runs")  # else its asserts would not show what differs

# Graphs that an earlier version of an operator was compiled into must not answer for this one.
_compiled = tempfile.TemporaryDirectory(prefix="compiled-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compiled.name
if "PYTEST_XDIST_WORKER" in os.environ:  # workers side by side: threads of each would wait for those of the others
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402 (reads both variables)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sweep", type=int, metavar="N", help="random calls of each operator, other ones in every run")
    parser.addoption(
        "--faults", action="store_true", help="the long form of the fault tests, other faults in every run"
    )
    parser.addoption("--fault-seed", type=int, metavar="N", help="the faults of the run that printed this seed")


def pytest_configure(config: pytest.Config) -> None:
    """Without `--sweep` its calls are the same in every run."""
    calls = config.getoption("--sweep")
    if calls is not None and calls < 1:
        raise pytest.UsageError(f"--sweep: expected a whole number from 1, got {calls}")
    try:
        import hypothesis
    except ImportError:
        return
    hypothesis.settings.register_profile(
        "sweep",
        max_examples=calls or 200,
        derandomize=calls is None,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("sweep")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason, tests marked `long` without `--faults`, and those marked `gpu` where there is no GPU."""
    for item in items:
        if item.get_closest_marker("long") and not config.getoption("--faults"):
            item.add_marker(pytest.mark.skip(reason="another short form of it runs: --faults runs all"))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU: torch.cuda.is_available() is False"))


@pytest.fixture(scope="session")
def template() -> Iterator["Template"]:
    """Where runs of `train.py` start in a moment; see `fault_runs.py`."""
    from fault_runs import Template

    started = Template()
    yield started
    started.close()


@pytest.fixture(scope="session")
def fault_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of a run that takes a second; its tokens are cached by the first."""
    from small_run import small_run

    folder = tmp_path_factory.mktemp("corpus")
    return [*small_run(folder, steps=8, batch_size=8, eval_every=4), "--checkpoint.every=4"]


@pytest.fixture(scope="module")
def whole(template: "Template", fault_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without faults, which also makes the tokens; it has two checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    workers = template.start([*fault_arguments, f"--out={folder / 'run'}"], folder / "log")
    assert workers.wait() == [0], workers.said()
    return folder / "run"


@pytest.fixture
def long_form(request: pytest.FixtureRequest) -> bool:
    """Whether `--faults` asks for many faults instead of a few."""
    return request.config.getoption("--faults")


@pytest.fixture
def fault_generator(request: pytest.FixtureRequest, long_form: bool) -> random.Random:
    """What chooses faults: the same ones in every run without `--faults`, else by the seed that is printed."""
    seed = request.config.getoption("--fault-seed")
    if seed is None:
        seed = random.SystemRandom().randrange(10**6) if long_form else 0
    print(f"--fault-seed {seed}")
    return random.Random(seed)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that a test runs on; the case on the GPU carries the marker `gpu`."""
    return torch.device(request.param)


@pytest.fixture
def kernel_device() -> torch.device:
    """A GPU on which the CUDA kernels run."""
    from ops.lightning_cuda import library_unavailable_reason

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU: torch.cuda.is_available() is False")
    if (reason := library_unavailable_reason(torch.cuda.current_device())) is not None:
        pytest.skip(reason)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that a row that nothing wrote is seen."""
    mode, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    # Only a warning: on a GPU the error would ask for a variable that cuBLAS reads at start-up.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def mask_registry() -> Iterator[None]:
    """The mask "shapes", other in each head; what a test registers is gone after it."""
    from model import masks_transnormer, register_mask

    before = dict(masks_transnormer._FUNCTIONS)
    register_mask("shapes", lambda batch, head, query, key: 1 / (1 + head + (query - key).abs() % 5))
    yield
    masks_transnormer._FUNCTIONS.clear()
    masks_transnormer._FUNCTIONS.update(before)
