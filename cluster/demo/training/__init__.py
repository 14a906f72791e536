"""Trains ``kimi-k2.5-nano``, flyray's demo model: text and tasks in, a native Kimi-K2.5 style checkpoint out."""
