"""The demo: a small model of Kimi-K2.5's architecture, quantized, measured and served on one machine."""
