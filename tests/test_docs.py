"""What the documentation shows is true: the examples of all public names run, and so does the README's snippet."""

import doctest
import inspect
import pathlib
import re

import pytest

import memopt

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"
PUBLIC = [name for name in memopt.__all__ if not inspect.ismodule(getattr(memopt, name))]
SHOWN = [*((name, getattr(memopt, name)) for name in PUBLIC), ("default", memopt.passes.default)]
SHOWN += [(name, getattr(memopt.passes, name)) for name in memopt.passes.__all__ if name != "default"]


@pytest.mark.parametrize(("name", "value"), SHOWN, ids=[name for name, _ in SHOWN])
def test_the_examples_are_true(name, value):
    finder = doctest.DocTestFinder(recurse=False)
    scope = {"memopt": memopt, "optimize": memopt.optimize}
    (found,) = finder.find(value, name, module=False, globs=scope)
    assert found.examples
    lines = []
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(found, out=lines.append)
    assert result.failed == 0, "".join(lines)


def test_the_snippet_of_the_readme_runs(capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    scope = {"__name__": "readme"}
    exec(compile(snippet, "README.md", "exec"), scope)
    assert "values read again later" in capsys.readouterr().out
    assert float(scope["loss"]) >= 0
