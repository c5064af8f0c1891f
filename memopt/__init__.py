"""memopt: make a JAX training step fit a memory budget, by rewriting its jaxpr.

Put `@memopt.optimize(budget=...)` on a training step. It is traced, planned and rewritten at the first call for each
set of shapes, and runs like a `jax.jit` function from then on.
"""

from memopt import optim as optim
from memopt import passes as passes
from memopt._collectives import collectives as collectives
from memopt._cost import matmul_flops as matmul_flops
from memopt._errors import BudgetError as BudgetError
from memopt._errors import TargetError as TargetError
from memopt._explain import Explanation as Explanation
from memopt._explain import explain as explain
from memopt._largest import Largest as Largest
from memopt._largest import largest as largest
from memopt._measure import Memory as Memory
from memopt._measure import measure as measure
from memopt._optimize import optimize as optimize
from memopt._plan import Decision as Decision
from memopt._plan import Plan as Plan
from memopt._plans import Plans as Plans
from memopt._scopes import compress as compress
from memopt._scopes import keep as keep
from memopt._scopes import offload as offload
from memopt._scopes import recompute as recompute
from memopt._sensitivity import Sensitivity as Sensitivity
from memopt._sensitivity import sensitivity as sensitivity
from memopt._target import mesh as mesh

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "Decision",
    "Explanation",
    "Largest",
    "Memory",
    "Plan",
    "Plans",
    "Sensitivity",
    "TargetError",
    "collectives",
    "compress",
    "explain",
    "keep",
    "largest",
    "matmul_flops",
    "measure",
    "mesh",
    "offload",
    "optim",
    "optimize",
    "passes",
    "recompute",
    "sensitivity",
]
