"""Runs a recipe as a job of a Ray cluster elsewhere and follows its log."""
