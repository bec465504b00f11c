"""What is concluded from records: claims and, built on them, curves, laws and verdicts."""
