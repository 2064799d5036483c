"""One HTML file from a study."""
