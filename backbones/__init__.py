"""Networks and their weights: no Lightning, no data, no out-of-distribution detection."""
