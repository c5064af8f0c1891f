"""The sharding pass's map of a step: which values are made from which, and which dimensions are always cut together.

In: a flat jaxpr. Out: a `Flow` (readers and makers of every variable, through loop bodies) and `Groups` (dimensions
tied to each other by every operation: what people call logical axes, found on dataflow). It knows no mesh, no strategy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax

from memopt import _compat as c
from memopt import _fusion, _local_rules

Place = tuple[Any, int]  # a variable and one of its dimensions

_MOVING = frozenset(
    "reshape transpose squeeze expand_dims broadcast_in_dim slice pad rev concatenate iota dynamic_slice split "
    "tile".split()
)
ELEMENTWISE = (
    _fusion.ELEMENTWISE | frozenset("convert_element_type sharding_constraint copy copy_p add_any select_n".split())
) - _MOVING
CUTTING = frozenset("slice concatenate pad split dynamic_slice dynamic_update_slice".split())


class Read(NamedTuple):
    """One place where a variable is read: an equation, the operand's position, and the body that holds it."""

    eqn: Any
    position: int
    body: Any


class Link(NamedTuple):
    """An operand or result of an equation with a body, and the body's variable for it; `sliced`: one trip's part."""

    outer: Any
    inner: Any
    sliced: bool


def reshaped(before: tuple[int, ...], after: tuple[int, ...], dims: tuple) -> tuple:
    """Return what `dims` says of each dimension of a shape, for the same values in another shape.

    The major one of dimensions that a reshape joins or cuts keeps what is said of it; of the others nothing is known.

    Example:
      >>> reshaped((8, 24), (8, 2, 12), ("width", "words"))
      ('width', 'words', None)
    """
    found = [None] * len(after)
    for old, new in _local_rules.reshape_majors(before, after):
        found[new] = dims[old]
    return tuple(found)


def is_var(atom: Any) -> bool:
    """Say whether an atom is a variable that something may read."""
    return not isinstance(atom, (c.Literal, c.DropVar))


def shape_of(atom: Any) -> tuple[int, ...]:
    """Return an atom's shape, empty where it has none."""
    return tuple(getattr(atom.aval, "shape", ()))


def is_float(var: Any) -> bool:
    """Say whether a variable holds real numbers."""
    dtype = getattr(var.aval, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.numpy.floating)


class Flow:
    """Readers and makers of every variable of a flat jaxpr.

    Args:
      closed: the jaxpr.

    Attributes:
      readers: variable -> where it is read.
      makers: variable -> the equation that makes it, and its position among the results.
      inner: equation (by id) -> links of its operands and links of its results.
      trips: body (by id) -> how often it runs in all.
    """

    def __init__(self, closed: Any):
        self.jaxpr = c.open_jaxpr(closed)
        self.readers: dict[Any, list[Read]] = {}
        self.makers: dict[Any, tuple[Any, int]] = {}
        self.inner: dict[int, tuple[list[Link], list[Link]]] = {}
        self.carried: dict[Any, Any] = {}  # a body's carry out -> its carry in
        self.outer_of: dict[Any, list[Link]] = {}  # a body's result -> links to what it becomes outside
        self.trips: dict[int, int] = {id(self.jaxpr): 1}
        self.bodies: list[Any] = []
        self._walk(self.jaxpr, 1)

    def _walk(self, body: Any, trips: int) -> None:
        self.bodies.append(body)
        self.trips[id(body)] = trips
        for eqn in body.eqns:
            for i, v in enumerate(eqn.invars):
                if is_var(v):
                    self.readers.setdefault(v, []).append(Read(eqn, i, body))
            for i, v in enumerate(eqn.outvars):
                if is_var(v):
                    self.makers[v] = eqn, i
            tied = _local_rules.ties(eqn)
            if tied is None:
                continue
            length = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
            ins, outs = _links(eqn)
            self.inner[id(eqn)] = ins, outs
            for link in outs:
                self.outer_of.setdefault(link.inner, []).append(link)
            self.carried.update(_carried(eqn))
            for inner, _ in tied:
                self._walk(inner, trips * length)

    def next(self, var: Any) -> Iterator[Any]:
        """Yield the variables that a variable goes into at once, through loops and calls."""
        for eqn, position, _ in self.readers.get(var, ()):
            if id(eqn) in self.inner:
                yield from (x.inner for x in self.inner[id(eqn)][0] if x.outer is eqn.invars[position])
            else:
                yield from filter(is_var, eqn.outvars)
        yield from (x.outer for x in self.outer_of.get(var, ()))
        if var in self.carried:
            yield self.carried[var]

    def before(self, var: Any) -> Iterator[Any]:
        """Yield the variables that a variable is made of at once."""
        made = self.makers.get(var)
        if made is not None:
            eqn = made[0]
            if id(eqn) in self.inner:
                yield from (x.inner for x in self.inner[id(eqn)][1] if x.outer is var)
            else:
                yield from filter(is_var, eqn.invars)
        yield from self.entries.get(var, ())

    @property
    def entries(self) -> dict[Any, list[Any]]:
        """A body's input -> the operands that it stands for, its carry among them."""
        if not hasattr(self, "_entries"):
            self._entries: dict[Any, list[Any]] = {}
            for ins, _ in self.inner.values():
                for link in ins:
                    self._entries.setdefault(link.inner, []).append(link.outer)
            for after, first in self.carried.items():
                self._entries.setdefault(first, []).append(after)
        return self._entries

    def reach(self, roots: Iterable[Any]) -> set[Any]:
        """Return all variables that depend on one of these, themselves among them."""
        return _closure(roots, self.next)

    def ancestors(self, ends: Iterable[Any]) -> set[Any]:
        """Return all variables that one of these depends on, themselves among them."""
        return _closure(ends, self.before)


def _closure(roots: Iterable[Any], step: Any) -> set[Any]:
    found = set(filter(is_var, roots))
    todo = list(found)
    while todo:
        for var in step(todo.pop()):
            if var not in found:
                found.add(var)
                todo.append(var)
    return found


def _links(eqn: Any) -> tuple[list[Link], list[Link]]:
    """Return how an equation's operands and results meet the variables of its bodies."""
    ins: list[Link] = []
    outs: list[Link] = []
    name = eqn.primitive.name
    for i, (body, _) in enumerate(_local_rules.ties(eqn) or ()):
        if name == "scan":
            num_consts, num_carry = c.scan_layout(eqn)
            pairs = enumerate(zip(eqn.invars, body.invars, strict=True))
            ins += [Link(o, v, k >= num_consts + num_carry) for k, (o, v) in pairs if is_var(o)]
            pairs = enumerate(zip(eqn.outvars, body.outvars, strict=True))
            outs += [Link(o, v, k >= num_carry) for k, (o, v) in pairs if is_var(o) and is_var(v)]
        elif name == "while":
            n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
            consts = eqn.invars[n_cond : n_cond + n_body] if i == 0 else eqn.invars[:n_cond]
            state = eqn.invars[n_cond + n_body :]
            ins += [Link(o, v, False) for o, v in zip([*consts, *state], body.invars, strict=False) if is_var(o)]
            if i == 0:
                outs += [Link(o, v, False) for o, v in zip(eqn.outvars, body.outvars, strict=True) if is_var(v)]
        else:
            operands = eqn.invars[1:] if name == "cond" else eqn.invars
            ins += [Link(o, v, False) for o, v in zip(operands, body.invars, strict=True) if is_var(o)]
            pairs = zip(eqn.outvars, body.outvars, strict=True)
            outs += [Link(o, v, False) for o, v in pairs if is_var(o) and is_var(v)]
    return ins, outs


def _carried(eqn: Any) -> dict[Any, Any]:
    if eqn.primitive.name == "scan":
        body = c.open_jaxpr(eqn.params["jaxpr"])
        num_consts, num_carry = c.scan_layout(eqn)
        pairs = zip(body.outvars[:num_carry], body.invars[num_consts:], strict=False)
    elif eqn.primitive.name == "while":
        body = c.open_jaxpr(eqn.params["body_jaxpr"])
        pairs = zip(body.outvars, body.invars[eqn.params["body_nconsts"] :], strict=True)
    else:
        return {}
    return {after: first for after, first in pairs if is_var(after)}


class Groups:
    """Dimensions that every operation cuts together, as classes of `(variable, dimension)`.

    Args:
      flow: the step's map.

    A group is an integer. `members(group)` are all its places; `divisor(group)` is the largest number that divides all
    sizes in it; `cut` holds groups along which a value is sliced, padded or concatenated.
    """

    def __init__(self, flow: Flow):
        self._parent: dict[Place, Place] = {}
        self.cut: set[int] = set()
        cutting: list[Place] = []
        for body in flow.bodies:
            for eqn in body.eqns:
                tied = _local_rules.ties(eqn)
                if tied is None:
                    self._tie(_local_rules.factors_of(eqn) or ())
                    cutting += _cutting_places(eqn)
                for _, factors in tied or ():
                    self._tie(factors)
        self._number()
        self.cut = {self.of(*place) for place in cutting} - {None}

    def _tie(self, factors: Iterable[_local_rules.Factor]) -> None:
        for factor in factors:
            places = [p for p in factor.places if is_var(p[0])]
            for place in places[1:]:
                self._union(places[0], place)

    def _find(self, place: Place) -> Place:
        parent = self._parent
        root = place
        while parent.get(root, root) != root:
            root = parent[root]
        while parent.get(place, place) != root:
            parent[place], place = root, parent[place]
        return root

    def _union(self, a: Place, b: Place) -> None:
        a, b = self._find(a), self._find(b)
        self._parent.setdefault(a, a)
        self._parent[b] = a

    def _number(self) -> None:
        numbers: dict[Place, int] = {}
        self._group: dict[Place, int] = {}
        self._members: list[list[Place]] = []
        for place in list(self._parent):
            root = self._find(place)
            if root not in numbers:
                numbers[root] = len(self._members)
                self._members.append([])
            self._group[place] = numbers[root]
            self._members[numbers[root]].append(place)

    def of(self, var: Any, dim: int) -> int | None:
        """Return the group of a dimension, None where no operation ties it to another."""
        return self._group.get((var, dim))

    def all_of(self, var: Any) -> tuple[int | None, ...]:
        """Return the groups of a variable's dimensions."""
        return tuple(self._group.get((var, d)) for d in range(len(shape_of(var))))

    def members(self, group: int) -> list[Place]:
        """Return the places of a group."""
        return self._members[group]

    def divisor(self, group: int) -> int:
        """Return the largest number of parts that all sizes in a group can be cut into."""
        sizes = [shape_of(v)[d] for v, d in self._members[group]]
        return math.gcd(*[s for s in sizes if s > 1]) if any(s > 1 for s in sizes) else 1


def _cutting_places(eqn: Any) -> list[Place]:
    """Return the dimensions along which an equation slices, pads or joins."""
    if eqn.primitive.name not in CUTTING:
        return []
    found = []
    for out in filter(is_var, eqn.outvars):
        for dim, size in enumerate(shape_of(out)):
            ranked = [v for v in eqn.invars if len(shape_of(v)) == len(shape_of(out))]
            if any(shape_of(v)[dim] != size for v in ranked):
                found.append((out, dim))
    return found
