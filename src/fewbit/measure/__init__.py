"""Accuracy, speed and host, each with its interval."""
