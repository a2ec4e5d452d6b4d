"""The report: runs as one page of tables and figures."""
