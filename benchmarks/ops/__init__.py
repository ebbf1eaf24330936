"""Suites of single ops, named as the ops are."""
