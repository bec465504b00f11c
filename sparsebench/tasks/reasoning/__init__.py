"""Reasoning with written thoughts: answers, and the tokens that are spent on them."""
