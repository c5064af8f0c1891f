"""Every public name of `memopt.optim` is documented, and its example is true."""

import doctest
import inspect
import re

import pytest

from memopt import optim

SECTIONS = ("Memory", "Args:", "Returns:", "Example:", "Source:")


@pytest.mark.loose_promotion
@pytest.mark.parametrize("name", optim.__all__)
def test_the_example_is_true(name):
    (found,) = doctest.DocTestFinder(recurse=False).find(getattr(optim, name), name, module=False, globs={})
    assert found.examples
    lines = []
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(found, out=lines.append)
    assert result.failed == 0, "".join(lines)


@pytest.mark.parametrize("name", [name for name in optim.__all__ if inspect.isfunction(getattr(optim, name))])
def test_the_docstring_has_all_parts(name):
    text = getattr(optim, name).__doc__
    wanted = SECTIONS if not name.startswith("int8_decode") else ("Memory", "Args:", "Returns:", "Example:")
    assert [part for part in wanted if not re.search(rf"^ +{part}", text, re.MULTILINE)] == []
    arguments = inspect.signature(getattr(optim, name)).parameters
    assert [argument for argument in arguments if not re.search(rf"\b{argument}\b", text.split("Args:")[1])] == []
