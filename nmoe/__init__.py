"""nmoe serves DeepSeek-V3-family mixture-of-experts models from one node."""

__version__ = "0.1.0"
