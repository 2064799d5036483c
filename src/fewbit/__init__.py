"""fewbit: a trained CNN, labelled images and an error budget in; the fastest network inside the budget out."""

__version__ = "0.1.0"
