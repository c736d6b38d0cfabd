"""Fixtures of the Python tests."""
