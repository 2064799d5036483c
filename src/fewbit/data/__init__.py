"""Labelled images: folders, archives, preprocessing, choice of samples."""
