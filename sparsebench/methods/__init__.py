"""Methods, one file each, in the folder of their target."""
