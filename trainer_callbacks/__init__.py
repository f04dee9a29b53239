"""Callbacks for `transformers.Trainer` that make and keep models sparse while they train; each joins here by name."""
