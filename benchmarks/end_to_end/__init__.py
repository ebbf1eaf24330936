"""Suites of whole training steps and whole generations."""
