"""Flax models, written plainly, with no memory tricks of their own.

In come configurations of the published sizes, out go models and the reference steps built from them. Nothing here
imports the framework or a kernel: memopt makes these models fit from outside.
"""

from .common import parameter_count as parameter_count
from .common import stack_layers as stack_layers
from .common import unstack_layers as unstack_layers
from .steps import FAMILIES as FAMILIES
from .steps import POLICIES as POLICIES
from .steps import concrete as concrete
from .steps import make_args as make_args
from .steps import reference_step as reference_step
