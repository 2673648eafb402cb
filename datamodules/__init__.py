"""Who is ID, who is OOD, who is auxiliary; where it lies on disk; how it becomes batches."""
