"""The strict room in which every test runs: what comes in is the environment, what goes out is JAX set up for tests.

Before JAX starts: CPU only, eight faked devices, a quiet libtpu that several processes may load at once. For each
test: strict dtype promotion, and rank promotion raises. Markers: `slow` runs with `--slow` or `MEMOPT_SLOW=1` alone;
`tpu_aot` skips with the reason where libtpu cannot be loaded; `loose_promotion` relaxes both promotions, for a test or
(`pytestmark`) a module in which Flax or Optax themselves add a scalar array to a matrix or a float32 to a bfloat16.
`--thin N` is for a second version of Python and JAX: N cases of each parametrized test.

Where memopt is not installed, its folders are mapped as `setup.cfg` maps them. The repository root is taken off the
path in any case: with it there, `passes.x` and `memopt.passes.x` would be two modules with two registries.
"""

import configparser
import functools
import importlib.machinery
import importlib.util
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
#: Eight devices; programs for the CPU are compiled without LLVM's dear optimizations, because most run once.
XLA_FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
}


def set_environment() -> None:
    """Set what JAX and libtpu read when they start; whatever the caller has set already stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    flags = os.environ.get("XLA_FLAGS", "")
    more = [f"{name}={value}" for name, value in XLA_FLAGS.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *more]).strip()


class SourceFinder:
    """Finds the packages of a source tree that is not installed, by the `package_dir` of its `setup.cfg`."""

    def __init__(self, root: pathlib.Path):
        config = configparser.ConfigParser()
        config.read(root / "setup.cfg", encoding="utf-8")
        pairs = (line.split("=") for line in config["options"]["package_dir"].strip().splitlines())
        self.folders = {name.strip(): root / folder.strip() for name, folder in pairs}

    def find_spec(self, name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        """Answer for the mapped packages alone; Python finds what lies inside them by itself."""
        folder = self.folders.get(name)
        if folder is None:
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def map_sources() -> None:
    """Take the root off the path, and map the folders unless an installed memopt already brings them."""
    sys.path[:] = [entry for entry in sys.path if pathlib.Path(entry or ".").resolve() != ROOT]
    if importlib.util.find_spec("memopt") is None:
        sys.meta_path.insert(0, SourceFinder(ROOT))


set_environment()
map_sources()

import hypothesis  # noqa: E402  (JAX and what imports it come after the environment)
import jax  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile(
    "memopt", derandomize=True, deadline=None, database=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("memopt")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--slow` and `--thin`."""
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too (or set MEMOPT_SLOW=1)")
    parser.addoption("--thin", type=int, metavar="N", help="run N cases of each parametrized test alone, evenly chosen")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what is slow, unless it is asked for; with `--thin`, take cases away of what is left.

    What runs once runs first: it is long, and at the end one worker would wait for the other.
    """
    items.sort(key=lambda item: item.get_closest_marker("once") is None)
    if config.getoption("--thin"):
        _thin(config, items, config.getoption("--thin"))
    if config.getoption("--slow") or os.environ.get("MEMOPT_SLOW", "0") not in ("", "0"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow or MEMOPT_SLOW=1"))


def _thin(config: pytest.Config, items: list[pytest.Item], most: int) -> None:
    """Keep so many cases of each parametrized test, from first to last, none of those marked `slow` or `once`."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if not (item.get_closest_marker("slow") or item.get_closest_marker("once")):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = set()
    for found in cases.values():
        places = [round(i * (len(found) - 1) / max(most - 1, 1)) for i in range(most)]
        kept |= {found[place].nodeid for place in places}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
    items[:] = [item for item in items if item.nodeid in kept]


@functools.cache
def libtpu_problem() -> str | None:
    """Say why nothing can be compiled for a TPU here, or None where it can: asked once a session."""
    if importlib.util.find_spec("libtpu") is None:
        return 'libtpu is not installed: pip install "memopt[tpu]"'
    from jax.experimental import topologies

    try:
        topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"libtpu cannot be loaded: {error}"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that compiles for TPUs where libtpu cannot be loaded; with MEMOPT_REQUIRE_LIBTPU=1 (CI) it fails."""
    if item.get_closest_marker("tpu_aot") and (problem := libtpu_problem()):
        required = os.environ.get("MEMOPT_REQUIRE_LIBTPU", "0") not in ("", "0")
        (pytest.fail if required else pytest.skip)(problem)


@pytest.fixture(autouse=True)
def promotion(request: pytest.FixtureRequest):
    """Make every implicit change of dtype or rank an error, but in tests marked `loose_promotion`."""
    loose = request.node.get_closest_marker("loose_promotion") is not None
    dtype, rank = ("standard", "allow") if loose else ("strict", "raise")
    with jax.numpy_dtype_promotion(dtype), jax.numpy_rank_promotion(rank):
        yield


@pytest.fixture
def getkey():
    """Give a function that returns a new PRNG key at each call, the same ones in every run."""
    keys = iter(range(1 << 30))
    return lambda: jax.random.key(next(keys))
