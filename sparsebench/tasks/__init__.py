"""Tasks: data and metric, one file per task or task family."""
