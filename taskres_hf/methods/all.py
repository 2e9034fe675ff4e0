"""Registers every method of the library: importing this module fills `METHODS`."""

from __future__ import annotations

from . import ape as ape
from . import clap as clap
from . import class_mean as class_mean
from . import clip_adapter as clip_adapter
from . import clip_lora as clip_lora
from . import coop as coop
from . import cross_modal as cross_modal
from . import gda as gda
from . import linear_probe as linear_probe
from . import lp_plus_plus as lp_plus_plus
from . import proker as proker
from . import prolip as prolip
from . import taskres as taskres
from . import tip_adapter as tip_adapter
from . import zero_shot as zero_shot
from .method import METHODS as METHODS
