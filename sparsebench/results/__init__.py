"""Records and the store they are kept in."""
