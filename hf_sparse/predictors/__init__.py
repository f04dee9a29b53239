"""Contextual sparsity: which attention heads and neurons the token at hand needs, told before they are computed."""
