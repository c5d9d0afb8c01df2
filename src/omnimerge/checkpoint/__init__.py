"""Bytes to tensors: headers, chunked reads, streamed writes, locations."""
