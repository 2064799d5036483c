"""fewbit: a trained CNN, labelled images and an error budget in; the fastest network inside the budget out."""

import os

# OpenMP's threads spin at barriers: on cores that others use too, torch then takes ten times as long (measured).
# Read when torch is loaded, so it is said before; what the user has set stands.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
