"""The rules of the house: what comes in is the syntax tree of every source file, what goes out is a list of violations.

Each rule is a function from one source file to its violations, each as a sentence. A table holds, for each rule,
sources that break it and sources that do not, so that no rule can stop working unseen.
"""

import ast
import configparser
import dataclasses
import functools
import inspect
import os
import pathlib
import re
from collections.abc import Callable, Iterator

import pytest

import memopt

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = {
    "memopt": "memopt",
    "passes": "memopt.passes",
    "models": "memopt.models",
    "pallas_kernels": "memopt.pallas_kernels",
    "experiments": "experiments",
    "tests": "tests",
}
MAPPED = ("passes", "models", "pallas_kernels")
MAX_LINES = 500


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported name in full (`from a import b` is `a.b`), its line, and whether a function does the importing."""

    target: str
    line: int
    lazy: bool


@dataclasses.dataclass(frozen=True)
class Source:
    """A file as the rules see it: its path from the root, and its text."""

    path: str
    text: str

    @property
    def folder(self) -> str:
        """The room of the house: the first part of the path."""
        return self.path.split("/")[0]

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def package(self) -> str:
        """The dotted package that relative imports start from."""
        inner = self.path.split("/")[1:-1]
        return ".".join([PACKAGES[self.folder], *inner])

    @functools.cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text, self.path)

    @functools.cached_property
    def imports(self) -> list[Import]:
        """Every import, wherever it stands."""
        return list(_imports(self.tree, self.package, lazy=False))

    @functools.cached_property
    def dotted(self) -> list[tuple[str, int]]:
        """Every dotted expression such as `a.b.c` in full length, with its line."""
        nodes = [node for node in ast.walk(self.tree) if isinstance(node, ast.Attribute)]
        inner = {id(node.value) for node in nodes}
        return [(name, node.lineno) for node in nodes if id(node) not in inner and (name := _dotted_name(node))]


def _imports(node: ast.AST, package: str, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = _absolute(child, package)
            yield from (Import(f"{base}.{alias.name}", child.lineno, lazy) for alias in child.names)
        else:
            inner = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, package, inner)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    parts = parts[: len(parts) - node.level + 1]
    return ".".join([*parts, node.module] if node.module else parts)


def _dotted_name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := _dotted_name(node.value)):
        return f"{base}.{node.attr}"
    return None


def _under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _at(source: Source, line: int, sentence: str) -> str:
    return f"{source.path}:{line}: {sentence}"


# The rules.


def jax_internals(source: Source) -> list[str]:
    """`jax._src` is used in the compat module and nowhere else."""
    if source.folder == "memopt" and re.fullmatch(r"_compat\w*\.py", source.name):
        return []
    used = [(item.target, item.line) for item in source.imports] + source.dotted
    strings = (node for node in ast.walk(source.tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    used += [(node.value, node.lineno) for node in strings if re.fullmatch(r"jax\._src\.[\w.]+", node.value)]
    lines = sorted({line for name, line in used if _under(name, "jax._src")})
    return [_at(source, line, "jax._src belongs to memopt/_compat.py alone") for line in lines]


def short_form(source: Source) -> list[str]:
    """The mapped folders are imported by their full names, or there would be two of each module."""
    found = [item for item in source.imports if item.target.split(".")[0] in MAPPED]
    return [_at(source, item.line, f"import memopt.{item.target}, not {item.target}") for item in found]


def framework_knows_no_pass(source: Source) -> list[str]:
    """memopt/ takes `memopt.passes.default` alone, inside a function; memopt/__init__.py may name the package."""
    if source.folder != "memopt":
        return []
    found = [item for item in source.imports if _under(item.target, "memopt.passes")]
    if source.path == "memopt/__init__.py":
        found = [item for item in found if item.target != "memopt.passes"]
    allowed = ("memopt.passes", "memopt.passes.default")
    found = [item for item in found if not (item.lazy and item.target in allowed)]
    return [_at(source, item.line, f"the framework may not import {item.target} here") for item in found]


def passes_stand_alone(source: Source) -> list[str]:
    """A pass imports the framework and kernels; no other pass (a shared `_file` is none), no model."""
    if source.folder != "passes" or source.path == "passes/__init__.py":
        return []
    used = [(item.target, item.line) for item in source.imports] + source.dotted
    found = [(name, line) for name, line in used if _under(name, "memopt.passes") or _under(name, "memopt.models")]
    found = [(name, line) for name, line in found if not name.startswith("memopt.passes._")]
    return [_at(source, line, f"a pass may not import {name}") for name, line in found]


def models_and_kernels_stand_alone(source: Source) -> list[str]:
    """Models and kernels import neither the framework nor the passes nor each other."""
    if source.folder not in ("models", "pallas_kernels"):
        return []
    own = PACKAGES[source.folder]
    found = [item for item in source.imports if _under(item.target, "memopt") and not _under(item.target, own)]
    return [_at(source, item.line, f"{source.folder}/ may not import {item.target}") for item in found]


def experiments_are_users(source: Source) -> list[str]:
    """An experiment imports what a user could: nothing of memopt that starts with an underscore."""
    if source.folder != "experiments":
        return []
    used = [(item.target, item.line) for item in source.imports] + source.dotted
    found = [(name, line) for name, line in used if re.match(r"memopt(\.\w+)*\._(?!_)", name)]
    return [_at(source, line, f"an experiment may not use the private {name}") for name, line in sorted(set(found))]


def short_files(source: Source) -> list[str]:
    """A file has 500 lines at most."""
    count = len(source.text.splitlines())
    return [_at(source, count, f"{count} lines, {MAX_LINES} are allowed")] if count > MAX_LINES else []


def room_is_named(source: Source) -> list[str]:
    """A file opens with a docstring that says what room of the house it is."""
    if not source.text.strip() or ast.get_docstring(source.tree):
        return []
    return [_at(source, 1, "the module docstring is missing")]


def narrow_excepts(source: Source) -> list[str]:
    """No `except:`, `except Exception:`; where it must be, the line says `# noqa: BLE001` and the reason."""
    lines = source.text.splitlines()
    handlers = [node for node in ast.walk(source.tree) if isinstance(node, ast.ExceptHandler) and _is_broad(node.type)]
    excused = r"#\s*noqa: BLE001\W+\w+"
    bad = [node.lineno for node in handlers if not re.search(excused, lines[node.lineno - 1])]
    return [_at(source, line, "broad except: name the types, or write '# noqa: BLE001 (reason)'") for line in bad]


def _is_broad(kind: ast.expr | None) -> bool:
    if isinstance(kind, ast.Tuple):
        return any(_is_broad(item) for item in kind.elts)
    return kind is None or (_dotted_name(kind) or "").split(".")[-1] in ("Exception", "BaseException")


def jaxprs_are_not_text(source: Source) -> list[str]:
    """Tests look at primitives, recursively: a jaxpr's text changes between releases, and then the test cannot fail."""
    if source.folder != "tests":
        return []
    calls = [node for node in ast.walk(source.tree) if isinstance(node, ast.Call) and _makes_text_of_jaxpr(node)]
    return [_at(source, node.lineno, "compare eqn.primitive objects, not the text of a jaxpr") for node in calls]


def _makes_text_of_jaxpr(call: ast.Call) -> bool:
    function = _dotted_name(call.func) or ""
    if function in ("str", "repr", "format") and call.args:
        return _names_jaxpr(call.args[0])
    return isinstance(call.func, ast.Attribute) and call.func.attr == "pretty_print" and _names_jaxpr(call.func.value)


def _names_jaxpr(node: ast.expr) -> bool:
    names = [item.id if isinstance(item, ast.Name) else getattr(item, "attr", "") for item in ast.walk(node)]
    return any("jaxpr" in name.lower() for name in names)


def undocumented(module: object) -> list[str]:
    """Every public class and function has a docstring with an example."""
    names = getattr(module, "__all__", [])
    public = [(name, getattr(module, name)) for name in names]
    public = [(name, value) for name, value in public if inspect.isclass(value) or inspect.isroutine(value)]
    return [name for name, value in public if not re.search(r"Examples?:|>>> ", value.__doc__ or "")]


def unlisted_packages(packages: list[str], folders: list[str]) -> list[str]:
    """Every folder with an `__init__.py` is in the package list of setup.cfg, or it would not be installed."""
    names = [".".join([PACKAGES[folder.split("/")[0]], *folder.split("/")[1:]]) for folder in folders]
    return sorted(set(names) - set(packages))


# The rules on what is there.


def _files() -> Iterator[pathlib.Path]:
    for room in PACKAGES:
        for folder, _, names in os.walk(ROOT / room):
            yield from (pathlib.Path(folder, name) for name in names if name.endswith(".py"))


@functools.cache
def _sources() -> list[Source]:
    return [Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in sorted(_files())]


@dataclasses.dataclass(frozen=True)
class Case:
    """A rule, with files that break it and files that keep it, each as (path, text)."""

    rule: Callable[[Source], list[str]]
    broken: list[tuple[str, str]]
    kept: list[tuple[str, str]]


CASES = [
    Case(
        jax_internals,
        broken=[
            ("memopt/_graph.py", "from jax._src import core"),
            ("memopt/_graph.py", "from jax import _src"),
            ("passes/remat.py", "def f():\n    import jax._src.core as core"),
            ("tests/test_x.py", "import jax\njax._src.core.jaxprs_in_params"),
            ("passes/_compat.py", "import jax._src.core"),
            ("memopt/_graph.py", "importlib.import_module('jax._src.core')"),
        ],
        kept=[("memopt/_compat.py", "from jax._src import core"), ("memopt/_graph.py", "from jax.extend import core")],
    ),
    Case(
        short_form,
        broken=[
            ("tests/test_x.py", "import passes.remat"),
            ("tests/test_x.py", "from models import gpt2"),
            ("memopt/_plan.py", "def f():\n    from pallas_kernels import attention"),
        ],
        kept=[("tests/test_x.py", "from memopt.passes import Remat"), ("models/vit.py", "from . import layers")],
    ),
    Case(
        framework_knows_no_pass,
        broken=[
            ("memopt/_plan.py", "from memopt.passes.remat import Remat"),
            ("memopt/_plan.py", "def f():\n    from memopt.passes import Remat"),
            ("memopt/_plan.py", "from memopt.passes import default"),
            ("memopt/_plan.py", "from . import passes"),
            ("memopt/__init__.py", "from memopt.passes import Remat"),
            ("memopt/optim/_muon.py", "from ..passes import remat"),
        ],
        kept=[
            ("memopt/_plan.py", "def f():\n    from memopt.passes import default"),
            ("memopt/__init__.py", "from memopt import passes as passes"),
            ("passes/__init__.py", "from memopt.passes.remat import Remat"),
        ],
    ),
    Case(
        passes_stand_alone,
        broken=[
            ("passes/lossless.py", "from memopt.passes import remat"),
            ("passes/lossless.py", "from .remat import Remat"),
            ("passes/lossless.py", "import memopt\nmemopt.passes.Remat()"),
            ("passes/shard.py", "from memopt.models import llama"),
        ],
        kept=[
            ("passes/lossless.py", "from memopt._contract import Proposal"),
            ("passes/kernels.py", "from memopt import pallas_kernels"),
            ("passes/lossless.py", "from memopt.passes._codec import pack"),
            ("passes/__init__.py", "from memopt.passes.remat import Remat as Remat"),
        ],
    ),
    Case(
        models_and_kernels_stand_alone,
        broken=[
            ("models/gpt2.py", "import memopt"),
            ("models/gpt2.py", "from memopt import pallas_kernels"),
            ("pallas_kernels/attention/api.py", "from memopt._target import Target"),
            ("pallas_kernels/attention/api.py", "from ...passes import Remat"),
        ],
        kept=[
            ("models/vit.py", "from memopt.models import layers"),
            ("pallas_kernels/attention/api.py", "from . import reference\nimport jax"),
        ],
    ),
    Case(
        experiments_are_users,
        broken=[
            ("experiments/pareto.py", "from memopt._measure import measure"),
            ("experiments/pareto.py", "from memopt import _plan"),
            ("experiments/pareto.py", "import memopt\nmemopt._plan.f()"),
            ("experiments/pareto.py", "from memopt.passes._codec import pack"),
        ],
        kept=[
            ("experiments/pareto.py", "import memopt\nfrom memopt.passes import Remat\nprint(memopt.__version__)"),
            ("experiments/pareto.py", "import _report"),
        ],
    ),
    Case(short_files, broken=[("memopt/_x.py", "x = 1\n" * 501)], kept=[("memopt/_x.py", "x = 1\n" * 500)]),
    Case(
        room_is_named,
        broken=[("memopt/_x.py", "x = 1")],
        kept=[("memopt/_x.py", '"""A room."""'), ("models/x.py", "")],
    ),
    Case(
        narrow_excepts,
        broken=[
            ("memopt/_x.py", "try:\n    f()\nexcept:\n    g()"),
            ("memopt/_x.py", "try:\n    f()\nexcept Exception as error:\n    g()"),
            ("tests/x.py", "try:\n    f()\nexcept (ValueError, builtins.BaseException):\n    g()"),
            ("memopt/_x.py", "try:\n    f()\nexcept Exception:  # noqa: BLE001\n    g()"),
        ],
        kept=[
            ("memopt/_x.py", "try:\n    f()\nexcept (ValueError, TypeError):\n    g()"),
            ("memopt/_x.py", "try:\n    f()\nexcept Exception:  # noqa: BLE001 (a user's code may raise it)\n    g()"),
        ],
    ),
    Case(
        jaxprs_are_not_text,
        broken=[
            ("tests/test_x.py", "assert 'jit' in str(jaxpr)"),
            ("tests/test_x.py", "n = repr(jax.make_jaxpr(f)(x)).count('mul')"),
            ("tests/test_x.py", "'mul' in traced.jaxpr.pretty_print()"),
        ],
        kept=[("tests/test_x.py", "assert str(plan)\nassert 'mul' in [str(e.primitive) for e in jaxpr.eqns]")],
    ),
]
BROKEN = [pytest.param(case.rule, *file, id=case.rule.__name__) for case in CASES for file in case.broken]
KEPT = [pytest.param(case.rule, *file, id=case.rule.__name__) for case in CASES for file in case.kept]


@pytest.mark.parametrize("rule", [case.rule for case in CASES], ids=lambda rule: rule.__name__)
def test_the_sources_keep_the_rule(rule):
    assert [sentence for source in _sources() for sentence in rule(source)] == []


@pytest.mark.parametrize(("rule", "path", "text"), BROKEN)
def test_a_planted_violation_is_seen(rule, path, text):
    assert len(rule(Source(path, text))) == 1


@pytest.mark.parametrize(("rule", "path", "text"), KEPT)
def test_what_is_allowed_passes(rule, path, text):
    assert rule(Source(path, text)) == []


def test_every_room_is_looked_at():
    assert {source.folder for source in _sources()} >= {"memopt", "passes", "models", "pallas_kernels", "tests"}


def test_public_names_have_an_example():
    assert undocumented(memopt) == []


def test_a_public_name_without_an_example_is_seen():
    class Public:
        """Does something, and shows nothing."""

    class Shown:
        """Does something.

        >>> Shown()
        """

    class Module:
        __all__ = ["Public", "Shown"]

    Module.Public, Module.Shown = Public, Shown
    assert undocumented(Module) == ["Public"]


def _listed_packages() -> list[str]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config["options"]["packages"].split()


def test_every_package_is_installed():
    inits = [source.path for source in _sources() if source.name == "__init__.py"]
    folders = [path.rsplit("/", 1)[0] for path in inits if not path.startswith(("tests/", "experiments/"))]
    assert unlisted_packages(_listed_packages(), folders) == []


def test_a_forgotten_package_is_seen():
    assert unlisted_packages(["memopt", "memopt.passes"], ["passes", "memopt/optim"]) == ["memopt.optim"]


def test_no_installed_package_has_a_generic_name():
    assert {name.split(".")[0] for name in _listed_packages()} == {"memopt"}


def test_make_bench_runs_every_experiment():
    [named] = re.findall(r"^BENCH = (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    scripts = {p.stem for p in (ROOT / "experiments").glob("*.py") if not p.stem.startswith("_")}
    assert sorted(named.split()) == sorted(scripts - {"train_lm"})  # which `make run` runs
