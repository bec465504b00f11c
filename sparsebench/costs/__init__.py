"""What a sparse model costs: operations, bytes, seconds."""
