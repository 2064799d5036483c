"""Which region of a network gets which precision: the problem, and every way to solve it."""
