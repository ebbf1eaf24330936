"""Rivals that run in processes of their own (`isolated.py`): nothing here imports torch."""
