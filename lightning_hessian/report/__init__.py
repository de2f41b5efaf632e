"""One standalone page from the records of runs."""
