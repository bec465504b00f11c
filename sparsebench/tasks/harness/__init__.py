"""The evaluation harness over this project's models, and the tinyworld tasks as harness tasks."""
