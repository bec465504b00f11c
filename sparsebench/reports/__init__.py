"""Reports: an executed notebook, a page, figures, tables and machine-readable files, all from a sweep's records."""
