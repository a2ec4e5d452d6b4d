"""The report: one page of tables and figures about runs."""
