"""Optax optimizers whose state takes little memory.

In come gradients, out go updates: each optimizer is a `scale_by_x` transformation and an alias `x(learning_rate, ...)`
with decoupled weight decay. They compose with `optax.chain`, `masked`, `multi_transform`, `inject_hyperparams`,
`MultiSteps` and schedules. `mezo` is a step of its own. This file exports, and does nothing else.
"""

from memopt.optim._adam_mini import adam_mini as adam_mini
from memopt.optim._adam_mini import scale_by_adam_mini as scale_by_adam_mini
from memopt.optim._apollo import apollo as apollo
from memopt.optim._apollo import apollo_mini as apollo_mini
from memopt.optim._apollo import scale_by_apollo as scale_by_apollo
from memopt.optim._apollo import scale_by_apollo_mini as scale_by_apollo_mini
from memopt.optim._came import came as came
from memopt.optim._came import scale_by_came as scale_by_came
from memopt.optim._dct import dct_low_rank as dct_low_rank
from memopt.optim._dct import scale_by_dct_low_rank as scale_by_dct_low_rank
from memopt.optim._eightbit import adam_8bit as adam_8bit
from memopt.optim._eightbit import adamw_8bit as adamw_8bit
from memopt.optim._eightbit import lion_8bit as lion_8bit
from memopt.optim._eightbit import momentum_8bit as momentum_8bit
from memopt.optim._eightbit import scale_by_adam_8bit as scale_by_adam_8bit
from memopt.optim._eightbit import scale_by_lion_8bit as scale_by_lion_8bit
from memopt.optim._eightbit import scale_by_momentum_8bit as scale_by_momentum_8bit
from memopt.optim._fourbit import adamw_4bit as adamw_4bit
from memopt.optim._fourbit import scale_by_adam_4bit as scale_by_adam_4bit
from memopt.optim._galore import galore as galore
from memopt.optim._galore import scale_by_galore as scale_by_galore
from memopt.optim._mezo import MezoState as MezoState
from memopt.optim._mezo import MezoStep as MezoStep
from memopt.optim._mezo import mezo as mezo
from memopt.optim._muon import muon as muon
from memopt.optim._muon import muon_8bit as muon_8bit
from memopt.optim._muon import scale_by_muon as scale_by_muon
from memopt.optim._muon import scale_by_muon_8bit as scale_by_muon_8bit
from memopt.optim._q_galore import q_galore as q_galore
from memopt.optim._q_galore import scale_by_q_galore as scale_by_q_galore
from memopt.optim._rounding import int8_apply_updates as int8_apply_updates
from memopt.optim._rounding import int8_decode as int8_decode
from memopt.optim._rounding import int8_weights as int8_weights
from memopt.optim._rounding import stochastic_rounding as stochastic_rounding

__all__ = [
    "MezoState",
    "MezoStep",
    "adam_8bit",
    "adam_mini",
    "adamw_4bit",
    "adamw_8bit",
    "apollo",
    "apollo_mini",
    "came",
    "dct_low_rank",
    "galore",
    "int8_apply_updates",
    "int8_decode",
    "int8_weights",
    "lion_8bit",
    "mezo",
    "momentum_8bit",
    "muon",
    "muon_8bit",
    "q_galore",
    "scale_by_adam_4bit",
    "scale_by_adam_8bit",
    "scale_by_adam_mini",
    "scale_by_apollo",
    "scale_by_apollo_mini",
    "scale_by_came",
    "scale_by_dct_low_rank",
    "scale_by_galore",
    "scale_by_lion_8bit",
    "scale_by_momentum_8bit",
    "scale_by_muon",
    "scale_by_muon_8bit",
    "scale_by_q_galore",
    "stochastic_rounding",
]
