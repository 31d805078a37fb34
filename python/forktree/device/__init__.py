"""Transfers, staging buffers and captured graphs: the only place beside `ops` that speaks to a GPU."""
