"""What a finished run says of its student: a table in the log, and a model card."""
