"""Steps that win back accuracy after the grids are known."""
