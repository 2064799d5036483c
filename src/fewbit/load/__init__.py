"""A file on disk becomes a Net; the only place that knows tracing."""
