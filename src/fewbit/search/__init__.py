"""Many recipes under a budget, every trial kept in a journal."""
