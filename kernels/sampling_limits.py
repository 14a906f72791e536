"""Limits of sampling that also those must know who do not compute; hence no torch here."""

MAX_TOP_LOGPROBS = 20
"""The most probable tokens that can be told beside a sampled one."""
