"""Text that ships with the package: real English (``kjv``) and a procedural language (``tinyworld``)."""
