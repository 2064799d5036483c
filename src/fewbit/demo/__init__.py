"""Two small networks trained on the built-in images by ``scripts/train_demo.py``: code, cards and weights."""
