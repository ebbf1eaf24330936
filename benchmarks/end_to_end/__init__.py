"""Whole ways through the library on real data: what a user gets, and how well it does."""
